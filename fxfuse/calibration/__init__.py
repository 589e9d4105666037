"""The data, and what the networks compute on them: runs, moments, fitted affine maps."""

from .data import Calibration
from .moments import correlation, cosine, euclidean, squared_euclidean

__all__ = [
    "Calibration",
    "correlation",
    "cosine",
    "euclidean",
    "squared_euclidean",
]
