"""The picture of an alignment: networks side by side, matched layers joined, a band per segment.

`lay_out` decides what is drawn where. Its scene of boxes, lines and texts is rendered by `svg_of`,
with real text for any viewer and for the web page, or by matplotlib as .png and .pdf. Lengths are
pixels of a screen, and y grows downwards.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._checked import checked
from .._files import write_text
from ..ir import Alignment, SegmentAlignment
from ._shared import (
    GREY,
    INK,
    LAYER,
    LONGEST_NAME,
    MUTED,
    amount,
    clean,
    clipped,
    facts_of,
    layers_of,
    parameters_in,
    require_picture,
    save_figure,
    shades,
    split_prefix,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Removed = Sequence[Collection[str]]  # per network, the layers that are merged away or dropped

# --- the scene ------------------------------------------------------------------------------------

SLOT_HEIGHT, BOX_HEIGHT, CHIP_HEIGHT, CHIP_WIDTH = 27.0, 20.0, 16.0, 48.0
MARGIN = 24.0  # round everything
NETWORK_GAP, SEGMENT_GAP = 104.0, 14.0
PICTURE_HEAD, SEGMENT_HEAD, PREFIX_HEIGHT = 92.0, 30.0, 18.0
TEXT, SMALL = 12.0, 10.0  # heights of letters
LETTER_WIDTH = 0.62  # of a letter relative to its height; ample for common sans-serif fonts


@dataclass(frozen=True)
class Box:
    """A rectangle with a text in it.

    Attributes:
        x: Left edge.
        y: Upper edge.
        width: Its width.
        height: Its height.
        kind: What it shows: `band` (a segment), `layer`, `inserted`, `merged` or `chip` (a cost).
        text: Its text.
        note: A second text, at the right.
        facts: Lines to show when a pointer is over it.
        fill: Its colour, if it is not that of its kind.
    """

    x: float
    y: float
    width: float
    height: float
    kind: str
    text: str = ""
    note: str = ""
    facts: tuple[str, ...] = ()
    fill: str | None = None

    @property
    def middle(self) -> float:
        """Half its height."""
        return self.y + self.height / 2

    @property
    def text_x(self) -> float:
        """The middle of its text, left of the note."""
        return self.x + (self.width - (40 if self.note else 0)) / 2

    @property
    def text_size(self) -> float:
        """Height of the letters of its text."""
        return SMALL if self.kind in ("chip", "inserted") else TEXT

    @property
    def radius(self) -> int:
        """Of its corners; the chips of a scale of colours meet without any."""
        return 0 if self.kind == "chip" and not self.text else 5


@dataclass(frozen=True)
class Line:
    """A straight line of a kind: `chain`, or `pair` with its colour and thickness."""

    x1: float
    y1: float
    x2: float
    y2: float
    kind: str
    colour: str | None = None
    thickness: float = 1.0


@dataclass(frozen=True)
class Text:
    """A text of a kind (`title`, `label` or `note`) at its left, middle or right end."""

    x: float
    y: float
    text: str
    kind: str
    anchor: str = "start"


@dataclass(frozen=True)
class Scene:
    """A picture: bands lie behind lines, lines behind boxes, and texts before everything."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    texts: tuple[Text, ...]


def lay_out(alignment: Alignment, removed: Removed = ()) -> Scene:
    """Place everything that the picture of an alignment shows.

    Args:
        alignment: What to draw.
        removed: Per network, the layers that are merged away or dropped; without it, what a network
            lacks is inserted.
    """
    return _Layout(alignment, removed).scene()


class _Layout:
    """Collects the boxes, lines and texts of a scene, from top to bottom."""

    def __init__(self, alignment: Alignment, removed: Removed) -> None:
        self.alignment, self.removed = alignment, removed
        self.networks = range(len(alignment.names))
        self.largest_cost = largest_cost(alignment)
        self.names = [[split_prefix(row) for row in s.slots] for s in alignment.segments]
        letters = max(
            [len(clipped(name)) + 2 for name in alignment.names]
            + [len(text) for rows in self.names for _, names in rows for text in names]
            + [len(clipped(prefix)) - 2 for rows in self.names for prefix, _ in rows]
            + [len("merged away") + 1]
        )
        note = 46.0 if alignment.facts else 0.0
        self.column = letters * TEXT * LETTER_WIDTH + note + 16
        self.left = MARGIN + 12
        gaps = (len(self.networks) - 1) * NETWORK_GAP
        self.width = 2 * self.left + len(self.networks) * self.column + gaps
        self.boxes: list[Box] = []
        self.lines: list[Line] = []
        self.texts: list[Text] = []

    def scene(self) -> Scene:
        legend = self._legend() + MARGIN
        self.left += max(0.0, legend - self.width) / 2
        self.width = max(self.width, legend)
        for k in self.networks:
            self._network_head(k)
        y = MARGIN + PICTURE_HEAD
        for number, segment in enumerate(self.alignment.segments):
            y = self._segment(number, segment, y) + SEGMENT_GAP
        height = y - SEGMENT_GAP + MARGIN
        boxes, lines, texts = tuple(self.boxes), tuple(self.lines), tuple(self.texts)
        return Scene(self.width, height, boxes, lines, texts)

    def _x(self, k: int) -> float:
        """Return the left edge of a network's column."""
        return self.left + k * (self.column + NETWORK_GAP)

    def _middle(self, k: int) -> float:
        return self._x(k) + self.column / 2

    def _legend(self) -> float:
        """Say what colours and boxes mean; return how far to the right it goes."""
        x, y = MARGIN, MARGIN + 4
        if self.largest_cost is not None:
            self.texts.append(Text(x, y + 8, "cost: alike 0", "note"))
            self.texts.append(Text(x, y + 26, "1 \u2212 CKA, unless another was chosen", "note"))
            x += 84
            for i in range(16):
                fill, _ = shades(i / 15)
                self.boxes.append(Box(x + 6 * i, y, 6, CHIP_HEIGHT, "chip", fill=fill))
            x += 102
            self.texts.append(Text(x, y + 8, f"{self.largest_cost:.3g} unlike", "note"))
            x += 80
        inserted = any(inserted_layers(self.alignment, self.removed, k) for k in self.networks)
        kinds = [("inserted", "neutral layer, inserted")] if inserted else []
        kinds += [("merged", "merged away")] if any(self.removed) else []
        for kind, text in kinds:
            self.boxes.append(Box(x, y, 26, CHIP_HEIGHT, kind))
            self.texts.append(Text(x + 34, y + 8, text, "note"))
            x += 54 + len(text) * SMALL * LETTER_WIDTH
        if any(self.alignment.facts):
            text = "number: units, such as channels"
            self.texts.append(Text(x, y + 8, text, "note"))
            x += 20 + len(text) * SMALL * LETTER_WIDTH
        return x

    def _network_head(self, k: int) -> None:
        line = amount(len(layers_of(self.alignment, k)), "layer")
        parameters = parameters_in(self.alignment, k)
        line += f", {parameters} parameters" if parameters else ""
        name, x = clipped(self.alignment.names[k]), self._middle(k)
        self.texts.append(Text(x, MARGIN + 48, name, "title", "middle"))
        self.texts.append(Text(x, MARGIN + 66, line, "note", "middle"))

    def _segment(self, number: int, segment: SegmentAlignment, y: float) -> float:
        """Draw the band of a segment from `y` on; return where it ends."""
        slots, prefixes = len(segment.slots[0]), [prefix for prefix, _ in self.names[number]]
        top = y + SEGMENT_HEAD + (PREFIX_HEIGHT if any(prefixes) else 0)
        bottom = top + slots * SLOT_HEIGHT
        width = self.width - 2 * MARGIN
        self.boxes.append(Box(MARGIN, y, width, bottom - y + 8, "band"))
        counts = " + ".join(str(sum(n is not None for n in row)) for row in segment.slots)
        label = f"{number + 1}.  {segment.label}, {counts} layers"
        self.texts.append(Text(MARGIN + 12, y + 14, label, "label"))
        for k, prefix in enumerate(prefixes):
            x = self._middle(k)
            if prefix:
                text = clipped(prefix, LONGEST_NAME + 4)
                self.texts.append(Text(x, y + 33, text, "note", "middle"))
            if slots > 1:
                ends = top + SLOT_HEIGHT / 2, bottom - SLOT_HEIGHT / 2
                self.lines.append(Line(x, ends[0], x, ends[1], "chain"))
        for i in range(slots):
            self._slot(number, segment, i, top + (i + 0.5) * SLOT_HEIGHT)
        return bottom + 8

    def _slot(self, number: int, segment: SegmentAlignment, i: int, y: float) -> None:
        """Draw the layers of one slot, and the lines between them, around the height `y`."""
        kept = _kept(segment, i, self.removed)
        for k, row in enumerate(segment.slots):
            name = row[i]
            if name is None:
                if kept and self.alignment.takes_part(k):
                    beside = segment.slots[kept[0]][i]
                    facts = (f"neutral layer, inserted beside {beside}", self.alignment.names[k])
                    self._layer_box(k, y, "inserted", "inserted", facts)
                continue
            kind, text = "layer" if k in kept else "merged", self.names[number][k][1][i]
            layer = facts_of(self.alignment, k, name)
            note = "" if layer is None else str(layer.width)
            self._layer_box(k, y, kind, text, self._layer_facts(segment, k, i, name), note)
            if k != segment.reference and segment.slots[segment.reference][i] is not None:
                self._pair(segment, k, i, y)

    def _layer_box(
        self, k: int, y: float, kind: str, text: str, facts: tuple[str, ...], note: str = ""
    ) -> None:
        top = y - BOX_HEIGHT / 2
        box = Box(self._x(k), top, self.column, BOX_HEIGHT, kind, text, note, facts)
        self.boxes.append(box)

    def _layer_facts(self, segment: SegmentAlignment, k: int, i: int, name: str) -> tuple[str, ...]:
        lines = [name, self.alignment.names[k]]
        layer = facts_of(self.alignment, k, name)
        if layer is not None:
            made_of = layer.kind.rpartition(" [")[0] or layer.kind  # without its fingerprint
            units, parameters = amount(layer.width, "unit"), amount(layer.parameters, "parameter")
            lines += [f"{units}, {parameters}", made_of]
        cost, partner = segment.cost_of(k, i), segment.slots[segment.reference][i]
        if k != segment.reference and partner is not None:
            lines.append(f"matched with {partner}" + ("" if cost is None else f", cost {cost:.4g}"))
        if self.removed and name in self.removed[k]:
            lines.append("merged away")
        return tuple(lines)

    def _pair(self, segment: SegmentAlignment, k: int, i: int, y: float) -> None:
        """Join a layer with the one of the reference; the cost stands beside the former."""
        reference, cost = segment.reference, segment.cost_of(k, i)
        colour, thickness = None, 1.5
        if cost is not None and self.largest_cost is not None:
            share = cost / self.largest_cost
            fill, colour = shades(share)
            thickness = 4.0 - 2.5 * min(max(share, 0.0), 1.0)
            edge = self._x(k) if reference < k else self._x(k) + self.column + NETWORK_GAP
            x = edge - NETWORK_GAP / 2 - CHIP_WIDTH / 2
            facts = f"{segment.slots[reference][i]} and {segment.slots[k][i]}", f"cost {cost:.6g}"
            text = f"{cost:.3f}" if abs(cost) < 100 else f"{cost:.3g}"
            text = "<0.001" if 0 < cost < 0.0005 else text
            top = y - CHIP_HEIGHT / 2
            chip = Box(x, top, CHIP_WIDTH, CHIP_HEIGHT, "chip", text, "", facts, fill)
            self.boxes.append(chip)
        points = self._way(segment, i, y, *sorted((k, reference)))
        for (x1, y1), (x2, y2) in zip(points, points[1:]):
            self.lines.append(Line(x1, y1, x2, y2, "pair", colour, thickness))

    def _way(
        self, segment: SegmentAlignment, i: int, y: float, left: int, right: int
    ) -> list[tuple[float, float]]:
        """Return the corners of the line between two columns: below boxes that are inserted."""
        points, below = [(self._x(left) + self.column, y)], y + SLOT_HEIGHT / 2
        for j in range(left + 1, right):
            if segment.slots[j][i] is None:
                start, end = self._x(j), self._x(j) + self.column
                points += [(start - 20, y), (start - 6, below), (end + 6, below), (end + 20, y)]
        return [*points, (self._x(right), y)]


def inserted_layers(alignment: Alignment, removed: Removed, network: int) -> int:
    """Return how many neutral layers a network gets: one beside each layer that only others have.

    Layers that the others lose need none, nor does a network that is only heard.
    """
    return alignment.takes_part(network) * sum(
        name is None and bool(_kept(segment, i, removed))
        for segment in alignment.segments
        for i, name in enumerate(segment.slots[network])
    )


def _kept(segment: SegmentAlignment, slot: int, removed: Removed) -> list[int]:
    """Return the networks that have a layer in a slot and keep it."""
    names = [row[slot] for row in segment.slots]
    lost = removed or ((),) * len(names)
    return [k for k, name in enumerate(names) if name is not None and name not in lost[k]]


def largest_cost(alignment: Alignment) -> float | None:
    """Return the cost at the end of the colour scale: 1, or a larger one of a pair.

    None if no costs were measured.
    """
    costs = [
        segment.cost_of(k, i)
        for segment in alignment.segments
        for k, row in enumerate(segment.slots)
        for i in range(len(row))
        if k != segment.reference
    ]
    measured = [abs(cost) for cost in costs if cost is not None]
    return max([1.0, *measured]) if measured else None


# --- what boxes, lines and texts look like --------------------------------------------------------

FONT = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"
CHAIN = "#9aa7b4"


class BoxStyle(NamedTuple):
    """Colours of a box and of its text, and the dashes of its outline."""

    fill: str
    outline: str = "none"
    dashes: str = ""
    ink: str = INK


class TextStyle(NamedTuple):
    """Height, weight and colour of the letters of a text."""

    size: float
    weight: str
    ink: str


BOXES = {
    "band": BoxStyle("#f5f5f1"),
    "layer": BoxStyle(LAYER, "#47698c"),
    "inserted": BoxStyle("#ffffff", GREY, "4 3", MUTED),
    "merged": BoxStyle("#f3e3f3", "#8d4f8d", "2 2"),
    "chip": BoxStyle("#ffffff"),
}
TEXTS = {
    "title": TextStyle(15.0, "bold", INK),
    "label": TextStyle(TEXT, "bold", INK),
    "note": TextStyle(SMALL, "", MUTED),
}

# --- as SVG ---------------------------------------------------------------------------------------


def svg_of(scene: Scene, label: str) -> str:
    """Return a scene as an `<svg>` element.

    Colours are attributes, so that the style sheet of a page can overrule them by class: `fx-layer`
    and so on.

    Args:
        scene: What to draw.
        label: What it shows, for readers that cannot see it.
    """
    bands = [_svg_box(b) for b in scene.boxes if b.kind == "band"]
    boxes = [_svg_box(b) for b in scene.boxes if b.kind != "band"]
    parts = [*bands, *map(_svg_line, scene.lines), *boxes, *map(_svg_text, scene.texts)]
    size = f'width="{scene.width:g}" height="{scene.height:g}"'
    view = f'viewBox="0 0 {scene.width:g} {scene.height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} role="img"'
    label = _escaped(label)
    return "\n".join([f'{head} font-family="{FONT}" aria-label="{label}">', *parts, "</svg>"])


def _escaped(text: str) -> str:
    return escape(clean(text), quote=True)


def _svg_box(box: Box) -> str:
    style = BOXES[box.kind]
    dashes = f' stroke-dasharray="{style.dashes}"' if style.dashes else ""
    place = f'x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}"'
    colours = f'fill="{box.fill or style.fill}" stroke="{style.outline}"{dashes}'
    edges = "" if box.radius else ' shape-rendering="crispEdges"'  # no seams in a scale of colours
    inside = [f'<rect {place} rx="{box.radius}" {colours}{edges}/>']
    if box.text:
        size, ink = box.text_size, style.ink
        inside.append(_letters(box.text_x, box.middle, box.text, size, ink, "middle"))
    if box.note:
        x = box.x + box.width - 8
        inside.append(_letters(x, box.middle, box.note, SMALL, MUTED, "end", ' class="fx-note"'))
    title = f"<title>{_escaped(chr(10).join(box.facts))}</title>" if box.facts else ""
    return f'<g class="fx-{box.kind}">{title}{"".join(inside)}</g>'


def _svg_line(line: Line) -> str:
    place = f'x1="{line.x1:g}" y1="{line.y1:g}" x2="{line.x2:g}" y2="{line.y2:g}"'
    stroke = f'stroke="{line.colour or CHAIN}" stroke-width="{line.thickness:.3g}"'
    return f'<line class="fx-{line.kind}" {place} {stroke}/>'


def _svg_text(text: Text) -> str:
    size, weight, ink = TEXTS[text.kind]
    style = f' class="fx-{text.kind}"' + (f' font-weight="{weight}"' if weight else "")
    return _letters(text.x, text.y, text.text, size, ink, text.anchor, style)


def _letters(
    x: float, y: float, text: str, size: float, ink: str, anchor: str, style: str = ""
) -> str:
    """Return a `<text>` whose letters stand around the height `y`."""
    base = y + 0.36 * size  # half of a capital letter
    place = f'x="{x:g}" y="{base:g}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size:g}" fill="{ink}"{style}>{_escaped(text)}</text>'


# --- as a file ------------------------------------------------------------------------------------

_PIXELS_PER_INCH = 96
_ALIGNMENTS = {"start": "left", "middle": "center", "end": "right"}  # SVG's words as matplotlib's


@checked()
def draw(alignment: Alignment, path: str | os.PathLike[str], removed: Removed = ()) -> None:
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
        svg = svg_of(scene, description_of(alignment))
        head, _, rest = svg.partition("\n")
        paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
        write_text(target, f'<?xml version="1.0" encoding="UTF-8"?>\n{head}\n{paper}\n{rest}\n')
    else:
        _draw_by_matplotlib(scene, target)


def inline_svg(alignment: Alignment, removed: Removed = ()) -> str:
    """Return the picture of an alignment as a notebook shows it: on white, no wider than the page.

    Args:
        alignment: What to draw.
        removed: As for `lay_out`.
    """
    svg = svg_of(lay_out(alignment, removed), description_of(alignment))
    return f'<div style="background:#fff;overflow-x:auto">{svg}</div>'


def description_of(alignment: Alignment) -> str:
    """Say what the picture shows, for readers that cannot see it."""
    return "alignment of " + " and ".join(alignment.names)


def _draw_by_matplotlib(scene: Scene, target: Path) -> None:
    from matplotlib.figure import Figure  # half a second to import, so only where it is needed

    figure = Figure(figsize=(scene.width / _PIXELS_PER_INCH, scene.height / _PIXELS_PER_INCH))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, scene.width)
    axes.set_ylim(scene.height, 0)
    axes.axis("off")
    for line in scene.lines:
        width, colour = _points(line.thickness), line.colour or CHAIN
        axes.plot([line.x1, line.x2], [line.y1, line.y2], color=colour, linewidth=width, zorder=2)
    for box in scene.boxes:
        _draw_box(axes, box)
    for text in scene.texts:
        size, weight, ink = TEXTS[text.kind]
        style: Any = {"size": _points(size), "color": ink, "weight": weight or "normal"}
        _draw_text(axes, text.x, text.y, clean(text.text), _ALIGNMENTS[text.anchor], style)
    save_figure(figure, target, dpi=144)


def _draw_box(axes: Axes, box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = BOXES[box.kind]
    patch = FancyBboxPatch(
        (box.x, box.y),
        box.width,
        box.height,
        boxstyle=f"round,pad=0,rounding_size={box.radius}",
        facecolor=box.fill or style.fill,
        edgecolor=style.outline,
        linewidth=_points(1),
        linestyle="--" if style.dashes else "-",
        zorder=1 if box.kind == "band" else 3,
    )
    axes.add_patch(patch)
    if box.text:
        letters = {"size": _points(box.text_size), "color": style.ink}
        _draw_text(axes, box.text_x, box.middle, clean(box.text), "center", letters)
    if box.note:
        letters = {"size": _points(SMALL), "color": MUTED}
        _draw_text(axes, box.x + box.width - 8, box.middle, box.note, "right", letters)


def _draw_text(axes: Axes, x: float, y: float, text: str, side: str, style: Any) -> None:
    place: Any = {"ha": side, "va": "center_baseline", "zorder": 4}
    axes.text(x, y, text, parse_math=False, **place, **style)


def _points(pixels: float) -> float:
    return pixels * 72 / _PIXELS_PER_INCH
