"""Drop most changes of tuned networks at random and enlarge the rest, then mix as usual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from ..coupling.mixing import Mixer, Named, Rule, Tensors
from ._changes import OfChanges, require_share
from .task_arithmetic import TaskArithmetic


@dataclass(frozen=True)
class Dare(Mixer):
    """Keep a share of each network's changes, drawn at random, divided by that share.

    Attributes:
        density: Share of its changes that each network keeps.
        then: What mixes the networks with what is left: `TaskArithmetic`, or `Ties(density=1)`.
        seed: Of what is drawn.

    References:
        Yu et al. 2024, Language models are super Mario (DARE): drop rates up to 0.9 where networks
        are large and tuned little. The default drops 0.2, as its code does for merging.
    """

    density: float = 0.8
    then: OfChanges = field(default_factory=TaskArithmetic)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a share out of range."""
        require_share(self, "density", self.density)

    @property
    def everywhere(self) -> bool:  # type: ignore[override]
        """All networks must be of one depth."""
        return self.then.everywhere

    def shares(self, given: tuple[float, ...]) -> tuple[float, ...]:
        """Return what `then` makes of the shares."""
        return self.then.shares(given)

    def __call__(self, named: Callable[[], Named], shares: Sequence[float]) -> Rule:
        """Return the rule for each tensor."""
        rule = self.then(lambda: ((n, self._thinned(n, t)) for n, t in named()), shares)
        return lambda name, tensors: rule(name, self._thinned(name, tensors))

    def _thinned(self, name: str, tensors: Tensors) -> list[np.ndarray]:
        """Return the tensors with fewer and larger changes; the same at every call."""
        start, thinned = tensors[self.then.base], []
        for k, tensor in enumerate(tensors):
            rng = np.random.default_rng([self.seed, k, crc32(name.encode())])
            kept = rng.random(tensor.shape) < self.density
            factors = (kept / self.density).astype(tensor.dtype)
            thinned.append(start + factors * (tensor - start))
        return thinned
