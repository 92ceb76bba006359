"""The file of results: JSON lines, one a cell, that survive an interruption at any moment."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from rdkv.runtime.errors import ConfigError

Record = dict[str, Any]


def cell_key(identity: Mapping[str, Any]) -> str:
    """Twenty digits that decide whether two cells are the same."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


class Cells:
    """A results file that is added to. A line is on the disk when `add` returns; a torn last line is dropped.

    Args:
        path: made if it is not there.

    Raises:
        ConfigError: another run writes to it, or it is not a file of results.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: BinaryIO = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError(f"another run is writing to {path}; wait for it, or give another --out") from error
        self._drop_torn_line()
        try:
            self.done = {record["key"] for record in read_cells(path)}
        except KeyError as error:
            raise ConfigError(f"{path} has lines without a key; give another --out") from error

    def add(self, records: list[Record]) -> None:
        """Append records, each with its ``key``, and wait until they are on the disk.

        Raises:
            ValueError: a cell is there already.
        """
        keys = [record["key"] for record in records]
        if twice := self.done.intersection(keys):
            raise ValueError(f"cell {twice.pop()} is in {self.path} already")
        self._file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.update(keys)

    def _drop_torn_line(self) -> None:
        """Cut what stands after the last line end: a write that was cut short."""
        self._file.seek(0)
        kept = self._file.read().rfind(b"\n") + 1
        self._file.truncate(kept)
        self._file.seek(kept)

    def __enter__(self) -> Cells:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_cells(path: Path) -> Iterator[Record]:
    """Records of a results file, without a torn last line.

    Raises:
        ConfigError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the results {path}: {error.strerror or error}") from error
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{path}, line {number}, is not a JSON object")
        yield record
