"""The picture of an inspection: bits over tokens and heads, key bits over channels, score curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .inspection import Inspection

PINNED = 17  # one past the widest level: its own colour
COLUMNS = 1000  # about as many as the picture has pixels across
CURVES = 5


def draw(inspection: Inspection, path: str | Path, title: str) -> None:
    """Write a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg", force=True)
    from matplotlib import pyplot

    height = min(4 + inspection.value_bits.shape[0] / 12, 14)
    figure = pyplot.figure(figsize=(12, height + 3.5), layout="constrained")
    try:
        grid = figure.add_gridspec(2, 2, width_ratios=[4, 1], height_ratios=[height, 3.5])
        figure.suptitle(title)
        _bits(figure, figure.add_subplot(grid[0, 0]), _value_levels(inspection), inspection, "value bits", "token")
        _bits(figure, figure.add_subplot(grid[0, 1]), inspection.key_bits.long(), inspection, "key bits", "channel")
        _curves(figure.add_subplot(grid[1, :]), inspection)
        figure.savefig(path, dpi=110, format="png")
    finally:
        pyplot.close(figure)


def _value_levels(inspection: Inspection) -> Tensor:
    levels = inspection.value_bits.long().masked_fill(inspection.pinned, PINNED)
    return bins(levels, COLUMNS)


def bins(rows: Tensor, columns: int) -> Tensor:
    """Maximum over runs of neighbours, so that ``[R, T]`` becomes at most ``columns`` wide and no peak is lost."""
    width = -(-rows.shape[1] // columns)
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % width), value=0)
    return padded.reshape(rows.shape[0], -1, width).amax(-1)


def _bits(figure: Any, axes: Any, levels: Tensor, inspection: Inspection, title: str, unit: str) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap

    present = sorted(set(torch.unique(levels).tolist()) | {0})
    # Dark to bright by rank, not by width: 2 and 4 bits would otherwise look alike beside 16.
    colours = [colormaps["viridis"](i / max(1, len(present) - 1)) for i in range(len(present))]
    ranks = torch.searchsorted(torch.tensor(present), levels)
    norm = BoundaryNorm([i - 0.5 for i in range(len(present) + 1)], len(present))
    tokens = inspection.prompt_tokens if unit == "token" else levels.shape[1]
    rows = levels.shape[0]
    image = axes.imshow(
        ranks.numpy(), aspect="auto", interpolation="nearest", cmap=ListedColormap(colours), norm=norm,
        extent=(0, tokens, rows / inspection.heads, 0),
    )  # fmt: skip
    axes.set(title=title, xlabel=unit, ylabel=f"layer ({inspection.heads} heads each)")
    bar = figure.colorbar(image, ax=axes, ticks=range(len(present)), shrink=0.6)
    bar.set_ticklabels(["pinned" if level == PINNED else str(level) for level in present])


def _curves(axes: Any, inspection: Inspection) -> None:
    layers = inspection.token_scores.shape[0] // inspection.heads
    by_layer = inspection.token_scores.reshape(layers, inspection.heads, -1)
    # Only ratios matter to an allocator: each head counts by its shares.
    shares = (by_layer / by_layer.sum(-1, keepdim=True).clamp_min(1e-30)).mean(1)
    curves = bins(shares, COLUMNS)
    positions = torch.arange(curves.shape[1]) * (inspection.prompt_tokens / curves.shape[1])
    chosen = sorted({round(i * (layers - 1) / (CURVES - 1)) for i in range(CURVES)})
    for layer in chosen:
        positive = curves[layer].masked_fill(curves[layer] <= 0, float("nan"))
        axes.plot(positions.numpy(), positive.numpy(), linewidth=0.8, label=f"layer {layer}")
    axes.set(title="token scores, mean over heads", xlabel="token", ylabel="share", yscale="log")
    axes.set_xlim(0, inspection.prompt_tokens)
    axes.legend(ncols=len(chosen), fontsize="small", loc="upper center")
