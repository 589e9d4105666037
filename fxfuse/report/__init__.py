"""The facts of a fusion as text, pictures and pages."""

from ._shared import PICTURE_ENDINGS, amount
from .alignment_picture import draw
from .card import card_of
from .report import CouplingReport, Heard, Report, SpaceReport

__all__ = [
    "PICTURE_ENDINGS",
    "CouplingReport",
    "Heard",
    "Report",
    "SpaceReport",
    "amount",
    "card_of",
    "draw",
]
