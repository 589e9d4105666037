"""Emit the fused network, and correct it on the data."""

from .closed_form import ClosedFormMoments
from .finish import Finish
from .moments import AsMixed, MatchMoments, Refit, ResetNorms
from .pleas import LayerwiseLeastSquares
from .regmean import RegMean
from .sweep import LeastSquares

__all__ = [
    "AsMixed",
    "ClosedFormMoments",
    "Finish",
    "LayerwiseLeastSquares",
    "LeastSquares",
    "MatchMoments",
    "Refit",
    "RegMean",
    "ResetNorms",
]
