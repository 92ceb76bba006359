"""The tables of serving, from the records of `serving` (servers under load) and of `decode_schedule` (a step)."""

from __future__ import annotations

import re

from .tables import Record, grid, machine

SERVERS = {"sglang-16bit": "SGLang, 16 bits", "sglang-fp8": "SGLang, fp8", "rdkv": "rdkv"}


def serving(records: list[Record]) -> str:
    """Servers one below the other for each load."""
    latest = {(r["device"], r["layers"], r.get("load", ""), r["server"], r["budget"]): r for r in records}
    head = ["prompt", "answer", "requests", "a second", "server", "at once", "tokens a second", "while most decode"]
    head += ["first token ms", "between tokens ms", "99% ms"]
    order = list(SERVERS)
    ordered = sorted(latest.values(), key=lambda r: (_load(r), order.index(r["server"])))
    return machine(records) + grid(head, map(_row, ordered))


def _load(record: Record) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", record.get("load", "")))


def _row(record: Record) -> list[str]:
    def figure(name: str, form: str) -> str:
        return format(record[name], form) if name in record else "not measured"

    given, made, rest = record["load"].split("x")
    requests, _, rate = rest.partition("@")
    server = SERVERS[record["server"]] + (f", {100 * record['budget']:g}%" if record["budget"] else "")
    cells = [f"{int(given):,}", f"{int(made):,}", requests, "all at once" if rate == "inf" else rate, server]
    cells += [str(record["most_running"]), figure("output_throughput", ",.0f"), figure("decode_throughput", ",.0f")]
    return [*cells, *(figure(name, ",.1f") for name in ("median_ttft_ms", "median_itl_ms", "p99_itl_ms"))]


def decode_schedule(records: list[Record]) -> str:
    """Steps of one layer by the length of the answers so far."""
    latest = {(r["device"], r["batch"], r["tokens"], r["mix"], r["budget"], r["tail"]): r for r in records}
    head = ["prompts", "tokens", "budget", "new tokens each", "µs", "floor µs", "of copy rate"]
    head += ["FlashInfer µs", "faster"]

    def row(record: Record) -> list[str]:
        cells = [str(record["batch"]), f"{record['tokens']:,}", f"{100 * record['budget']:g}%", f"{record['tail']:,}"]
        cells += [f"{record['us']:.0f}", f"{record['floor_us']:.0f}", f"{100 * record['share_of_copy']:.0f}%"]
        full = record["flashinfer_us"]
        return [*cells, f"{full:,.0f}" if full else "not timed", f"{full / record['us']:.1f}x" if full else ""]

    return machine(records) + grid(head, map(row, (r for r in latest.values() if r["us"])))
