"""How networks differ from the checkpoint that they were tuned from: their task vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..coupling.mixing import Mixer, Named
from ..errors import ArgumentError


@dataclass(frozen=True)
class OfChanges(Mixer):
    """Adds changes to a checkpoint; one of the networks is this checkpoint, all lie in its units.

    The checkpoint's own weight does not count, and the others' count relative to their mean, unless
    it has all the weight: then nothing is added. All networks must be of one depth.

    Attributes:
        base: Index of the network that is the checkpoint.
        scale: What each change is multiplied by, for equal weights.
    """

    base: int = 0
    scale: float = 1.0
    everywhere: ClassVar[bool] = True

    def shares(self, given: tuple[float, ...]) -> tuple[float, ...]:
        """Return the shares of the tuned networks, sum 1; all of it is the checkpoint's if given.

        Raises:
            ArgumentError: If there is no such checkpoint, or nothing beside it.
        """
        if not 0 <= self.base < len(given) or len(given) < 2:
            raise ArgumentError(
                f"{len(given)} networks, of which number {self.base} is to be the checkpoint",
                where=str(self),
                expected="the checkpoint, and one or more networks that were tuned from it",
                do="give the checkpoint as the first network, or say which it is with base=",
            )
        rest = sum(w for k, w in enumerate(given) if k != self.base)
        if not rest:
            return given
        return tuple(0.0 if k == self.base else w / rest for k, w in enumerate(given))

    def factors(self, shares: Sequence[float]) -> np.ndarray:
        """Return what the change of each network but the checkpoint is multiplied by."""
        others = np.array([w for k, w in enumerate(shares) if k != self.base])
        return self.scale * len(others) * others

    def changes(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """Return how each network but the checkpoint differs from it, `(networks, ...)`."""
        others = [t for k, t in enumerate(tensors) if k != self.base]
        stacked: np.ndarray = np.stack(others) - tensors[self.base]
        return stacked


def largest(named: Callable[[], Named], mixer: OfChanges, density: float) -> np.ndarray:
    """Return, per network, the size that the largest of its changes have at least.

    Args:
        named: The tensors of all networks.
        mixer: Says which of them is the checkpoint.
        density: Which share of its changes a network keeps.
    """
    flat = [abs(mixer.changes(tensors)) for _, tensors in named()]
    if not flat:
        return np.zeros(0)  # networks without weights
    sizes = np.concatenate([f.reshape(len(f), -1) for f in flat], axis=1)
    dropped = sizes.shape[1] - int(density * sizes.shape[1])
    if not dropped:
        return np.zeros(len(sizes))
    bounds: np.ndarray = np.partition(sizes, dropped - 1, axis=1)[:, dropped - 1]
    return bounds


def require_share(mixer: Mixer, name: str, value: float) -> None:
    """Refuse a share that is not above 0 and at most 1."""
    if not 0 < value <= 1:
        raise ArgumentError(
            f"{name} {value}",
            where=f"{type(mixer).__name__}({name}=...)",
            expected="a share above 0 and at most 1",
            do="leave it out for what the paper uses",
        )
