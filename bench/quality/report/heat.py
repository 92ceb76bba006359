"""Heat maps of a plan's bits: pixels as a picture, and an SVG around them.

A report may have hundreds, for which a plotting library takes minutes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from matplotlib.image import imsave
from numpy.typing import NDArray

from .results import Point, Results
from .tables import PROTOCOL_NAMES

Map = Sequence[Sequence[float]]
ROW, POSITIONS_WIDTH, TOP, LEFT = 9, 420, 26, 46  # pixels
COLOURS = "viridis"


def heat_maps(results: Results, protocol: str, method: str, budget: float) -> str | None:
    """Mean value bits of a token, by layer and head and by layer and position; None without plans."""
    point = Point(protocol, method, budget)
    heads, positions = results.mean_map(point, "heads"), results.mean_map(point, "positions")
    if heads is None or positions is None:
        return None
    wide = min(320, max(60, 26 * len(heads[0])))
    height = max(120, ROW * len(heads))
    parts = [
        *_panel(heads, LEFT, wide, height, "by head", [str(head) for head in range(len(heads[0]))], "KV head"),
        *_panel(positions, LEFT + wide + 130, POSITIONS_WIDTH, height, "by position", ["start", "end"], "prompt"),
    ]
    size = f"0 0 {LEFT + wide + 130 + POSITIONS_WIDTH + 80} {TOP + height + 40}"
    title = escape(f"Bits of {method} at {100 * budget:g}%, {PROTOCOL_NAMES[protocol]}")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-size="11"><title>{title}</title>'
    return f"{head}{''.join(parts)}</svg>"


def _panel(table: Map, x: float, width: float, height: float, title: str, ticks: list[str], name: str) -> list[str]:
    """One map with its labels, and the scale of its colours beside it."""
    values = np.array(table)
    # One outlier, such as the part with the pinned first tokens, must not take all of the scale.
    top = max(float(np.quantile(values, 0.97)), 1e-3)
    layers, bottom, right = len(table), TOP + height, x + width + 10
    parts = [
        f'<text x="{x}" y="{TOP - 9}" font-weight="600">{title}</text>',
        _picture(values, top, x, TOP, width, height),
        _picture(np.linspace(top, 0, 64)[:, None], top, right, TOP, 10, height),
        *(_text(right + 14, y, label) for y, label in (
            (TOP + 8, f"{'≥ ' if values.max() > top else ''}{top:.1f} bits"), (bottom, "0"),
        )),
        *(_text(x - 6, TOP + (layer + 0.5) * height / layers + 4, str(layer), "end")
          for layer in range(0, layers, max(1, round(layers / 6)))),
    ]  # fmt: skip
    parts.append(_text(x + width / 2, bottom + 30, name, "middle"))
    if len(ticks) == 2 and ticks[0] == "start":
        return [*parts, _text(x, bottom + 15, ticks[0]), _text(x + width, bottom + 15, ticks[1], "end")]
    step = max(1, round(len(ticks) / 16))
    places = ((x + (i + 0.5) * width / len(ticks), label) for i, label in enumerate(ticks) if i % step == 0)
    layer_name = (
        f'<text transform="translate({x - 34} {TOP + height / 2}) rotate(-90)" text-anchor="middle">layer</text>'
    )
    return [*parts, layer_name, *(_text(at, bottom + 15, label, "middle") for at, label in places)]


def _picture(values: NDArray[np.float64], top: float, x: float, y: float, width: float, height: float) -> str:
    """A table as an image of one pixel a value, stretched."""
    stream = io.BytesIO()
    imsave(stream, values, vmin=0, vmax=top, cmap=COLOURS, format="png")
    data = base64.b64encode(stream.getvalue()).decode()
    place = f'x="{x}" y="{y}" width="{width}" height="{height}" preserveAspectRatio="none"'
    return f'<image {place} style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
