"""The data, and what the networks compute on them: runs, moments, fitted affine maps."""

from .._ranks import apart
from .data import Calibration
from .moments import correlation, cosine, euclidean, squared_euclidean

__all__ = [
    "Calibration",
    "apart",
    "correlation",
    "cosine",
    "euclidean",
    "squared_euclidean",
]
