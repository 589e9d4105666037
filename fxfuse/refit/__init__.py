"""Emit the fused network, and correct it on the data."""

from .closed_form import ClosedFormMoments
from .moments import AsMixed, MatchMoments, Refit, ResetNorms
from .pleas import LayerwiseLeastSquares
from .regmean import RegMean
from .sweep import LeastSquares

__all__ = [
    "AsMixed",
    "ClosedFormMoments",
    "LayerwiseLeastSquares",
    "LeastSquares",
    "MatchMoments",
    "Refit",
    "RegMean",
    "ResetNorms",
]
