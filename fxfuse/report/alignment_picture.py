"""Lay out the picture of an alignment: boxes, lines and texts with places, before any file format.

Each column is a network, each band a segment, each row a slot. Lengths are pixels of a screen, and
y grows downwards. What is drawn where is decided here alone; `svg` and `display` only render it.

Write a scene as SVG: plain shapes and real text, readable by any viewer and by a web page.

Draw an alignment: networks side by side, matched layers joined, added or lost ones marked.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_text
from ..ir import Alignment, SegmentAlignment
from ._shared import clean, require_picture, safe, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


ROW, BOX = 27.0, 20.0  # a slot, and the height of a box in it


MARGIN, GAP, BETWEEN = 24.0, 104.0, 14.0  # round everything, between networks, between segments


HEAD, BAND, PREFIX = 92.0, 30.0, 18.0  # the head of the picture, of a segment, of a prefix


TEXT, SMALL = 12.0, 10.0


LETTER = 0.62  # mean width of a letter of common sans-serif fonts, relative to its size, and ample


LONGEST, ROOM = 38, 22  # letters of a name that are shown, and that need no shortening


CHIP = 48.0


_ALIKE, _MIDDLE, _UNLIKE = (154, 197, 232), (243, 239, 230), (240, 166, 120)  # fills of chips


_ALIKE_LINE, _MIDDLE_LINE, _UNLIKE_LINE = (38, 104, 172), (150, 142, 130), (200, 92, 32)


@dataclass(frozen=True)
class Box:
    """A rectangle with a text in it.

    Attributes:
        x: Left edge.
        y: Upper edge.
        width: Its width.
        height: Its height.
        kind: What it stands for: `band`, `layer`, `inserted`, `merged` or `chip`.
        text: Its text.
        note: A second text, at the right.
        facts: Lines to show when a pointer is over it.
        fill: Its colour, if its kind does not say it.
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
    """A picture: bands and lines lie behind boxes, texts before everything."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    texts: tuple[Text, ...]


def shades(share: float) -> tuple[str, str]:
    """Return the colours of a chip and of a line for a cost, as a share of the scale."""
    share = min(max(share, 0.0), 1.0)
    ramps = (_ALIKE, _MIDDLE, _UNLIKE), (_ALIKE_LINE, _MIDDLE_LINE, _UNLIKE_LINE)
    found = []
    for low, middle, high in ramps:
        a, b, t = (low, middle, 2 * share) if share < 0.5 else (middle, high, 2 * share - 1)
        found.append("#" + "".join(f"{round(p + (q - p) * t):02x}" for p, q in zip(a, b)))
    return found[0], found[1]


def shortened(names: Sequence[str | None]) -> tuple[str, list[str]]:
    """Split layer names into the prefix that all share, up to a dot, and what is left of each.

    Short names keep it. A name `a.b..a.c` is of a run of modules; its second half loses it too.

    Example:
        >>> shortened(["net.backbone.stage1.0.conv", None, "net.backbone.stage1.1.conv"])
        ('net.backbone.stage1.', ['0.conv', '', '1.conv'])
    """
    if max(len(n or "") for n in names) <= ROOM:
        return "", [n or "" for n in names]
    parts = [n.split("..")[0].split("@")[0].split(".") for n in names if n]
    same = 0
    if len(parts) > 1:
        while all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
            same += 1
    prefix = "".join(part + "." for part in parts[0][:same]) if parts else ""
    halves = [[h.removeprefix(prefix) for h in (n or "").split("..")] for n in names]
    return prefix, [clipped("..".join(h)) for h in halves]


def clipped(text: str, longest: int = LONGEST) -> str:
    """Cut the middle out of a text that is too long to show."""
    if len(text) <= longest:
        return text
    left = (longest - 1) // 3
    return f"{text[:left]}…{text[len(text) - (longest - 1 - left) :]}"


def count_of(number: int) -> str:
    """Return a number as one reads it in a table: 512, 4.6k, 11.7M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def lay_out(alignment: Alignment, removed: Sequence[Collection[str]] = ()) -> Scene:
    """Place everything that the picture of an alignment shows.

    Args:
        alignment: What to draw.
        removed: Per network, the layers that are merged away or dropped; without it, what a network
            lacks is inserted.
    """
    return _Layout(alignment, removed).scene()


class _Layout:
    def __init__(self, alignment: Alignment, removed: Sequence[Collection[str]]) -> None:
        self.alignment, self.removed = alignment, removed
        self.count = len(alignment.names)
        self.largest = scale_of(alignment)
        self.short = [[shortened(row) for row in s.slots] for s in alignment.segments]
        longest = max(
            [len(clipped(n)) + 2 for n in alignment.names]
            + [len(text) for rows in self.short for _, names in rows for text in names]
            + [len(clipped(p)) - 2 for rows in self.short for p, _ in rows]
            + [len("merged away") + 1]
        )
        note = 46.0 if alignment.facts else 0.0
        self.column = longest * TEXT * LETTER + note + 16
        self.left = MARGIN + 12
        self.width = 2 * self.left + self.count * self.column + (self.count - 1) * GAP
        self.boxes: list[Box] = []
        self.lines: list[Line] = []
        self.texts: list[Text] = []

    def scene(self) -> Scene:
        legend = self._legend() + MARGIN
        self.left += max(0.0, legend - self.width) / 2
        self.width = max(self.width, legend)
        for k in range(self.count):
            self._head(k)
        y = MARGIN + HEAD
        for at, segment in enumerate(self.alignment.segments):
            y = self._segment(at, segment, y) + BETWEEN
        height = y - BETWEEN + MARGIN
        boxes, lines, texts = tuple(self.boxes), tuple(self.lines), tuple(self.texts)
        return Scene(self.width, height, boxes, lines, texts)

    def x(self, k: int) -> float:
        return self.left + k * (self.column + GAP)

    def _legend(self) -> float:
        """Say what colours and boxes mean; return how far to the right it goes."""
        x, y = MARGIN, MARGIN + 4
        if self.largest is not None:
            self.texts.append(Text(x, y + 8, "cost: alike 0", "note"))
            x += 84
            for i in range(16):
                fill = shades(i / 15)[0]
                self.boxes.append(Box(x + 6 * i, y, 6, 16, "chip", fill=fill))
            x += 102
            self.texts.append(Text(x, y + 8, f"{self.largest:.3g} unlike", "note"))
            x += 80
        added = any(inserted(self.alignment, self.removed, k) for k in range(self.count))
        kinds = [("inserted", "neutral layer, inserted")] if added else []
        kinds += [("merged", "merged away")] if any(self.removed) else []
        for kind, text in kinds:
            self.boxes.append(Box(x, y, 26, 16, kind))
            self.texts.append(Text(x + 34, y + 8, text, "note"))
            x += 54 + len(text) * SMALL * LETTER
        return x

    def _head(self, k: int) -> None:
        names = [n for s in self.alignment.segments for n in s.slots[k] if n is not None]
        line = f"{len(names)} layers"
        if self.alignment.facts:
            known = self.alignment.facts[k]
            total = sum(known[n].parameters for n in names if n in known)
            line += f", {count_of(total)} parameters"
        x = self.x(k) + self.column / 2
        self.texts.append(Text(x, MARGIN + 48, clipped(self.alignment.names[k]), "title", "middle"))
        self.texts.append(Text(x, MARGIN + 66, line, "note", "middle"))

    def _segment(self, at: int, segment: SegmentAlignment, y: float) -> float:
        rows = len(segment.slots[0])
        top = y + BAND + (PREFIX if any(prefix for prefix, _ in self.short[at]) else 0)
        bottom = top + rows * ROW
        width = self.width - 2 * MARGIN
        self.boxes.append(Box(MARGIN, y, width, bottom - y + 8, "band"))
        counts = " + ".join(str(sum(n is not None for n in row)) for row in segment.slots)
        label = f"{at + 1}.  {segment.label}, {counts} layers"
        self.texts.append(Text(MARGIN + 12, y + 14, label, "label"))
        for k in range(self.count):
            prefix = self.short[at][k][0]
            if prefix:
                x = self.x(k) + self.column / 2
                self.texts.append(Text(x, y + 33, clipped(prefix, LONGEST + 4), "note", "middle"))
            x = self.x(k) + self.column / 2
            if rows > 1:
                self.lines.append(Line(x, top + ROW / 2, x, bottom - ROW / 2, "chain"))
        for i in range(rows):
            self._slot(at, segment, i, top + (i + 0.5) * ROW)
        return bottom + 8

    def _slot(self, at: int, segment: SegmentAlignment, i: int, y: float) -> None:
        kept = _kept(segment, i, self.removed)
        for k, row in enumerate(segment.slots):
            name = row[i]
            if name is None:
                if kept:
                    beside = segment.slots[kept[0]][i]
                    facts = (f"neutral layer, inserted beside {beside}", self.alignment.names[k])
                    self._box(k, y, "inserted", "inserted", facts)
                continue
            kind = "layer" if k in kept else "merged"
            note = self._note(k, name)
            self._box(k, y, kind, self.short[at][k][1][i], self._facts(segment, k, i), note)
            if k != segment.reference and segment.slots[segment.reference][i] is not None:
                self._pair(segment, k, i, y)

    def _box(
        self, k: int, y: float, kind: str, text: str, facts: tuple[str, ...], note: str = ""
    ) -> None:
        box = Box(self.x(k), y - BOX / 2, self.column, BOX, kind, text, note, facts)
        self.boxes.append(box)

    def _note(self, k: int, name: str) -> str:
        known = self.alignment.facts[k].get(name) if self.alignment.facts else None
        return "" if known is None else str(known.width)

    def _facts(self, segment: SegmentAlignment, k: int, i: int) -> tuple[str, ...]:
        name = str(segment.slots[k][i])
        lines = [name, self.alignment.names[k]]
        known = self.alignment.facts[k].get(name) if self.alignment.facts else None
        if known is not None:
            made_of = known.kind.rpartition(" [")[0] or known.kind  # without its fingerprint
            lines += [f"{known.width} units, {known.parameters:,} parameters", made_of]
        cost, other = segment.cost_of(k, i), segment.slots[segment.reference][i]
        if k != segment.reference and other is not None:
            lines.append(f"matched with {other}" + ("" if cost is None else f", cost {cost:.4g}"))
        if self.removed and name in self.removed[k]:
            lines.append("merged away")
        return tuple(lines)

    def _pair(self, segment: SegmentAlignment, k: int, i: int, y: float) -> None:
        """Join a layer with the one of the reference; the cost stands beside the former."""
        towards, cost = segment.reference, segment.cost_of(k, i)
        left, right = sorted((k, towards))
        colour, thickness = None, 1.5
        if cost is not None and self.largest is not None:
            share = cost / self.largest
            fill, colour = shades(share)
            thickness = 4.0 - 2.5 * min(max(share, 0.0), 1.0)
            at = self.x(k) - GAP / 2 if towards < k else self.x(k) + self.column + GAP / 2
            names = segment.slots[towards][i], segment.slots[k][i]
            facts = (f"{names[0]} and {names[1]}", f"cost {cost:.6g}")
            x = at - CHIP / 2
            text = f"{cost:.3f}" if abs(cost) < 100 else f"{cost:.3g}"
            text = "<0.001" if 0 < cost < 0.0005 else text
            self.boxes.append(Box(x, y - 8, CHIP, 16, "chip", text, "", facts, fill))
        ends = self.x(left) + self.column, self.x(right)
        self.lines.append(Line(ends[0], y, ends[1], y, "pair", colour, thickness))


def inserted(alignment: Alignment, removed: Sequence[Collection[str]], k: int) -> int:
    """Return how many neutral layers a network gets: beside layers that others keep."""
    return sum(
        row is None and bool(_kept(s, i, removed))
        for s in alignment.segments
        for i, row in enumerate(s.slots[k])
    )


def _kept(segment: SegmentAlignment, slot: int, removed: Sequence[Collection[str]]) -> list[int]:
    """Return the networks that have a layer in a slot and keep it."""
    names = [row[slot] for row in segment.slots]
    gone = removed or ((),) * len(names)
    return [k for k, name in enumerate(names) if name is not None and name not in gone[k]]


def scale_of(alignment: Alignment) -> float | None:
    """Return the cost that counts as fully unlike: 1, or the largest there is; None without any."""
    costs = [
        s.cost_of(k, i)
        for s in alignment.segments
        for k in range(len(s.slots))
        for i in range(len(s.slots[k]))
        if k != s.reference
    ]
    found = [abs(c) for c in costs if c is not None]
    return max([1.0, *found]) if found else None


FONT = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


INK, MUTED, CHAIN = "#1b2733", "#5d6873", "#9aa7b4"


# kind of box -> fill, outline, dashes, text
BOXES = {
    "band": ("#f5f5f1", "none", "", INK),
    "layer": ("#dce9f5", "#47698c", "", INK),
    "inserted": ("#ffffff", "#8b949d", "4 3", MUTED),
    "merged": ("#f3e3f3", "#8d4f8d", "2 2", INK),
    "chip": ("#ffffff", "none", "", "#1b2733"),
}


TEXTS = {"title": (15.0, "bold", INK), "label": (TEXT, "bold", INK), "note": (SMALL, "", MUTED)}


def render(scene: Scene, label: str) -> str:
    """Return a scene as an `<svg>` element.

    Colours are attributes, which a style sheet of a page overrules by class: `fx-layer` and so on.

    Args:
        scene: What to draw.
        label: What it shows, for readers that cannot see it.
    """
    bands = [_box(b) for b in scene.boxes if b.kind == "band"]
    boxes = [_box(b) for b in scene.boxes if b.kind != "band"]
    parts = [*bands, *map(_line, scene.lines), *boxes, *map(_text, scene.texts)]
    size = f'width="{scene.width:g}" height="{scene.height:g}"'
    view = f'viewBox="0 0 {scene.width:g} {scene.height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} role="img"'
    return "\n".join([f'{head} font-family="{FONT}" aria-label="{safe(label)}">', *parts, "</svg>"])


def _box(box: Box) -> str:
    fill, outline, dashes, ink = BOXES[box.kind]
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    place = f'x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}"'
    radius = 0 if box.kind == "chip" and not box.text else 5
    colours = f'fill="{box.fill or fill}" stroke="{outline}"{dash}'
    edges = "" if radius else ' shape-rendering="crispEdges"'  # no seams in a scale of colours
    inside = [f'<rect {place} rx="{radius}" {colours}{edges}/>']
    y = box.y + box.height / 2
    if box.text:
        size = SMALL if box.kind in ("chip", "inserted") else TEXT
        left = box.x + (box.width - (40 if box.note else 0)) / 2
        inside.append(_words(left, y, box.text, size, ink, "middle"))
    if box.note:
        inside.append(_words(box.x + box.width - 8, y, box.note, SMALL, MUTED, "end", "fx-note"))
    title = f"<title>{safe(chr(10).join(box.facts))}</title>" if box.facts else ""
    return f'<g class="fx-{box.kind}">{title}{"".join(inside)}</g>'


def _words(
    x: float,
    y: float,
    text: str,
    size: float,
    ink: str,
    anchor: str,
    kind: str = "",
    weight: str = "",
) -> str:
    style = f' class="{kind}"' if kind else ""
    style += f' font-weight="{weight}"' if weight else ""
    place = f'x="{x:g}" y="{y + 0.36 * size:g}" text-anchor="{anchor}"'  # 0.36: half a capital
    return f'<text {place} font-size="{size:g}" fill="{ink}"{style}>{safe(text)}</text>'


def _line(line: Line) -> str:
    place = f'x1="{line.x1:g}" y1="{line.y1:g}" x2="{line.x2:g}" y2="{line.y2:g}"'
    stroke = f'stroke="{line.colour or CHAIN}" stroke-width="{line.thickness:.3g}"'
    return f'<line class="fx-{line.kind}" {place} {stroke}/>'


def _text(text: Text) -> str:
    size, weight, ink = TEXTS[text.kind]
    return _words(text.x, text.y, text.text, size, ink, text.anchor, f"fx-{text.kind}", weight)


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
