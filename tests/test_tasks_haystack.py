"""Haystack texts and how needles are put into them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.quality.tasks import read_texts
from bench.quality.tasks.haystack import NOISE, Text, noise, put, sentence_ends
from rdkv.runtime.errors import ConfigError


def test_folder_in_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("first")
    (tmp_path / "a" / "other.json").write_text("{}")
    assert read_texts(tmp_path) == "first\n\nsecond"
    assert read_texts(tmp_path / "b.txt") == "second"


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no haystack text in"):
        read_texts(tmp_path)
    with pytest.raises(ConfigError, match="cannot read the haystack text"):
        read_texts(tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="cannot read the haystack text"):
        read_texts(tmp_path)
    with pytest.raises(ConfigError, match="is empty"):
        Text(" \n")


def test_text_begins_again() -> None:
    text = Text("One two three. Four\nfive! Six")
    assert text.starts == [0, 3, 5]
    assert text.take(3, 9) == ["Four", "five!", "Six", "One", "two", "three.", "Four", "five!", "Six"]


def test_vocabulary() -> None:
    assert Text('The "Zebra" zebra, (apple) x42y don\'t über pear.').vocabulary == ["apple", "pear", "zebra"]


def test_noise_goes_round() -> None:
    assert noise(7) == [*NOISE, *NOISE[:2]]


def test_put_at_depths() -> None:
    units = list("abcd")
    assert put(units, ["1", "2", "3"], [0.0, 0.5, 0.999], range(5)) == ["1", "a", "b", "2", "c", "d", "3"]
    assert put(units, ["1", "2"], [0.5, 0.5], range(5)) == ["a", "b", "1", "2", "c", "d"]
    assert put([], ["1", "2"], [0.1, 0.9], [0]) == ["1", "2"]
    assert put(units, ["late", "early"], [0.9, 0.1], range(5)) == ["early", *units, "late"]


def test_put_between_sentences() -> None:
    words = ["A", "b", "c.", "D", "e", "f.", "G", "h"]
    places = sentence_ends(words)
    assert places == [0, 3, 6]
    assert " ".join(put(words, ["!"], [0.6], places)) == "A b c. ! D e f. G h"
    assert " ".join(put(words, ["!"], [0.99], places)) == "A b c. D e f. ! G h"
