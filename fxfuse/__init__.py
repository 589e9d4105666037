"""fxfuse: fuse trained PyTorch networks of different depth and width into one."""

from .interrupts import stop_at_once

stop_at_once()  # before torch is loaded, which takes a while

# ruff: noqa: E402
from . import heads, presets
from .barrier import barrier
from .checks import verify
from .display import draw
from .errors import FuseError
from .fusion import Method, align, balance, fuse
from .inspection import Inspection, inspect
from .ir import Alignment, Space, Spaces
from .net2net import narrow, net2deeper, net2wider
from .passes import debug
from .report import Report
from .saving import load, save
from .spaces import find_spaces, permute
from .transfer import transfer
from .version import __version__

__all__ = [
    "Alignment",
    "FuseError",
    "Inspection",
    "Method",
    "Report",
    "Space",
    "Spaces",
    "__version__",
    "align",
    "balance",
    "barrier",
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
del stop_at_once
