"""Facts to text, pictures and pages."""

from .alignment_picture import draw
from .report import CouplingReport, Report, SpaceReport

__all__ = [
    "CouplingReport",
    "Report",
    "SpaceReport",
    "draw",
]
