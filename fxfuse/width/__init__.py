"""Networks of other widths."""

from .budget import deepest_first, evenly
from .net2net import narrow, net2wider

__all__ = [
    "deepest_first",
    "evenly",
    "narrow",
    "net2wider",
]
