"""Streamed moments of units: batches in, means, variances and covariances out.

Ground costs: how unlike two units are, from their streamed moments and cross moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Moments:
    """First and second moments of units, summed batch by batch.

    Values are shifted by the first batch's means before summing, against cancellation.
    """

    def __init__(self) -> None:
        self.count = 0
        self.shift = self.total = self.squares = torch.empty(0)

    def add(self, x: Tensor) -> Tensor:
        """Add values `(units, ...)`; return them shifted, as `(units, positions)`."""
        if not self.count:
            self.shift = x.float().mean(tuple(range(1, x.dim())))
            self.total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            self.squares = torch.zeros_like(self.total)
        shifted = torch.empty(x.shape, device=x.device)  # contiguous whatever the layout of x
        torch.sub(x, self.shift.view(-1, *[1] * (x.dim() - 1)), out=shifted)
        flat = shifted.flatten(1)
        self.count += flat.shape[1]
        self.total.add_(flat.sum(1))
        self.squares.add_(torch.linalg.vector_norm(flat, dim=1).double().square())
        return flat

    def take(self, index: np.ndarray) -> Moments:
        """Return the moments of some of the units."""
        taken, rows = Moments(), torch.as_tensor(index, device=self.total.device)
        taken.count, taken.shift = self.count, self.shift[rows]
        taken.total, taken.squares = self.total[rows], self.squares[rows]
        return taken

    @property
    def mean(self) -> np.ndarray:
        """`(units,)` means."""
        return (self.total / self.count + self.shift).cpu().numpy()

    @property
    def variance(self) -> np.ndarray:
        """`(units,)` population variances."""
        variance = self.squares / self.count - (self.total / self.count).square()
        return variance.clamp(min=0).cpu().numpy()

    @property
    def spread(self) -> np.ndarray:
        """`(units,)` standard deviations."""
        found: np.ndarray = np.sqrt(self.variance)
        return found

    @property
    def power(self) -> np.ndarray:
        """`(units,)` root mean squares."""
        found: np.ndarray = np.sqrt(self.mean**2 + self.variance)
        return found


class PairMoments:
    """Moments of the units of two spaces at one place in the networks, and their cross moments.

    Attributes:
        a: Moments of the first space's units.
        b: Moments of the second's.
        cross: `(units of a, units of b)` sums of products of shifted values.
    """

    def __init__(self, a: Moments | None = None, b: Moments | None = None) -> None:
        self.a, self.b = a or Moments(), b or Moments()
        self.cross = torch.zeros(())

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add the values `(units, ...)` of one batch in both spaces."""
        self.add_shifted(self.a.add(a), self.b.add(b))

    def add_shifted(self, a: Tensor, b: Tensor) -> None:
        """Add what `Moments.add` returned for both sides, when these moments are kept elsewhere."""
        self.cross = self.cross.to(a.device) + (a @ b.T).double()

    def take(self, rows: np.ndarray, columns: np.ndarray) -> PairMoments:
        """Return the moments of some units of each side; themselves if it is all, in order."""
        pairs = zip((rows, columns), self.cross.shape)
        if all(np.array_equal(index, np.arange(size)) for index, size in pairs):
            return self
        taken = PairMoments(self.a.take(rows), self.b.take(columns))
        taken.cross = self.cross[rows][:, columns]
        return taken

    @property
    def covariance(self) -> np.ndarray:
        """`(units of a, units of b)` cross covariances."""
        n = self.a.count
        product = torch.outer(self.a.total / n, self.b.total / n)
        return (self.cross / n - product).cpu().numpy()


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
