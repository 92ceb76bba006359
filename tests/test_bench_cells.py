"""The file of results: nothing twice, nothing lost, whatever cut a write short."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.quality.cells import Cells, cell_key, read_cells
from rdkv.runtime.errors import ConfigError

ROWS = [{"key": "a", "kl": 1.5}, {"key": "b", "kl": 2.5}]


def test_cells_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cells.jsonl"
    with Cells(path) as cells:
        cells.add(ROWS[:1])
        cells.add(ROWS[1:])
        with pytest.raises(ValueError, match="already"):
            cells.add(ROWS[:1])
    with Cells(path) as cells:
        assert cells.done == {"a", "b"}
        cells.add([{"key": "c"}])
    assert list(read_cells(path)) == [*ROWS, {"key": "c"}]


@pytest.mark.parametrize("torn", ['{"key": "c", "k', '{"key": "c"}'])
def test_a_torn_line_is_dropped(torn: str, tmp_path: Path) -> None:
    """A line counts with its end; without, its cell is measured again."""
    path = tmp_path / "cells.jsonl"
    with Cells(path) as cells:
        cells.add(ROWS)
    with path.open("a") as file:
        file.write(torn)
    assert list(read_cells(path)) == ROWS
    with Cells(path) as cells:
        assert cells.done == {"a", "b"}
        cells.add([{"key": "c", "kl": 3.5}])
    assert list(read_cells(path)) == [*ROWS, {"key": "c", "kl": 3.5}]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with Cells(tmp_path / "cells.jsonl"), pytest.raises(ConfigError, match="another run"):
        Cells(tmp_path / "cells.jsonl")
    with Cells(tmp_path / "cells.jsonl"):
        pass


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        list(read_cells(tmp_path / "none.jsonl"))
    path = tmp_path / "cells.jsonl"
    path.write_text('{"key": "a"}\nno\n')
    with pytest.raises(ConfigError, match="line 2, is not JSON"):
        list(read_cells(path))
    path.write_text("[]\n")
    with pytest.raises(ConfigError, match="not a JSON object"):
        list(read_cells(path))
    path.write_text('{"task": "old"}\n')
    with pytest.raises(ConfigError, match="without a key"):
        Cells(path)


def test_keys() -> None:
    assert cell_key({"a": 1, "b": [2]}) == cell_key({"b": [2], "a": 1})
    assert cell_key({"a": 1}) != cell_key({"a": 2})
