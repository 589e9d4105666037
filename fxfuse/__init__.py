"""fxfuse: fuse trained PyTorch networks of different depth and width into one."""

from . import presets
from .alignment import Inspection, inspect
from .errors import FuseError, FusionWarning
from .fusion import (
    Method,
    align,
    balance,
    barrier,
    compare,
    fuse,
    heads,
    narrow,
    net2deeper,
    transfer,
)
from .graph import debug, verify
from .io import load, save
from .ir import Alignment, Space, Spaces
from .report import Report, draw
from .spaces import find_spaces, permute
from .version import __version__
from .width import net2wider

__all__ = [
    "Alignment",
    "FuseError",
    "FusionWarning",
    "Inspection",
    "Method",
    "Report",
    "Space",
    "Spaces",
    "__version__",
    "align",
    "balance",
    "barrier",
    "compare",
    "debug",
    "draw",
    "find_spaces",
    "fuse",
    "heads",
    "inspect",
    "load",
    "narrow",
    "net2deeper",
    "net2wider",
    "permute",
    "presets",
    "save",
    "transfer",
    "verify",
]
