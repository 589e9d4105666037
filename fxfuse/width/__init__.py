"""Networks of other widths: wider copies, narrower ones, and room for unlike units."""

from .budget import Room, deepest_first, evenly
from .importance import Importance, activation, magnitude, taylor
from .net2net import WidthReport, net2wider

__all__ = [
    "Importance",
    "Room",
    "WidthReport",
    "activation",
    "deepest_first",
    "evenly",
    "magnitude",
    "net2wider",
    "taylor",
]
