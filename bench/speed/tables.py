"""The tables of docs/performance.md, in Markdown, each from the records of one kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rdkv.plugins.rdkv.format import KEY_WIDTHS, VALUE_WIDTHS

Record = dict[str, Any]
MACHINE = ("device", "torch", "triton", "flashinfer", "transformers", "python")
LAYER = ("device", "mix", "spread", "heads", "group", "dim")  # what a table of decode steps is about
CASE = (*LAYER, "tokens", "batch", "budget")


def grid(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table, figures on the right."""
    lines = [head, ["---:"] * len(head), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def machine(records: list[Record]) -> str:
    """One line for each machine and copy bandwidth of the records."""
    lines = []
    for record in records:
        words = [f"{name} {record[name]}" if name != "device" else record[name] for name in MACHINE if record.get(name)]
        lines.append(", ".join(words) + ".")
    return "\n".join(dict.fromkeys(lines)) + "\n\n"


def attention(records: list[Record]) -> str:
    """Decode steps, a table for each mix, layer and machine."""
    latest: dict[tuple[Any, ...], Record] = {}
    for record in records:
        latest[tuple(record[name] for name in CASE)] = record
    tables: dict[tuple[Any, ...], list[Record]] = {}
    for key, record in latest.items():
        tables.setdefault(key[: len(LAYER)], []).append(record)
    return "\n".join(_attention_table(found) for found in tables.values())


def _attention_table(records: list[Record]) -> str:
    first = records[0]
    spread = "as measured" if first["spread"] is None else f"±{100 * first['spread']:g}%"
    rates = sorted({f"{r['copy_bytes_per_s'] / 1e12:.2f} TB/s ({r['copy_by']})" for r in records})
    title = f"Mix {first['mix']}; {first['heads']} KV heads of {first['dim']} channels, "
    title += f"{first['group']} query heads each; "
    title += f"tokens of a head {spread}; copies at {', '.join(rates)}. "
    head = ["tokens", "batch", "budget", "held", "kept a head", "µs", "floor µs", "of copy rate"]
    head += ["FlashInfer µs", "faster", "sdpa µs", "faster"]
    ordered = sorted(records, key=lambda r: (-r["tokens"], r["batch"], r["budget"] or 2.0))
    return title + machine(records) + grid(head, map(_attention_row, ordered)) + _reasons(ordered)


def _attention_row(record: Record) -> list[str]:
    budget = "all tokens" if record["budget"] is None else f"{100 * record['budget']:g}%"
    row = [f"{record['tokens']:,}", str(record["batch"]), budget]
    if record["us"] is None:
        row += ["", "", "not timed", "", ""]
    else:
        row += [f"{100 * record['held_of_full']:.2f}%", f"{record['kept']:,.0f}", f"{record['us']:,.1f}"]
        row += [f"{record['floor_us']:,.1f}", f"{100 * record['share_of_copy']:.0f}%"]
    for name in ("flashinfer", "sdpa"):
        us = record.get(f"{name}_us")
        row += [f"{us:,.0f}" if us else "not timed", f"{us / record['us']:.1f}x" if us and record["us"] else ""]
    return row


def _reasons(records: list[Record]) -> str:
    """Why something was not timed, once for each reason."""
    found = {str(r.get(f"{who}reason") or "") for r in records for who in ("", "flashinfer_", "sdpa_")} - {""}
    return "".join(f"\nNot timed: {reason}\n" for reason in sorted(found))


def compress(records: list[Record]) -> str:
    """Prefills with a plain cache and with a compressed one."""
    latest = {(r["device"], r["layers"], r["tokens"], r["budget"]): r for r in records}
    head = ["tokens", "layers", "budget", "plain s", "compressed s", "ms a layer", "longer by", "own clock"]
    head += ["peak GB", "compressed peak GB", "cache GB", "compressed cache GB", "runs"]

    def row(record: Record) -> list[str]:
        sizes = [record[n] / 1e9 for n in ("plain_peak_bytes", "compressed_peak_bytes", "full_bytes", "held_bytes")]
        cells = [f"{record['tokens']:,}", str(record["layers"]), f"{100 * record['budget']:g}%"]
        cells += [f"{record['plain_s']:.3f}", f"{record['compressed_s']:.3f}", f"{record['ms_per_layer']:.2f}"]
        cells += [f"{100 * record['share']:.1f}%", f"{100 * record['own_share']:.1f}%"]
        return [*cells, *(f"{size:.3f}" for size in sizes), str(record["runs"])]

    return machine(records) + grid(head, map(row, sorted(latest.values(), key=lambda r: r["tokens"])))


def engine(records: list[Record]) -> str:
    """The engine from the prompt to the last token, beside full caches."""
    latest = {(r["device"], r["layers"], r["tokens"], r["batch"], r["budget"]): r for r in records}
    head = ["tokens", "batch", "budget", "prefill s", "first token s", "transformers prefill s", "peak GB"]
    head += ["transformers peak GB", "ms a step", "weights alone ms", "full cache ms", "transformers ms"]
    head += ["tokens a second", "full cache tokens a second", "decode peak GB"]

    def row(record: Record) -> list[str]:
        def figure(name: str, form: str, unit: float = 1.0) -> str:
            return format(record[name] / unit, form) if name in record else "not measured"

        cells = [f"{record['tokens']:,}", str(record["batch"]), f"{100 * record['budget']:g}%"]
        cells += [figure(f"{who}_s", ".3f") for who in ("ours_prefill", "ours_first_token", "transformers_prefill")]
        cells += [figure(f"{who}_prefill_peak_bytes", ".2f", 1e9) for who in ("ours", "transformers")]
        cells += [figure(f"{who}_ms", ".2f") for who in ("ours", "floor", "full", "transformers")]
        for name in ("ours_ms", "full_ms"):
            cells.append(f"{1000 * record['batch'] / record[name]:,.0f}" if name in record else "not measured")
        return [*cells, figure("ours_decode_peak_bytes", ".2f", 1e9)]

    ordered = sorted(latest.values(), key=lambda r: (r["tokens"], r["batch"]))
    reasons = {str(r.get(f"{who}_reason") or "") for r in ordered for who in ("ours", "floor", "full", "transformers")}
    why = "".join(f"\nNot measured: {reason}\n" for reason in sorted(reasons - {""}))
    return machine(records) + grid(head, map(row, ordered)) + why


def gemv(records: list[Record]) -> str:
    """Products of a decode step of one sequence, fused and apart."""
    latest = {(r["device"], r["name"], r["rows"], r["columns"]): r for r in records}
    head = ["product", "weights", "with", "µs", "floor µs", "of copy rate", "apart µs", "linear alone µs"]

    def row(record: Record) -> list[str]:
        cells = [record["name"], f"{record['rows']:,} x {record['columns']:,}", record["fused_with"]]
        cells += [f"{record['fused_us']:.1f}", f"{record['floor_us']:.1f}"]
        cells += [f"{100 * record['floor_us'] / record['fused_us']:.0f}%"]
        return [*cells, f"{record['apart_us']:.1f}", f"{record['linear_us']:.1f}"]

    return machine(records) + grid(head, map(row, latest.values()))


def bits(records: list[Record]) -> str:
    """Widths that real prompts got."""
    record = records[-1]
    of_values = ["pinned", *(str(width) for width in reversed(VALUE_WIDTHS) if width)]  # of tokens that are kept
    of_keys = [str(width) for width in reversed(KEY_WIDTHS)]
    head = ["budget", "tokens kept", *(f"values {width}" for width in of_values)]
    head += [*(f"keys {width}" for width in of_keys), "key columns a channel"]

    def row(budget: str, entry: Record) -> list[str]:
        shares = [entry["kept"], *(entry["value_widths"].get(width, 0.0) for width in of_values)]
        shares += [entry["key_widths"].get(width, 0.0) for width in of_keys]
        columns = entry["key_columns"] / record["head_dim"]
        return [f"{100 * float(budget):g}%", *(f"{100 * share:.1f}%" for share in shares), f"{columns:.2f}"]

    title = f"{record['model']}, {record['prompts']} prompts of {record['tokens']:,} tokens "
    title += f"({', '.join(record['tasks'])}), {record['layers']} layers of "
    title += f"{record['kv_heads']} KV heads of {record['head_dim']} channels.\n\n"
    budgets = sorted(record["budgets"].items(), key=lambda item: float(item[0]))
    return title + grid(head, (row(*item) for item in budgets))


def values(records: list[Record]) -> str:
    """What a layer's values go through takes: leverage, rotation."""
    latest = {(r["device"], r["tokens"], r["heads"], r["dim"], r["what"]): r for r in records}
    head = ["tokens", "what", "µs", "floor µs", "launches", "MiB besides"]

    def row(record: Record) -> list[str]:
        cells = [f"{record['tokens']:,}", record["what"]]
        cells += [f"{1e3 * record[name]:.0f}" for name in ("ms", "floor_ms")]
        return [*cells, str(record["launches"]), f"{record['extra_mib']:.1f}"]

    return machine(records) + grid(head, map(row, latest.values()))
