"""Go from one network's weights to another's along an arc, not along the chord."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..coupling.mixing import Mixer, Named, Rule, Tensors
from ..errors import ArgumentError


@dataclass(frozen=True)
class Slerp(Mixer):
    """Spherical interpolation of two networks, tensor by tensor.

    The mean of two tensors is shorter than either; on the arc between their directions none is.

    Attributes:
        parallel: Cosine from which on two tensors are taken as parallel, and the mean is taken.

    References:
        Shoemake 1985, Animating rotation with quaternion curves; as tools that merge language
        models apply it to tensors.
    """

    parallel: float = 0.9995

    def shares(self, given: tuple[float, ...]) -> tuple[float, ...]:
        """Return the shares as they are.

        Raises:
            ArgumentError: If there are not two networks.
        """
        if len(given) != 2:
            raise ArgumentError(
                f"{len(given)} networks",
                where=str(self),
                expected="two: an arc has two ends",
                do="interpolate the result with the next one",
            )
        return given

    def __call__(self, named: Callable[[], Named], shares: Sequence[float]) -> Rule:
        """Return the rule for each tensor."""

        def between(name: str, tensors: Tensors) -> np.ndarray:
            a, b = (t.astype(float) for t in tensors)
            factors = shares
            sizes = np.linalg.norm(a) * np.linalg.norm(b)
            cosine = float((a * b).sum() / sizes) if sizes else 1.0
            if abs(cosine) <= self.parallel:
                angle = np.arccos(cosine)
                factors = [float(np.sin(w * angle) / np.sin(angle)) for w in shares]
            along: np.ndarray = (factors[0] * a + factors[1] * b).astype(tensors[0].dtype)
            return along

        return between
