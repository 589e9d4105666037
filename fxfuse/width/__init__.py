"""Networks of other widths."""

from .budget import Room, deepest_first, evenly
from .net2net import WidthReport, narrow, net2wider

__all__ = ["Room", "WidthReport", "deepest_first", "evenly", "narrow", "net2wider"]
