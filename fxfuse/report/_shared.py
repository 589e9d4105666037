"""What pictures and pages share: colours, short names and numbers, measured costs, files."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_atomically
from ..errors import ArgumentError
from ..ir import Alignment, LayerFacts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# --- colours --------------------------------------------------------------------------------------

INK, MUTED = "#1b2733", "#5d6873"  # of texts
ALIKE, UNLIKE = "#2668ac", "#c85c20"  # of lines and bars: a low cost, a high one
CHOSEN = "#c8281e"  # marks what was chosen among many
LAYER = "#dce9f5"  # fills the box of a layer
GREY = "#8b949d"  # of dashed lines

_FILLS = ((154, 197, 232), (243, 239, 230), (240, 166, 120))  # alike, halfway, unlike
_LINES = ((38, 104, 172), (150, 142, 130), (200, 92, 32))


def shades(share: float) -> tuple[str, str]:
    """Return the colours of a fill and of a line for a cost.

    Args:
        share: The cost relative to the largest, 0 to 1.
    """
    share = min(max(share, 0.0), 1.0)
    return _between(_FILLS, share), _between(_LINES, share)


def _between(ramp: tuple[tuple[int, int, int], ...], share: float) -> str:
    low, middle, high = ramp
    a, b, t = (low, middle, 2 * share) if share < 0.5 else (middle, high, 2 * share - 1)
    return "#" + "".join(f"{round(p + (q - p) * t):02x}" for p, q in zip(a, b))


# --- names and numbers ----------------------------------------------------------------------------

LONGEST_NAME, SHORT_NAME = 38, 22  # letters that are shown at most, and that need no shortening


def split_prefix(names: Sequence[str | None]) -> tuple[str, list[str]]:
    """Split layer names into the prefix that all share, up to a dot, and what is left of each.

    If all names are short, the prefix stays with them. A name `a.b..a.c` stands for the modules
    from one to another; both halves lose the prefix.

    Example:
        >>> split_prefix(["net.backbone.stage1.0.conv", None, "net.backbone.stage1.1.conv"])
        ('net.backbone.stage1.', ['0.conv', '', '1.conv'])
    """
    if max(len(name or "") for name in names) <= SHORT_NAME:
        return "", [name or "" for name in names]
    paths = [name.split("..")[0].split("@")[0].split(".") for name in names if name]
    shared = 0
    if len(paths) > 1:
        while all(len(p) > shared + 1 and p[shared] == paths[0][shared] for p in paths):
            shared += 1
    prefix = "".join(part + "." for part in paths[0][:shared]) if paths else ""
    halves = [[half.removeprefix(prefix) for half in (n or "").split("..")] for n in names]
    return prefix, [clipped("..".join(pair)) for pair in halves]


def clipped(text: str, longest: int = LONGEST_NAME) -> str:
    """Cut the middle out of a text that is too long to show."""
    if len(text) <= longest:
        return text
    left = (longest - 1) // 3
    return f"{text[:left]}…{text[len(text) - (longest - 1 - left) :]}"


def short_number(number: int) -> str:
    """Return a number as a table shows it: 512, 4.6k, 11.7M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def amount(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it needs one.

    Example:
        >>> amount(1, "layer"), amount(3, "layer")
        ('1 layer', '3 layers')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


_ILLEGAL = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    """Replace the characters that no XML may hold."""
    return _ILLEGAL.sub("\ufffd", text)


# --- what an alignment says -----------------------------------------------------------------------


def layers_of(alignment: Alignment, network: int) -> list[str]:
    """Return the names of a network's layers, in order."""
    rows = (segment.slots[network] for segment in alignment.segments)
    return [name for row in rows for name in row if name is not None]


def facts_of(alignment: Alignment, network: int, layer: str | None) -> LayerFacts | None:
    """Return what is known of a layer, None if nothing is."""
    if layer is None or not alignment.facts:
        return None
    return alignment.facts[network].get(layer)


def parameters_in(alignment: Alignment, network: int) -> str:
    """Return how many parameters a network's layers have, as a table shows it; empty if unknown."""
    if not alignment.facts:
        return ""
    facts = (facts_of(alignment, network, name) for name in layers_of(alignment, network))
    return short_number(sum(layer.parameters for layer in facts if layer is not None))


@dataclass(frozen=True)
class CostMatrix:
    """The measured costs of pairing two networks' layers in one segment.

    Attributes:
        title: The segment and the two networks.
        rows: Short names of the layers of the reference.
        columns: Short names of the layers of the other network.
        costs: `(rows, columns)`; infinite where two layers never pair.
        chosen: For each column, the row it was paired with.
    """

    title: str
    rows: list[str]
    columns: list[str]
    costs: tuple[tuple[float, ...], ...]
    chosen: list[int]


def cost_matrices(alignment: Alignment) -> list[CostMatrix]:
    """Return the costs of every segment and network where they were measured."""
    matrices = []
    for number, segment in enumerate(alignment.segments, 1):
        reference = alignment.names[segment.reference]
        for k, costs in enumerate(segment.costs):
            if costs is None or k == segment.reference:
                continue
            chosen = [i for i, name in enumerate(segment.slots[k]) if name is not None]
            title = f"{number}. {segment.label}: {reference} (rows), {alignment.names[k]} (columns)"
            rows = split_prefix(segment.slots[segment.reference])[1]
            columns = split_prefix([segment.slots[k][i] for i in chosen])[1]
            matrices.append(CostMatrix(title, rows, columns, costs, chosen))
    return matrices


# --- files of figures -----------------------------------------------------------------------------

PICTURE_ENDINGS = (".png", ".svg", ".pdf")


def require_picture(path: str | os.PathLike[str]) -> Path:
    """Return the path of a picture to write.

    Raises:
        ArgumentError: If its ending is of no known format.
    """
    target = Path(path)
    if target.suffix not in PICTURE_ENDINGS:
        raise ArgumentError(
            f"a picture with the ending '{target.suffix}'",
            where=str(target),
            expected="a path that ends in .png, .svg or .pdf",
            do="choose one of these formats",
        )
    return target


def save_figure(figure: Figure, target: Path, dpi: int = 110) -> None:
    """Write a figure in one step, the same bytes for the same figure."""
    import matplotlib

    without_date: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    metadata = without_date.get(target.suffix)
    with matplotlib.rc_context({"svg.hashsalt": "fxfuse"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that no installed font has
        write_atomically(target, lambda path: figure.savefig(path, dpi=dpi, metadata=metadata))
