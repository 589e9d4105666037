"""Draw an alignment: networks side by side, matched layers joined, neutral ones hollow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError
from .files import write_atomically
from .ir import Alignment, SegmentAlignment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _ROW, _GAP = 4.2, 0.42, 0.35  # inches: a network's column, a layer, between segments
_MATCHED, _INSERTED = "#dce9f5", "#ffffff"


def draw(alignment: Alignment, path: str | os.PathLike[str]) -> None:
    """Write the picture of an alignment.

    Each column is a network, each band a segment. Filled boxes are layers of the network, dashed
    ones neutral layers to be inserted; lines join matched layers, darker the more alike they are.

    Args:
        alignment: What to draw.
        path: A file ending in .png, .svg or .pdf.

    Raises:
        ArgumentError: If the ending is another.
    """
    from matplotlib.figure import Figure  # half a second to import, so only where it is needed

    target = Path(path)
    if target.suffix not in (".png", ".svg", ".pdf"):
        raise ArgumentError(
            f"a picture with the ending '{target.suffix}'",
            where=str(target),
            expected="a path that ends in .png, .svg or .pdf",
            do="choose one of these formats",
        )
    rows = sum(len(s.slots[0]) for s in alignment.segments)
    height = 0.9 + rows * _ROW + len(alignment.segments) * _GAP
    figure = Figure(figsize=(1.4 + _WIDTH * len(alignment.names), height), layout="constrained")
    axes = figure.add_subplot()
    _draw_all(axes, alignment, height)
    write_atomically(target, lambda temporary: figure.savefig(temporary, dpi=110))


def _draw_all(axes: Axes, alignment: Alignment, height: float) -> None:
    count = len(alignment.names)
    for k, name in enumerate(alignment.names):
        axes.text(k * _WIDTH + 1.5, 0.1, name, ha="center", va="center", weight="bold", size=11)
    y = -0.45
    for segment in alignment.segments:
        bottom = y - len(segment.slots[0]) * _ROW
        axes.axhspan(bottom, y, color="#f6f6f2", zorder=0)
        axes.text(-0.25, (y + bottom) / 2, segment.label, ha="right", va="center", size=9)
        for i in range(len(segment.slots[0])):
            _draw_slot(axes, segment, i, y - (i + 0.5) * _ROW)
        y = bottom - _GAP
    axes.set_xlim(-1.7, (count - 1) * _WIDTH + 3.2)
    axes.set_ylim(y, 0.4)
    axes.axis("off")


def _draw_slot(axes: Axes, segment: SegmentAlignment, slot: int, y: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    for k, row in enumerate(segment.slots):
        name, x = row[slot], k * _WIDTH
        style: dict[str, Any] = {"facecolor": _MATCHED, "edgecolor": "#4a6a8a", "linewidth": 1.0}
        if name is None:
            style = {"facecolor": _INSERTED, "edgecolor": "#999999", "linestyle": "--"}
        shape = "round,pad=0.02,rounding_size=0.08"
        height = _ROW * 0.62
        axes.add_patch(FancyBboxPatch((x, y - height / 2), 3.0, height, boxstyle=shape, **style))
        text, colour = (name, "#1b2a38") if name is not None else ("neutral, inserted", "#999999")
        axes.text(x + 1.5, y, text, ha="center", va="center", size=9, color=colour)
    for k in range(len(segment.slots) - 1):
        pair = [segment.slots[j][slot] for j in (k, k + 1)]
        if None not in pair:
            _join(axes, segment, slot, k, y)


def _join(axes: Axes, segment: SegmentAlignment, slot: int, k: int, y: float) -> None:
    other = k + 1 if segment.reference != k + 1 else k
    cost = segment.cost_of(other, slot)
    alike = 1.0 if cost is None else max(0.0, 1.0 - cost)
    left, right = k * _WIDTH + 3.05, (k + 1) * _WIDTH - 0.05
    axes.plot([left, right], [y, y], color="#b04a2f", alpha=0.25 + 0.75 * alike**2, linewidth=2)
    if cost is not None:
        label = f"{cost:.3f}"
        axes.text((left + right) / 2, y + 0.1, label, ha="center", va="bottom", size=7.5)
