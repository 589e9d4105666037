"""Emit the fused network, and correct it on the data."""

from .moments import MatchMoments, Refit
from .sweep import LeastSquares

__all__ = [
    "LeastSquares",
    "MatchMoments",
    "Refit",
]
