"""Ground costs: how unlike two units are, from their streamed moments and cross moments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .moments import Moments, PairMoments


def squared_euclidean(places: Sequence[PairMoments]) -> np.ndarray:
    """Sum over places of the mean squared difference per position, `(units of a, units of b)`."""
    total: np.ndarray | float = 0.0
    for m in places:
        ma, mb, va, vb = m.a.mean, m.b.mean, m.a.variance, m.b.variance
        total = total + va[:, None] + vb[None] - 2 * m.covariance + (ma[:, None] - mb[None]) ** 2
    found: np.ndarray = np.maximum(total, 0.0)
    return found


def euclidean(places: Sequence[PairMoments]) -> np.ndarray:
    """Root of `squared_euclidean`: the ground metric of OTFusion's and CLAFusion's scripts."""
    found: np.ndarray = np.sqrt(squared_euclidean(places))
    return found


def cosine(places: Sequence[PairMoments]) -> np.ndarray:
    """Mean over places of one minus the cosine of the units' values, means left in.

    Unlike `correlation` it sees how far from zero a unit is, and like it not the unit's scale. A
    unit that is zero throughout is unlike everything.
    """
    total: np.ndarray | float = 0.0
    for m in places:
        ma, mb = m.a.mean, m.b.mean
        scale = np.sqrt(np.outer(ma**2 + m.a.variance, mb**2 + m.b.variance))
        product = m.covariance + np.outer(ma, mb)
        total = total + 1.0 - np.divide(product, scale, out=np.zeros_like(scale), where=scale > 0)
    found: np.ndarray = np.maximum(total / len(places), 0.0)
    return found


def correlation(places: Sequence[PairMoments], tie_break: float = 1e-3) -> np.ndarray:
    """Mean over places of one minus Pearson correlation; none where neither of two units varies.

    Units that correlate equally (units that never vary, above all) are told apart by their mean
    and spread, which enter with the small weight `tie_break` relative to the average spread.
    """
    total: np.ndarray | float = 0.0
    for m in places:
        quiet = np.outer(~varies(m.a), ~varies(m.b))
        total = total + np.where(quiet, 0.0, 1.0 - pearson(m)) + tie_break * distance(m)
    found: np.ndarray = np.maximum(total / len(places), 0.0)
    return found


def pearson(m: PairMoments, floor: float = 0.0) -> np.ndarray:
    """Return the correlations `(units of a, units of b)`, 0 for units that never vary.

    Args:
        m: Moments of both.
        floor: Least product of two spreads to divide by.
    """
    scale = np.maximum(np.outer(m.a.spread, m.b.spread), floor)
    both = np.outer(varies(m.a), varies(m.b))
    found: np.ndarray = np.divide(m.covariance, scale, out=np.zeros_like(scale), where=both)
    return found


def distance(m: PairMoments) -> np.ndarray:
    """Return how far means and spreads are apart, squared, relative to the average unit."""
    means, spreads = zip(_level(m.a), _level(m.b))
    squares: np.ndarray = sum((x[:, None] - y[None]) ** 2 for x, y in (means, spreads))
    return squares / (sum(float((u**2 + s**2).mean()) for u, s in map(_level, (m.a, m.b))) + 1e-30)


def _level(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    return moments.mean, moments.spread


def varies(moments: Moments) -> np.ndarray:
    """Tell which units vary by more than the rounding of their own values."""
    mean, spread = _level(moments)
    found: np.ndarray = spread > 1e-6 * np.abs(mean) + 1e-9 * spread.max(initial=1e-20)
    return found
