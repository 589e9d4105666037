"""From several networks to one: `fuse`, heads, the choice of weights, barriers, transfer."""

from .barrier import Barrier, barrier, compare
from .federated import Aggregation
from .fuse import FAIR, Method, align, balance, fuse, fuse_along, net2deeper
from .heads import Separate, Union
from .narrow import narrow
from .transfer import transfer

__all__ = [
    "Aggregation",
    "Barrier",
    "FAIR",
    "Method",
    "Separate",
    "Union",
    "align",
    "balance",
    "barrier",
    "compare",
    "fuse",
    "fuse_along",
    "narrow",
    "net2deeper",
    "transfer",
]
