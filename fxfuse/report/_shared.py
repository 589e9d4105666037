"""Heat maps and curves: layer costs with the chosen path, couplings, fits, barriers.

Write a scene as SVG: plain shapes and real text, readable by any viewer and by a web page.
"""

from __future__ import annotations

import os
import re
import warnings
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_atomically
from ..errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


ENDINGS = (".png", ".svg", ".pdf")


def require_picture(path: str | os.PathLike[str]) -> Path:
    """Return the path of a picture to write.

    Raises:
        ArgumentError: If its ending is of no known format.
    """
    target = Path(path)
    if target.suffix not in ENDINGS:
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

    undated: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    facts = undated.get(target.suffix)
    with matplotlib.rc_context({"svg.hashsalt": "fxfuse"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that no font here has
        write_atomically(target, lambda to: figure.savefig(to, dpi=dpi, metadata=facts))


_ILLEGAL = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    """Replace the characters that no XML may hold."""
    return _ILLEGAL.sub("\ufffd", text)


def safe(text: object) -> str:
    """Return a text that is safe inside and between tags."""
    return escape(clean(str(text)), quote=True)
