"""Ground costs: how unlike two units are, from their streamed moments and cross moments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .moments import PairMoments


def squared_euclidean(places: Sequence[PairMoments]) -> np.ndarray:
    """Sum over places of the mean squared difference per position, `(units of a, units of b)`."""
    total = 0.0
    for m in places:
        ma, mb, va, vb = m.a.mean, m.b.mean, m.a.variance, m.b.variance
        total = total + va[:, None] + vb[None] - 2 * m.covariance + (ma[:, None] - mb[None]) ** 2
    return np.maximum(total, 0.0)


def euclidean(places: Sequence[PairMoments]) -> np.ndarray:
    """Root of `squared_euclidean`: the ground metric of OTFusion's and CLAFusion's scripts."""
    return np.sqrt(squared_euclidean(places))


def correlation(places: Sequence[PairMoments], tie_break: float = 1e-3) -> np.ndarray:
    """Mean over places of one minus Pearson correlation.

    Units that correlate equally (units that never vary, above all) are told apart by their mean
    and spread, which enter with the small weight `tie_break` relative to the average spread.
    """
    total = 0.0
    for m in places:
        ma, mb, va, vb = m.a.mean, m.b.mean, m.a.variance, m.b.variance
        sa, sb = np.sqrt(va), np.sqrt(vb)
        scale = np.outer(sa, sb)
        varies = np.outer(_varies(ma, sa), _varies(mb, sb))
        r = np.divide(m.covariance, scale, out=np.zeros_like(scale), where=varies)
        apart = (ma[:, None] - mb[None]) ** 2 + (sa[:, None] - sb[None]) ** 2
        unit = (ma**2 + va).mean() + (mb**2 + vb).mean() + 1e-30
        total = total + (1.0 - r) + tie_break * apart / unit
    return np.maximum(total / len(places), 0.0)


def _varies(mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Tell which units vary by more than the rounding of their own values."""
    return spread > 1e-6 * np.abs(mean) + 1e-9 * spread.max(initial=1e-20)
