"""Add those changes of tuned networks that are large and agree in sign: trim, elect, merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..coupling.mixing import Named, Rule, Tensors
from ._changes import OfChanges, largest, require_share


@dataclass(frozen=True)
class Ties(OfChanges):
    """Keep each network's largest changes, then the mean of those that have the elected sign.

    The sign of a weight is that of the sum of its changes; where they cancel, the one that most
    weights have. Networks whose change has another sign, or was dropped, do not count in the mean.

    Attributes:
        base: Index of the network that is the checkpoint.
        scale: What the mean is multiplied by.
        density: Share of its changes that each network keeps, over all of its tensors.

    References:
        Yadav et al. 2023, TIES-merging: density 0.2 and scale 1 without data to choose them on.
        Difference: networks may have shares, which count in the sums and in the means.
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        """Refuse a share out of range."""
        require_share(self, "density", self.density)

    def __call__(self, named: Callable[[], Named], shares: Sequence[float]) -> Rule:
        """Find how large a change must be, and which sign is the commoner; return the rule."""
        weights = self.factors(shares) / (self.scale or 1.0)
        least = largest(named, self, self.density)
        usual = np.sign(sum(float(np.sign(self._sum(t, weights, least)).sum()) for _, t in named()))

        def merge(name: str, tensors: Tensors) -> np.ndarray:
            changes = self._kept(tensors, least)
            sign = np.sign(self._sum(tensors, weights, least))
            sign[sign == 0] = usual
            factors = weights.astype(changes.dtype).reshape(-1, *[1] * sign.ndim)
            shared = factors * (np.sign(changes) == sign) * (changes != 0)
            mass = shared.sum(0)
            mean = (shared * changes).sum(0) / np.where(mass > 0, mass, 1)
            merged: np.ndarray = tensors[self.base] + np.asarray(self.scale, mean.dtype) * mean
            return merged

        return merge

    def _kept(self, tensors: Tensors, least: np.ndarray) -> np.ndarray:
        changes = self.changes(tensors)
        bounds = least.astype(changes.dtype).reshape(-1, *[1] * (changes.ndim - 1))
        kept: np.ndarray = np.where(abs(changes) > bounds if self.density < 1 else True, changes, 0)
        return kept

    def _sum(self, tensors: Tensors, weights: np.ndarray, least: np.ndarray) -> np.ndarray:
        total: np.ndarray = np.tensordot(weights, self._kept(tensors, least).astype(float), 1)
        return total
