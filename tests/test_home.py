"""Where files are kept, and that writes are all or nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rdkv.runtime.home import PARTIAL, home, new_file, new_folder, write_file


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RDKV_HOME", str(tmp_path / "explicit"))
    assert home() == tmp_path / "explicit"
    monkeypatch.delenv("RDKV_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert home() == tmp_path / "xdg" / "rdkv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".cache" / "rdkv"


def test_a_failed_block_leaves_no_folder(tmp_path: Path) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "made") as partial:
            (partial / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    with new_folder(tmp_path / "made") as ours:
        (ours / "who").write_text("ours")
        with new_folder(tmp_path / "made") as theirs:
            (theirs / "who").write_text("theirs")
    assert (tmp_path / "made" / "who").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, young = tmp_path / f"{PARTIAL}old", tmp_path / f"{PARTIAL}young"
    for folder in (old, young):
        folder.mkdir()
    long_ago = time.time() - 48 * 3600
    os.utime(old, (long_ago, long_ago))
    with new_folder(tmp_path / "made"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{PARTIAL}young", "made"]


def test_write_file_keeps_the_old_contents_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    write_file(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_new_file_is_there_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with new_file(path) as partial:
        partial.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"

    def fail() -> None:
        with new_file(path) as partial:
            partial.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_new_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("sync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("replace"), replace(*names)))
    write_file(tmp_path / "file", b"new")
    assert steps == ["sync", "replace", "sync"]
