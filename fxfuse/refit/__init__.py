"""Emit the fused network, and correct it on the data."""

from .moments import AsMixed, MatchMoments, Refit, ResetNorms
from .sweep import LeastSquares

__all__ = [
    "AsMixed",
    "LeastSquares",
    "MatchMoments",
    "Refit",
    "ResetNorms",
]
