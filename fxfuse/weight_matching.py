"""Couplings from weights alone: transport, weight matching to a base, and to each other in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .ascent import Ascent, Start, families, forward, require_equal_widths
from .coupling import Costs, Maps, Plans, two_maps
from .measuring import Measurements, View
from .mixing import Mixer
from .progress import Tick, counted, in_parts, part, silent
from .solvers import Exact, Solver
from .together import join, merge_in_turn, spaces_to_join
from .weightwise import Products, Weights, distance, unit_norm, weight_cost

RowCost = Callable[[Products], np.ndarray]


@dataclass(frozen=True)
class WeightTransport:
    """Transport from each network's units to the base network's, compared by their weights.

    Forward in network order: a unit's vector is its row of every tensor that writes its space, the
    input side mapped by the couplings found before. Of a residual stream only the first writers
    have their input side mapped when it is reached, so later passes solve every space again with
    all of its writers; on a plain chain they change nothing.

    Attributes:
        ground_cost: Inner products of rows to the cost between units.
        scale_to_one: Scale units to unit norm first.
        solver: Ground cost and marginals to a transport plan.
        maps: Plan to project and unproject.
        folded: Compare weights with norms folded in.
        passes: How often to go through the network.
        view: Nothing is measured.

    References:
        Singh and Jaggi 2020 (OTFusion), its mode `wts`. Differences: biases and norms count.
    """

    ground_cost: RowCost = distance
    scale_to_one: bool = False
    solver: Solver = Exact()
    maps: Maps = two_maps
    folded: bool = False
    passes: int = 2
    view: View | None = None

    def __call__(self, mixer: Mixer, measured: Measurements, tick: Tick = silent) -> None:
        """Fill in the coupling of every space and network."""
        weights = Weights.of(mixer, self.folded)
        plans = Plans(mixer.match, self.solver, self.maps, mixer.couplings)
        left = set(plans.settle_given())
        order = families(mixer.balanced.networks[mixer.anchor])
        for _, step in in_parts(range(self.passes), tick):
            for family in counted(order, step):
                for k in sorted({k for name, k in left if name in family}):
                    self._solve(weights, plans, family, k)

    def _solve(self, weights: Weights, plans: Plans, family: list[str], k: int) -> None:
        """Solve blocks and what is inside; once the blocks are matched, their inside again."""
        for moving in (family, *([name] for name in family[1:])):
            costs = self._costs(weights, moving, k)
            for name in moving:
                plans.solve(name, k, costs)
                weights.put(name, k, plans.couplings[name, k])

    def _costs(self, weights: Weights, moving: list[str], k: int) -> Costs:
        found: Costs = {}
        for name in moving:
            axes = weights.axes(name)
            writers = [a for a in axes if not a.reads] or axes
            products = weights.products(name, k, writers)
            if products is not None:
                scaled = unit_norm(products) if self.scale_to_one else products
                found[name, k] = self.ground_cost(scaled)
            elif k == weights.reference(name):  # the base has no such units: share these out
                found[name, k] = weight_cost(weights, name, k)
        return found


@dataclass(frozen=True)
class WeightMatching:
    """Match each network to the base network so that their weights are most alike.

    The sum over all tensors of the inner product of the base's and the network's, all axes mapped,
    is raised space by space until no space raises it. Networks of equal width only.

    Attributes:
        start: Where to start from. Measured, `forward` ends nearer: `in_place`, as published, does
            not always find its way back even between a network and its permuted copy.
        seed: Of the order in which spaces are visited.
        sweeps: Limit of the sweeps over all spaces.
        folded: Compare weights with norms folded in; the raw ones are the paper's.
        view: Nothing is measured.

    References:
        Ainsworth et al. 2023 (Git Re-Basin), algorithm 1.
    """

    start: Start = forward
    seed: int = 0
    sweeps: int = 100
    folded: bool = False
    view: View | None = None

    def __call__(self, mixer: Mixer, measured: Measurements, tick: Tick = silent) -> None:
        """Fill in the coupling of every space and network.

        Raises:
            PairingError: If the networks differ in width.
        """
        require_equal_widths(mixer.match, type(self).__name__)
        weights = Weights.of(mixer, self.folded)
        free = Plans(mixer.match, Exact(), two_maps, mixer.couplings).settle_given()
        settled = [mixer.anchor]
        others = [k for k in range(len(weights.states)) if k != mixer.anchor]
        for k, step in in_parts(others, tick):
            targets = _of_the_first(weights, settled)
            ascent = Ascent(weights, k, targets, [name for name, i in free if i == k])
            self.start(ascent)
            ascent.run(self.sweeps, np.random.default_rng(self.seed), step)
            settled.append(k)


@dataclass(frozen=True)
class MergeMany:
    """Match each network in turn to the sum of all others, until none moves.

    No network stays where it is: the fused units are nobody's. Networks are taken in an order that
    depends on their weights and the seed, not on their place in the list; only networks of
    exactly equal norms, copies above all, keep the order of the list. Equal width only.

    Attributes:
        start: Where to start from, each network against those before it.
        seed: Of the order of networks and spaces.
        rounds: Limit of the rounds through all networks.
        sweeps: Limit of the sweeps over the spaces of one network.
        folded: Compare weights with norms folded in.
        view: Nothing is measured.

    References:
        Ainsworth et al. 2023 (Git Re-Basin), algorithm 3.
    """

    start: Start = forward
    seed: int = 0
    rounds: int = 100
    sweeps: int = 100
    folded: bool = False
    view: View | None = None

    def __call__(self, mixer: Mixer, measured: Measurements, tick: Tick = silent) -> None:
        """Fill in the coupling of every space and network.

        Raises:
            PairingError: If the networks differ in width.
        """
        require_equal_widths(mixer.match, type(self).__name__)
        weights, rng = Weights.of(mixer, self.folded), np.random.default_rng(self.seed)
        free = spaces_to_join(mixer)
        join(weights, free, self.start, part(tick, 0.0, 0.5))
        merge_in_turn(weights, free, self.rounds, self.sweeps, rng, part(tick, 0.5, 1.0))


def _of_the_first(weights: Weights, networks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return every tensor, mapped, of the first network that has it."""
    found: dict[str, np.ndarray] = {}
    for k in networks:
        for tensor in weights.states[k]:
            if tensor not in found:
                found[tensor] = weights.carried(tensor, k)
    return found
