"""Draw an alignment: networks side by side, matched layers joined, added or lost ones marked."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_text
from .pictures import require_picture, save_figure
from .scene import SMALL, TEXT, Box, Line, Scene, lay_out
from .svg import BOXES, CHAIN, MUTED, TEXTS, clean, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .ir import Alignment

_SCREEN = 96  # pixels of a scene per inch
_ENDS = {"start": "left", "middle": "center", "end": "right"}


def draw(
    alignment: Alignment,
    path: str | os.PathLike[str],
    removed: Sequence[Collection[str]] = (),
) -> None:
    """Write the picture of an alignment.

    Each column is a network, each band a segment. Filled boxes are layers of the network with their
    width at the right, dashed ones neutral layers to be inserted; lines join matched layers, with
    the cost of the match, blue and thick where they are alike.

    Args:
        alignment: What to draw.
        path: A file ending in .png, .svg or .pdf.
        removed: Per network, the names of the layers that are merged away instead of the others
            getting neutral ones, as in `Report.removed`.

    Raises:
        ArgumentError: If the ending is another.
    """
    target = require_picture(path)
    scene = lay_out(alignment, removed)
    if target.suffix == ".svg":
        label = "alignment of " + " and ".join(alignment.names)
        text = '<?xml version="1.0" encoding="UTF-8"?>\n' + _paper(scene, label)
        write_text(target, text)
    else:
        _save(scene, target)


def _paper(scene: Scene, label: str) -> str:
    head, _, rest = render(scene, label).partition("\n")
    return f'{head}\n<rect width="100%" height="100%" fill="#ffffff"/>\n{rest}\n'


def _save(scene: Scene, target: Path) -> None:
    from matplotlib.figure import Figure  # half a second to import, so only where it is needed

    figure = Figure(figsize=(scene.width / _SCREEN, scene.height / _SCREEN))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, scene.width)
    axes.set_ylim(scene.height, 0)
    axes.axis("off")
    for line in scene.lines:
        _draw_line(axes, line)
    for box in scene.boxes:
        _draw_box(axes, box)
    for text in scene.texts:
        size, weight, ink = TEXTS[text.kind]
        style: Any = {"size": _points(size), "color": ink, "weight": weight or "normal"}
        place: Any = {"ha": _ENDS[text.anchor], "va": "center_baseline", "zorder": 4}
        axes.text(text.x, text.y, clean(text.text), parse_math=False, **style, **place)
    save_figure(figure, target, dpi=144)


def _points(pixels: float) -> float:
    return pixels * 72 / _SCREEN


def _draw_line(axes: Axes, line: Line) -> None:
    width, colour = _points(line.thickness), line.colour or CHAIN
    axes.plot([line.x1, line.x2], [line.y1, line.y2], color=colour, linewidth=width, zorder=2)


def _draw_box(axes: Axes, box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch

    fill, outline, dashes, ink = BOXES[box.kind]
    radius = 0 if box.kind == "chip" and not box.text else 5
    patch = FancyBboxPatch(
        (box.x, box.y),
        box.width,
        box.height,
        boxstyle=f"round,pad=0,rounding_size={radius}",
        facecolor=box.fill or fill,
        edgecolor=outline,
        linewidth=_points(1),
        linestyle="--" if dashes else "-",
        zorder=1 if box.kind == "band" else 3,
    )
    axes.add_patch(patch)
    y = box.y + box.height / 2
    style: Any = {"va": "center_baseline", "zorder": 4, "parse_math": False}
    if box.text:
        size = _points(SMALL if box.kind in ("chip", "inserted") else TEXT)
        x = box.x + (box.width - (40 if box.note else 0)) / 2
        axes.text(x, y, clean(box.text), ha="center", size=size, color=ink, **style)
    if box.note:
        x, size = box.x + box.width - 8, _points(SMALL)
        axes.text(x, y, box.note, ha="right", size=size, color=MUTED, **style)
