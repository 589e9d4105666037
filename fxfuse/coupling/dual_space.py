"""Match units by what they compute and by their weights at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .._progress import counted
from ..calibration.moments import correlation
from ..errors import ArgumentError
from ..solvers import Exact
from ._weights import Weights
from .measure import Evidence, View
from .mixing import Couplings
from .plans import Costs, CouplingMethod, Plans, two_maps
from .problem import Problem
from .transport import GroundCosts
from .weight_matching import Ascent, first_of, inner, members, require_equal_widths


@dataclass(frozen=True)
class DualSpace(CouplingMethod):
    """Match each network to the base network so that weights and activations are most alike.

    To the sum that `WeightMatching` raises, each space adds the correlations of its matched units,
    on the scale of its weights: with a balance of one half, a space whose units all correlate fully
    counts as much as one whose weights all agree. Networks of equal width only.

    Attributes:
        balance: Share of the activations, from 0 (weights alone) to 1.
        view: Where units are compared.
        seed: Of the order in which spaces are visited.

    References:
        Xu et al. 2024, Training-free pretrained model merging (MuDSC), its permutations.
        Difference: one sum is raised for both kinds, so no move loses more than it gains.
    """

    balance: float = 0.5
    view: View = View(activated=True)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a balance out of range."""
        if not 0 <= self.balance <= 1:
            raise ArgumentError(
                f"balance {self.balance}",
                where="DualSpace(balance=...)",
                expected="a share from 0 to 1",
                do="leave it out to count both kinds of likeness equally",
            )

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network.

        Raises:
            PairingError: If the networks differ in width.
        """
        require_equal_widths(problem, type(self).__name__)
        weights, costs = Weights.of(problem), GroundCosts(problem, evidence, correlation)
        free = Plans(problem, Exact(), two_maps, weights.couplings).settle_given()
        matched = [problem.anchor]
        for k in counted([k for k in range(len(weights.states)) if k != problem.anchor]):
            names = [name for name, i in free if i == k]
            targets = first_of(weights, matched)
            alike = {name: 1.0 - costs[name, k] for name in names if (name, k) in costs}
            ascent = _DualAscent(weights, k, targets, names, alike, self.balance)
            ascent.sweep()
            ascent.run(np.random.default_rng(self.seed))
            matched.append(k)
        return Couplings(problem, weights.couplings)


@dataclass(frozen=True, eq=False)
class _DualAscent(Ascent):
    """Coordinate ascent of both kinds of likeness.

    Attributes:
        alike: By space, how far units correlate, `(fused units, units)`.
        balance: Share of the activations.
    """

    alike: Mapping[str, np.ndarray]
    balance: float

    @cached_property
    def scales(self) -> dict[str, float]:
        """By space, the most that its weights could agree, per unit."""
        return {name: self._most(name) / max(len(a), 1) for name, a in self.alike.items()}

    def _most(self, name: str) -> float:
        sizes = []
        for tensor in self._tensors([name]):
            own, target = self.weights.dense(tensor, self.k), self.targets[tensor]
            sizes.append((inner(own, own) * inner(target, target)) ** 0.5)
        return float(sum(sizes))

    def _costs(self, moving: Sequence[str], settled: bool = False) -> Costs:
        """Return minus what matching units gains, of both kinds."""
        costs = dict(super()._costs(moving, settled))
        both = {key: (1 - self.balance) * cost for key, cost in costs.items()}
        for name in moving:
            if name in self.alike:
                gain = self.balance * self.scales[name] * self.alike[name]
                gain = gain * members(self.weights.problem, name)
                both[name, self.k] = both.get((name, self.k), 0.0) - gain
        return both

    def _value(self, tensors: Sequence[str]) -> tuple[float, float]:
        """Return the sum over tensors and spaces, and the size of what was summed."""
        value, size = super()._value(tensors)
        value *= 1 - self.balance
        for name, alike in self.alike.items():
            project = self.weights.couplings[name, self.k].project
            value += self.balance * self.scales[name] * float(project.multiply(alike).sum())
        return value, size
