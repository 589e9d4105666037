"""How unlike two layers are, and how unlike two units are, from streamed statistics.

Layer costs compare sample-by-sample Gram matrices; ground costs compare units through their first
and second moments and cross moments, so neither keeps activations.

References:
    Kornblith et al. 2019, linear CKA; Nguyen et al. 2021 (CLAFusion), section 3.1: the cost of a
    pair of layers is one minus linear CKA of their pre-activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .moments import PairMoments


def gram(x: Tensor) -> Tensor:
    """Return the centred Gram matrix `(n, n)` of `n` samples, every other axis a feature."""
    flat = x.flatten(1).float()
    flat = flat - flat.mean(0)
    return (flat @ flat.T).double()


class LinearCKA:
    """Linear CKA between every layer of one list and every layer of another, batch by batch.

    Each batch adds its Hilbert-Schmidt inner products; the ratio is taken at the end. With one
    batch this is the biased estimate that the paper's code uses.

    Args:
        rows: Number of layers of the first list.
        columns: Number of layers of the second.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.cross = np.zeros((rows, columns))
        self.own = np.zeros(rows), np.zeros(columns)

    def add(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        """Add the Gram matrices of one batch, `(n, n)` each."""
        left = torch.stack([g.flatten() for g in a])
        right = torch.stack([g.flatten() for g in b])
        self.cross += (left @ right.T).cpu().numpy()
        for own, grams in zip(self.own, (left, right)):
            own += grams.square().sum(1).cpu().numpy()

    def costs(self) -> np.ndarray:
        """Return one minus CKA, `(rows, columns)`; a constant layer is unlike everything."""
        scale = np.sqrt(np.outer(*self.own))
        return 1.0 - np.divide(self.cross, scale, out=np.zeros_like(scale), where=scale > 0)


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
