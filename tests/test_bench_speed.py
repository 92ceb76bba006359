"""The commands of ``bench/speed`` on tiny shapes: synthetic prompts, records and tables, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from packs import read_keys, read_values

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.speed import (
    attention,
    baselines,
    cases,
    compress,
    decode_schedule,
    leverage,
    mix,
    rotation,
    serving_table,
    sizes,
    synthetic,
    table,
    tables,
    timing,
)
from rdkv.kernels import naive_pack
from rdkv.kernels.packed import BLOCK, COLUMN_START, COLUMNS, KEY_START, NIBBLES, PINNED, TOKENS
from rdkv.runtime.plan import BitPlan

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENTRY = {
    "kept": 0.1,
    "value_widths": {"pinned": 0.02, "16": 0.03, "8": 0.1, "4": 0.6, "2": 0.25},
    "key_widths": {"8": 0.25, "4": 0.5, "2": 0.125, "0": 0.125},
    "key_profiles": {"8,4,4,2": 0.5, "8,4,4,0": 0.5},
    "key_columns": 32.0,
    "kept_over_layer_mean_deciles": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
}
MEASURED = {
    "model": "tiny", "prompts": 2, "tokens": 1500, "tasks": ["a", "b"], "layers": 2, "kv_heads": 2, "head_dim": 16,
    "budgets": {"0.05": ENTRY | {"kept": 0.2}, "0.1": ENTRY},
}  # fmt: skip


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bit-mix-tiny.json"
    path.write_text(json.dumps(MEASURED))
    monkeypatch.setattr(sizes, "MEASURED", path)
    return path


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is run once, and takes 2 microseconds."""

    def microseconds(step: Callable[[Any], Any], layers: Sequence[Any]) -> float:
        for layer in layers:
            step(layer)
        return 2.0

    monkeypatch.setattr(timing, "microseconds", microseconds)
    monkeypatch.setattr(timing, "copies", lambda nbytes: 2)
    monkeypatch.setattr(attention, "CHECKED_TOKENS", 200)


@pytest.mark.parametrize("name", sizes.MIXES)
@pytest.mark.parametrize("spread", [0.2, None])
def test_sizes_hold_the_budget(name: str, spread: float | None, measured: Path) -> None:
    rows, dim, tokens, budget = 6, 64, 5000, 0.08
    found = sizes.plan_sizes(rows, dim, tokens, budget, sizes.make_mix(name, budget), spread)
    full = 4 * rows * dim * tokens
    if name == "4bit":
        assert all(row[TOKENS] == tokens for row in found.counts)
        assert found.nbytes == pytest.approx(full / 4, rel=0.08)  # scales, zeros and positions
    else:
        assert budget * full * 0.995 <= found.nbytes <= budget * full
        kept = [row[TOKENS] + row[PINNED] for row in found.counts]
        assert len(set(kept)) == rows
        assert max(kept) / min(kept) == pytest.approx(7 / 5 if spread or name != "smollm2" else 2.4, rel=0.05)


def test_shares_are_those_measured(measured: Path) -> None:
    found = sizes.plan_sizes(4, 64, 5000, 0.1, sizes.make_mix("smollm2", 0.12), 0.2)
    for n, n4, n8, n16, pinned, *columns in found.counts:
        assert (pinned, *(count % BLOCK for count in columns)) == (3, 0, 0)
        assert [n16 / n, n8 / n, n4 / n] == pytest.approx([0.03 / 0.98, 0.13 / 0.98, 0.73 / 0.98], abs=0.01)
    # 16 channels of 8 bits and 32 of 4 are 64 nibbles of two words; 16 of 2 bits or none are the other words.
    assert sorted((row[COLUMNS], row[NIBBLES]) for row in found.counts) == [(128, 64), (128, 64), (144, 64), (144, 64)]


@pytest.mark.parametrize("name", sizes.MIXES)
@pytest.mark.parametrize(("heads", "dim", "group"), [(2, 16, 2), (1, 64, 4)])
def test_synthetic_prompts_decode(name: str, heads: int, dim: int, group: int, measured: Path) -> None:
    shape = cases.Shape(batch=2, tokens=300, heads=heads, group=group, dim=dim)
    case = cases.Case(shape, None if name == "4bit" else 0.3, name)
    assert attention.checked_error(case, DEVICE) < attention.MOST_ERROR
    packed, wanted = synthetic.synthesize(2, heads, case.sizes(), DEVICE, torch.bfloat16), case.sizes()
    positions = sum(
        38 + -(-(row[TOKENS] or row[PINNED]) // 4) + 4 * row[PINNED] * bool(row[TOKENS]) for row in packed.host_counts
    )
    assert sum(tensor.nbytes for tensor in packed.tensors()) + positions == wanted.nbytes
    widths = naive_pack.key_widths(packed).tolist()
    assert widths == ([[16] * dim] * (2 * heads) if name == "16bit" else wanted.key_widths)


@pytest.mark.parametrize("budget", [0.05, 0.11, 0.31, 0.5])
def test_synthetic_prompts_clear_what_is_unused(budget: float, measured: Path) -> None:
    """No code is above its width, those of slots without a token are 0, and so is what pads columns."""
    found = sizes.plan_sizes(2, 16, 300, budget, sizes.make_mix("smollm2", budget), 0.2)
    packed = synthetic.synthesize(1, 2, found, "cpu", torch.bfloat16)
    padding = packed.key_columns < 0
    for row, ((n, n4, n8, n16, *_), starts) in enumerate(zip(packed.host_counts, packed.starts.tolist(), strict=True)):
        keys, values = read_keys(packed, row, unused=True), read_values(packed, row, unused=True)
        slot = torch.arange(len(values))
        width = sum(step * (slot < end) for step, end in ((2, n), (2, n4), (4, n8), (8, n16)))
        assert bool((values < 1 << width[:, None]).all())
        assert bool((keys < 1 << torch.tensor(found.key_widths[row])).all())
        assert not keys[n:].any()
        assert bool(keys[:n].any(1).all() & values[:n].any(1).all())
        columns, nibbles = packed.host_counts[row][COLUMNS], packed.host_counts[row][NIBBLES]
        words = packed.key_codes[starts[KEY_START] :][: len(keys) // 8 * columns].view(-1, columns)
        assert not words[:, 2 * nibbles :][:, padding[starts[COLUMN_START] + nibbles :][: columns - 2 * nibbles]].any()


def test_records_lines_and_tables(measured: Path, untimed: None, tmp_path: Path) -> None:
    arguments = "--tokens 200 --batch 1 --budget 0.3,0.01 --mix smollm2,4bit --head-dim 16 --heads 1 --group 2 --out x"
    chosen = cases.cases(cases.parser("").parse_args(arguments.split()))
    assert len(chosen) == 3
    records = list(attention.results(chosen, 1e12, others=True, device=DEVICE))
    assert [record["us"] for record in records if record["budget"] == 0.01] == [None]  # not a token a head
    for record in records:
        assert attention.line(record).startswith(record["mix"])
        if record["budget"] != 0.01:
            assert (record["us"], record["sdpa_us"], record["over_sdpa"]) == (2.0, 2.0, 1.0)
            assert record["floor_us"] == round(record["moved_bytes"] / 1e6, 2)
    path = tmp_path / "attention.jsonl"
    machine = timing.machine() | {"copy_bytes_per_s": 10**12, "copy_by": "a copy"}
    path.write_text("".join(json.dumps(record | machine) + "\n" for record in [*records, *records]))
    page = table.fill((ROOT / "docs" / "performance.md").read_text(), table.read([path, measured]))
    assert page.count("| 200 | 1 | 30% |") == 1
    assert page.count("| 200 | 1 | all tokens |") == 1
    assert "Not timed: ValueError: " in page
    assert "| 5% | 20.0% | 2.0% | 3.0% |" in page
    assert (
        page.count(table.NOTHING) == 9
    )  # other mixes, prefill, leverage, rotation, engine, products, servers, a step of theirs
    assert table.fill(page, table.read([path, measured])) == page
    assert table.fill(page, []).count(table.NOTHING) == page.count("<!-- end -->")


def test_the_page_shows_the_records() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    results = sorted((ROOT / "bench" / "results").glob("*.json"))
    results += sorted((ROOT / "bench" / "results").glob("*.jsonl"))
    assert table.fill(page, table.read(results)) == page, "make performance-table"


def test_a_missing_library_is_recorded(untimed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    record = baselines.full_cache(cases.Shape(1, 64, 2, 2, 16), DEVICE)
    assert record["flashinfer_us"] is None
    assert record["flashinfer_reason"].startswith("ModuleNotFoundError")
    assert record["sdpa_us"] == 2.0


def test_a_wrong_output_is_not_timed(measured: Path, untimed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_ERROR", 0.0)
    (record,) = attention.results([cases.Case(cases.Shape(1, 64, 1, 2, 16), 0.5, "2bit")], 1e12, False, DEVICE)
    assert record["us"] is None
    assert "not timed" in record["reason"]


def test_the_first_cases_come_first() -> None:
    chosen = cases.cases(cases.parser("").parse_args(["--out", "x"]))
    assert [(c.shape.batch, c.shape.tokens, c.budget, c.mix) for c in chosen[: len(cases.FIRST)]] == cases.FIRST
    assert len(set(chosen)) == len(chosen) == 3 * 4 * (3 * 4 + 1)


@pytest.mark.parametrize("arguments", ["--mix 3bit", "--tokens many", "--spread wide"])
def test_wrong_arguments_are_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cases.parser("").parse_args(["--out", "x", *arguments.split()])
    assert arguments.split()[0] in capsys.readouterr().err


def test_prefills_are_compared() -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    record = compress.compare(compress.make_model(2, DEVICE, **shape, **heads), 200, 0.3, runs=1)
    assert 0 < record["held_bytes"] < 0.3 * record["full_bytes"]
    assert record["full_bytes"] == 200 * 2 * 2 * 2 * 8 * 2
    assert 0 < record["own_share"] < 1
    page, here = "<!-- table: compress -->\n<!-- end -->", record | timing.machine()
    assert "| 200 | 2 | 30% |" in table.fill(page, [here])
    two = table.fill(page, [here, here | {"device": "another GPU"}])
    assert two.index("| 200 | 2 | 30% |") < two.index("another GPU") < two.rindex("| 200 | 2 | 30% |")
    assert compress.parser().parse_args(["--out", "x", "--tokens", "1", "2"]).tokens == [1, 2]


def test_the_mix_counts_heads() -> None:
    bits = torch.tensor([[[0, 2, 4, 8, 16, 16], [16, 16, 0, 0, 0, 16]]], dtype=torch.uint8)
    key_bits = torch.tensor([[[8, 0] * 16, [16] * 32]], dtype=torch.uint8)
    pinned = torch.tensor([[[False] * 5 + [True], [False] * 5 + [True]]])
    tally = mix.Tally(held=[0.1])
    tally.add(BitPlan(bits, key_bits, pinned))
    found = tally.summary()
    assert found["kept"] == pytest.approx(8 / 12, abs=1e-5)
    assert found["value_widths"] == {"pinned": 0.25, "16": 0.375, "8": 0.125, "4": 0.125, "2": 0.125}
    assert found["key_widths"] == {"8": 0.5, "0": 0.5}  # the other head quantises nothing
    assert (found["key_columns"], found["heads_without_codes"]) == (64, 0.5)
    assert found["key_profiles"] == {"8,8,8,8,0,0,0,0": 1.0}
    assert found["kept_over_layer_mean_deciles"][::10] == [0.75, 1.25]


def test_the_command_of_a_mix_names_no_folder() -> None:
    text = "--model /some/where/tiny --data /else/where --out results/mix.json"
    line = mix.command(mix.parser().parse_args(text.split()))
    assert "/" not in line.replace("bench/", "")
    assert isinstance(mix.parser(), argparse.ArgumentParser)


def test_a_serving_step(untimed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in an arena and tails of five tokens; its output is checked against plain PyTorch before."""
    monkeypatch.setattr(decode_schedule, "CHECKED_TOKENS", 200)
    monkeypatch.setattr(decode_schedule, "LAYERS", 2)
    case = cases.Case(cases.Shape(2, 400, 2, 4, 64), 0.3, "2bit")
    (record,) = decode_schedule.results([case], [5], 1e9, False, DEVICE)
    assert record["reason"] is None
    assert 0 < record["error"] < 2e-3
    assert record["tail_bytes"] == 2 * 5 * 2 * 2 * 64 * 2  # sequences, tokens, keys and values, heads, channels, bytes
    assert record["moved_bytes"] > record["tail_bytes"] + 0.1 * case.shape.full_bytes
    assert record["share_of_copy"] == pytest.approx(record["floor_us"] / 2.0, rel=1e-3)
    others = {"device": "some GPU", "flashinfer_us": 30.0}
    row = serving_table.decode_schedule([record | others, record | {"device": "other", "us": None}]).splitlines()[-1]
    assert row.startswith("| 2 | 400 | 30% | 5 | 2 |")
    assert row.endswith("| 30 | 15.0x |")


def test_leverage_is_timed_as_it_is() -> None:
    values = torch.randn(1, 2, 70, 16, device=DEVICE)
    runs = {name: run for name, (run, _) in leverage.cases(values).items()}
    for name in ("leverage", "distances"):
        torch.testing.assert_close(runs[name](), runs["leverage, plain PyTorch"](), rtol=0.02, atol=0.01)


def test_rotation_is_timed_as_it_is() -> None:
    given = torch.randn(1, 2, 70, 16, device=DEVICE)
    kernel, twin = (run() for run, _ in rotation.cases(given).values())
    assert torch.equal(kernel, twin)


def test_a_row_of_leverage() -> None:
    record = {"device": "some GPU", "tokens": 4096, "heads": 8, "dim": 128, "what": "distances", "ms": 0.0312}
    record |= {"floor_ms": 0.0101, "launches": 1, "extra_mib": 0.5}
    assert tables.values([record]).splitlines()[-1] == "| 4,096 | distances | 31 | 10 | 1 | 0.5 |"
