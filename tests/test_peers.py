"""The catalogue of peers: every name makes a method, or says what is not installed."""

from __future__ import annotations

import pytest

import rdkv
from bench.quality.peers import METHODS, PEERS, catalogue, missing


def test_names_are_those_of_the_methods() -> None:
    assert list(PEERS) == [method.name for method in METHODS]
    assert len(PEERS) == len(METHODS)


@pytest.mark.parametrize("name", PEERS)
def test_a_name_makes_its_method_or_says_what_is_missing(name: str) -> None:
    if lacks := missing(name):
        with pytest.raises(rdkv.ConfigError, match=lacks[0]):
            PEERS[name]()
    else:
        method = PEERS[name]()
        assert method.name == name
        assert "peer" in method.settings


def test_what_is_missing_is_found_without_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> None:
        if "." in module:
            raise ModuleNotFoundError(module)

    monkeypatch.setattr(catalogue, "find_spec", absent)
    assert missing("kvpress-snapkv-quanto-4") == ["kvpress", "quanto"]
    assert missing("transformers-hqq-2") == ["hqq"]
    with pytest.raises(rdkv.ConfigError, match="make peers"):
        PEERS["kvpress-kvzip"]()


def test_settings_tell_methods_apart() -> None:
    """Cells of a sweep are kept by their settings."""
    ready = [method for method in METHODS if not missing(method.name)]
    settings = [str(sorted(method.settings.items())) for method in ready]
    assert len(set(settings)) == len(ready)
