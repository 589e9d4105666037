"""Write a scene as SVG: plain shapes and real text, readable by any viewer and by a web page."""

from __future__ import annotations

import re
from html import escape

from .scene import SMALL, TEXT, Box, Line, Scene, Text

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
_ILLEGAL = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    """Replace the characters that no XML may hold."""
    return _ILLEGAL.sub("\ufffd", text)


def safe(text: object) -> str:
    """Return a text that is safe inside and between tags."""
    return escape(clean(str(text)), quote=True)


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
