"""How many tokens and key columns a budget's bytes hold at the widths of a mix, with nothing to pack."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdkv.kernels.packed import BLOCK, PINNED_START, VALUE_EXPONENT, HostCounts, blocks, row_sizes

MEASURED = Path(__file__).resolve().parents[1] / "results" / "bit-mix-smollm2.json"
MIXES = ("smollm2", "2bit", "4bit", "16bit")
SPREAD = 0.2  # of the tokens that heads keep
Shares = tuple[tuple[Any, float], ...]


@dataclass(frozen=True)
class Mix:
    """Widths of the kept tokens and of the key channels.

    Attributes:
        values: width and share of coded tokens.
        profiles: widths of groups of channels and share of the heads; each group is as large as any other.
        pinned: pinned tokens of a head.
        everything: all tokens are kept, whatever the budget.
        raw: nothing is quantised, and every token kept is in the 16-bit zone.
        lengths: tokens that a head keeps over the mean of its layer: the least, each tenth of the heads, the most.
    """

    values: Shares
    profiles: Shares
    pinned: int = 0
    everything: bool = False
    raw: bool = False
    lengths: tuple[float, ...] = ()


def make_mix(name: str, budget: float) -> Mix:
    """The mix called ``name``; `MEASURED` at the budget nearest to ``budget`` for ``smollm2``."""
    if name == "16bit":
        return Mix((), (), raw=True)
    if name in ("2bit", "4bit"):
        bits = int(name[0])
        return Mix(((bits, 1.0),), (((bits,), 1.0),), everything=name == "4bit")
    record = json.loads(MEASURED.read_text())
    entry = record["budgets"][min(record["budgets"], key=lambda b: abs(float(b) - budget))]
    widths, profiles = entry["value_widths"], entry["key_profiles"]
    values = tuple((int(width), share) for width, share in widths.items() if width != "pinned")
    groups = tuple((tuple(map(int, profile.split(","))), share) for profile, share in profiles.items())
    pinned = round(widths.get("pinned", 0.0) * entry["kept"] * record["tokens"])
    return Mix(values, groups, pinned, lengths=tuple(entry["kept_over_layer_mean_deciles"]))


@dataclass(frozen=True)
class Sizes:
    """What a prompt packs to, on the host: every row's counts, the widths of its key channels, and bytes.

    Attributes:
        counts: columns of `Packed.counts` but the exponents.
        key_widths: ``R`` lists of ``D`` widths.
        nbytes: bytes held, those of positions included.
    """

    counts: HostCounts
    key_widths: list[list[int]]
    nbytes: int


def plan_sizes(rows: int, dim: int, tokens: int, budget: float, mix: Mix, spread: float | None, seed: int = 0) -> Sizes:
    """Sizes of ``rows`` heads that together hold ``budget`` of their full bytes.

    Args:
        spread: heads keep evenly spread numbers of tokens, up to this share more or fewer than the mean;
            None for the mix's ``lengths`` (if it has none, `SPREAD`).

    Raises:
        ValueError: the budget does not hold a single token a head.
    """
    draw = random.Random(seed)
    ratios = [1.0] * rows if mix.everything else _ratios(rows, mix, spread)
    draw.shuffle(ratios)
    key_widths = _key_widths(rows, dim, mix, draw)
    columns = [_columns(widths) for widths in key_widths]

    def sized(mean: float) -> Sizes:
        kept = [min(tokens, round(mean * ratio)) for ratio in ratios]
        counts = tuple(_counts(n, c, mix) for n, c in zip(kept, columns, strict=True))
        return Sizes(counts, key_widths, sum(row_bytes(row, dim, tokens, mix.raw) for row in counts))

    if mix.everything:
        return sized(tokens)
    full, low, high = budget * rows * tokens * 4 * dim, 0.0, float(tokens)
    for _ in range(32):
        middle = (low + high) / 2
        low, high = (middle, high) if sized(middle).nbytes <= full else (low, middle)
    if low < 1:
        raise ValueError(f"{budget:g} of {tokens} tokens does not hold a token a head")
    return sized(low)


def _ratios(rows: int, mix: Mix, spread: float | None) -> list[float]:
    """Tokens of each row over the mean."""
    steps = [(row + 0.5) / rows for row in range(rows)]
    if spread is None and mix.lengths:
        last = len(mix.lengths) - 1
        at = [(int(step * last), step * last % 1) for step in steps]
        return [mix.lengths[i] * (1 - part) + mix.lengths[i + 1] * part for i, part in at]
    width = SPREAD if spread is None else spread
    return [1 + width * (2 * step - 1) for step in steps]


def _key_widths(rows: int, dim: int, mix: Mix, draw: random.Random) -> list[list[int]]:
    """Widths of the channels of each row: profiles in proportion to their shares, at random channels."""
    ordered = sorted(mix.profiles, key=lambda entry: sum(entry[0]) / len(entry[0]))
    total, result = sum(share for _, share in ordered), []
    for row in range(rows):
        left = total * (row + 0.5) / rows
        profile: tuple[int, ...] = (0,)
        for profile, share in ordered:  # noqa: B007
            left -= share
            if left < 0:
                break
        widths = [profile[channel * len(profile) // dim] for channel in range(dim)]
        draw.shuffle(widths)
        result.append(widths)
    draw.shuffle(result)
    return result


def _columns(widths: list[int]) -> tuple[int, int]:
    """Words of an octet's keys, and nibbles."""
    nibbles = sum(width // 4 for width in widths) // BLOCK * BLOCK
    return blocks(sum(widths) // 2) * BLOCK, nibbles


def _counts(kept: int, columns: tuple[int, int], mix: Mix) -> tuple[int, ...]:
    """Tokens, those of at least 4, 8, 16 bits, pinned tokens, words of an octet's keys, nibbles."""
    if mix.raw:
        return 0, 0, 0, 0, kept, 0, 0
    pinned = min(mix.pinned, kept)
    coded, total = kept - pinned, sum(share for _, share in mix.values)
    at_least = [round(coded * sum(s for w, s in mix.values if w >= least) / total) for least in (4, 8, 16)]
    return coded, *at_least, pinned, *(columns if coded else (0, 0))


def row_bytes(counts: tuple[int, ...], dim: int, tokens: int, raw: bool) -> int:
    """Bytes of a row of `Packed` and of its positions."""
    keys, values, columns, coded, pinned = row_sizes(counts, dim)
    kept, apart = (pinned, 0) if raw else (coded, pinned)
    positions = -(-tokens // 8) + -(-kept // 4) + 4 * apart
    tables = 4 * (VALUE_EXPONENT + 1) + 8 * (PINNED_START + 1)
    return 2 * (keys + values + columns) + 4 * coded + 4 * dim * (pinned + 1) + tables + positions
