"""Moments of units, streamed: batches in, means, variances and covariances out.

Ground costs say how unlike two units are. They are functions of the moments at the places where
units are compared, so that no values have to be held.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._ranks import sums_up, total, total_of


class Moments:
    """First and second moments of units, summed up batch by batch.

    Values are shifted by the first batch's means before summing, against cancellation.

    Attributes:
        count: Number of values of each unit so far.
        shift: `(units,)` what values are shifted by.
        total: `(units,)` sums of shifted values.
        squares: `(units,)` sums of their squares.
    """

    def __init__(self) -> None:
        self.count = 0
        self.shift = self.total = self.squares = torch.empty(0)

    @classmethod
    def of(cls, mean: np.ndarray, spread: np.ndarray) -> Moments:
        """Return moments of a known mean and standard deviation, both `(units,)`."""
        moments = cls()
        moments.count, moments.shift = 1, torch.as_tensor(mean)
        moments.total = torch.zeros(len(mean), dtype=torch.float64)
        moments.squares = torch.as_tensor(spread).double().square()
        return moments

    def add(self, x: Tensor) -> Tensor:
        """Add values `(units, ...)`; return them shifted, as `(units, positions)`."""
        x = x.float() if x.dtype == torch.bool else x  # units that only truth values show
        x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
        if not self.count:
            places = tuple(range(1, x.dim()))
            self.shift = x.float().mean(places) if x.numel() else x.new_zeros(len(x)).float()
            self.total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            self.squares = torch.zeros_like(self.total)
        shifted = torch.empty(x.shape, device=x.device)  # contiguous whatever the layout of x
        torch.sub(x, self.shift.view(-1, *[1] * (x.dim() - 1)), out=shifted)
        flat = shifted.flatten(1)
        self.count += flat.shape[1]
        self.total.add_(flat.sum(1))
        self.squares.add_(torch.linalg.vector_norm(flat, dim=1).double().square())
        return flat

    def summed(self) -> Moments:
        """Return the moments of the values of all processes, inside `Calibration.summed`."""
        if not sums_up():
            return self
        every, count = Moments(), self.count
        every.count = int(total_of(count))
        every.shift = (total(self.shift.double() * count)[0] / every.count).to(self.shift)
        away = (self.shift - every.shift).double()
        squares = self.squares + 2 * away * self.total + count * away.square()
        every.total, every.squares = total(self.total + count * away, squares)
        return every

    def take(self, index: np.ndarray) -> Moments:
        """Return the moments of some units, by their numbers."""
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
        spread: np.ndarray = np.sqrt(self.variance)
        return spread

    @property
    def rms(self) -> np.ndarray:
        """`(units,)` root mean squares."""
        rms: np.ndarray = np.sqrt(self.mean**2 + self.variance)
        return rms


SHIFTING = 4096  # rows whose mean all values are shifted by


def moments_of_rows(rows: Tensor) -> Moments:
    """Return the moments of units `(positions, units)`, over the rows of all processes."""
    moments = Moments()
    moments.count = int(total_of(len(rows)))
    moments.shift = mean_of_rows(rows[:SHIFTING].float(), 0)[0]
    shifted = rows - moments.shift
    sums = shifted.sum(0).double(), shifted.square_().sum(0).double()
    moments.total, moments.squares = total(*sums)
    return moments


def mean_of_rows(rows: Tensor, dim: int) -> Tensor:
    """Return the mean over the rows of all processes, which lie along an axis; keep the axis."""
    count = rows.shape[dim]
    sums = rows.mean(dim, keepdim=True).double() * count if count else rows.sum(dim, keepdim=True)
    return (total(sums.double())[0] / max(total_of(count), 1)).to(rows)


class PairMoments:
    """Moments of units on two sides, such as two networks, and their cross moments.

    Attributes:
        a: Moments of the units of the first side.
        b: Moments of the units of the second side.
        cross: `(units of a, units of b)` sums of products of shifted values.
    """

    def __init__(self, a: Moments | None = None, b: Moments | None = None) -> None:
        self.a, self.b = a or Moments(), b or Moments()
        self.cross = torch.zeros(())

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add the values `(units, ...)` of one batch, at the same positions on both sides."""
        self.add_shifted(self.a.add(a), self.b.add(b))

    def add_shifted(self, a: Tensor, b: Tensor) -> None:
        """Add what `Moments.add` of both sides returned, where it is called from outside."""
        self.cross = self.cross.to(a.device) + (a @ b.T).double()

    def summed(self, a: Moments, b: Moments) -> PairMoments:
        """Return the moments of the values of all processes, inside `Calibration.summed`.

        Args:
            a: What `summed` returned for the moments of the first side.
            b: The same for the second side.
        """
        if not sums_up():
            return self
        away_a, away_b = (self.a.shift - a.shift).double(), (self.b.shift - b.shift).double()
        moved = torch.outer(away_a, self.b.total) + torch.outer(self.a.total, away_b)
        moved += self.a.count * torch.outer(away_a, away_b)
        every = PairMoments(a, b)
        (every.cross,) = total(self.cross + moved)
        return every

    def take(self, rows: np.ndarray, columns: np.ndarray) -> PairMoments:
        """Return the moments of some units of each side, by their numbers."""
        pairs = zip((rows, columns), self.cross.shape)
        if all(np.array_equal(index, np.arange(size)) for index, size in pairs):  # no copy
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
    costs: np.ndarray = np.maximum(total, 0.0)
    return costs


def euclidean(places: Sequence[PairMoments]) -> np.ndarray:
    """Root of `squared_euclidean`: the ground metric of OTFusion's and CLAFusion's scripts."""
    costs: np.ndarray = np.sqrt(squared_euclidean(places))
    return costs


def cosine(places: Sequence[PairMoments]) -> np.ndarray:
    """Mean over places of one minus the cosine of two units' values, means included.

    Like `correlation` it does not depend on the scale of a unit; unlike it, it depends on the mean.
    A unit that is always zero is unlike everything.
    """
    total: np.ndarray | float = 0.0
    for m in places:
        ma, mb = m.a.mean, m.b.mean
        scale = np.sqrt(np.outer(ma**2 + m.a.variance, mb**2 + m.b.variance))
        product = m.covariance + np.outer(ma, mb)
        total = total + 1.0 - np.divide(product, scale, out=np.zeros_like(scale), where=scale > 0)
    costs: np.ndarray = np.maximum(total / len(places), 0.0)
    return costs


def correlation(places: Sequence[PairMoments], tie_break: float = 1e-3) -> np.ndarray:
    """Mean over places of one minus Pearson correlation; zero where neither of two units varies.

    Units that correlate equally, above all units that never vary, are told apart by their means and
    spreads: these enter with the small weight `tie_break`, relative to those of the average unit.
    """
    total: np.ndarray | float = 0.0
    for m in places:
        neither = np.outer(~varies(m.a), ~varies(m.b))
        total = total + np.where(neither, 0.0, 1.0 - pearson(m)) + tie_break * moment_distance(m)
    costs: np.ndarray = np.maximum(total / len(places), 0.0)
    return costs


def pearson(m: PairMoments, floor: float = 0.0) -> np.ndarray:
    """Return the correlations `(units of a, units of b)`, 0 for units that never vary.

    Args:
        m: Moments of both sides.
        floor: Least product of two spreads to divide by, so that units which hardly vary correlate
            with nothing.
    """
    scale = np.maximum(np.outer(m.a.spread, m.b.spread), floor)
    both = np.outer(varies(m.a), varies(m.b))
    correlations: np.ndarray = np.divide(m.covariance, scale, out=np.zeros_like(scale), where=both)
    return correlations


def moment_distance(m: PairMoments) -> np.ndarray:
    """Return squared differences of means and of spreads, relative to the average unit's squares.

    Returns:
        `(units of a, units of b)`.
    """
    means, spreads = (m.a.mean, m.b.mean), (m.a.spread, m.b.spread)
    squares: np.ndarray = sum((a[:, None] - b[None]) ** 2 for a, b in (means, spreads))
    average = sum(float((u**2 + s**2).mean()) for u, s in zip(means, spreads))
    return squares / (average + 1e-30)


def varies(moments: Moments) -> np.ndarray:
    """Tell which units vary by more than the rounding of their own values."""
    mean, spread = moments.mean, moments.spread
    above: np.ndarray = spread > 1e-6 * np.abs(mean) + 1e-9 * spread.max(initial=1e-20)
    return above
