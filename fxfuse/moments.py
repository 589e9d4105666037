"""Streamed moments of units: batches in, means, variances and covariances out."""

from __future__ import annotations

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
