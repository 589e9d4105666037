"""The networks' values where contractions will be fitted, kept while their units are measured.

The networks then need not run again for the refit. Values are kept in each network's own units, at
the positions that the refit draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from ..calibration.counted import Counted
from ..calibration.data import Calibration
from ..calibration.distance import is_logits
from ..calibration.positions import Positions
from ..calibration.rows import output_rows
from ..calibration.run import Run
from ..coupling.mixing import Couplings
from ..coupling.problem import Problem
from ..spaces.network import Network
from ._guests import Visits, among
from ._targets import Aim, Draw, Goal, Targets, contributes
from .emit import NormPlan, WeightPlan
from .moments import Outcome, Refit

Rows = list[Tensor | None]  # values `(positions, units)` in each network, None where it has none


@dataclass(eq=False)
class KeptRows:
    """Values of networks of one structure, at the positions of each contraction's target.

    Attributes:
        problem: The networks.
        order: The names of their nodes, in the order in which the fused network is refitted.
        aims: What is to be refitted, by contraction.
        settles: Nodes whose moments are wanted besides, see `Refit.settles`.
        data: The samples.
        size: How many of them are one batch.
        draw: Chooses positions of a contraction.
        budget: Bytes that may be kept; where it takes more, nothing is.
    """

    problem: Problem
    order: Sequence[str]
    aims: Mapping[str, Aim]
    settles: dict[str, int]
    data: Calibration
    size: int
    draw: Draw
    budget: int
    _drawn: dict[str, Positions] = field(default_factory=dict)
    _shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    _rows: dict[str, list[Rows]] = field(default_factory=dict)
    _outputs: list[Rows] = field(default_factory=list)
    _bytes: int = 0

    def __post_init__(self) -> None:
        self.size = self.data.at_a_time(self.size)
        self.samples, self.numbers = self.data.samples, self.data.numbers.split(self.size)
        self._ending: dict[str, list[Aim]] = {}
        for aim in self.aims.values():
            self._ending.setdefault(aim.at, []).append(aim)

    @property
    def promising(self) -> bool:
        """Tell whether all will fit, and activations read nothing but what is kept."""
        needed = 0
        for aim in self.aims.values():
            shapes = [n.shapes.get(aim.at, ()) for n in self.problem.networks]
            axis, shape = aim.axis_in(self.problem.networks[0]), shapes[self.problem.anchor]
            places = math.prod(shape) // max(
                shape[axis] * len(self.problem.structure.example[0]), 1
            )
            rows = sum(map(len, self.draw(aim, places, self).at))
            needed += 4 * rows * sum(shape[axis] for shape in shapes if shape)
        names = [aim.activation for aim in self.aims.values() if aim.activation is not None]
        nodes = [self.problem.structure.nodes[name] for name in names]
        return needed <= self.budget and all(len(n.all_input_nodes) == 1 for n in nodes)

    def see(self, batch: int, node: fx.Node, values: Sequence[Any], counted: Counted) -> None:
        """Keep what is wanted of a node's values in all networks, None where one has none."""
        if self._bytes > self.budget or batch >= len(self.numbers):
            return
        if node.op == "output":
            self._outputs.append([v.clone() if is_logits(v) else None for v in values])
            self._bytes += sum(v.nbytes for v in self._outputs[-1] if v is not None)
        for aim in self._ending.get(node.name, ()):
            self._keep(batch, aim, values, counted)
        if self._bytes > self.budget:
            self._rows, self._outputs = {}, []

    def _keep(self, batch: int, aim: Aim, values: Sequence[Any], counted: Counted) -> None:
        name, axis = aim.producer.node, aim.axis_in(self.problem.networks[0])
        one = next((v for v in values if v is not None), None)
        if one is None:
            return
        if name not in self._drawn:
            places = one.numel() // (one.shape[axis] * len(self.numbers[batch]))
            self._drawn[name] = self.draw(aim, places, self)
        sample, shape = self._drawn[name], tuple(one.movedim(axis, -1).shape[:-1])
        sample.keep_below(batch, math.prod(shape))
        sample.keep(batch, counted.among(shape))
        rows = [None if v is None else output_rows(v, axis, sample.at[batch]) for v in values]
        self._shapes.setdefault(name, []).append(shape)
        self._rows.setdefault(name, []).append(rows)
        self._bytes += sum(r.nbytes for r in rows if r is not None)

    @property
    def nbytes(self) -> int:
        """How much memory it takes at most."""
        return self._bytes

    def serves(self, fused: Network, problem: Problem) -> bool:
        """Tell whether all that is wanted for a fused network was kept."""
        if [*map(id, problem.networks)] != [*map(id, self.problem.networks)]:
            return False
        shapes = [
            {name: t.shape for name, t in n.module.state_dict().items() if isinstance(t, Tensor)}
            for n in (fused, self.problem.structure)
        ]
        batches = {len(self._rows.get(name, ())) for name in self.aims} | {len(self._outputs)}
        return shapes[0] == shapes[1] and batches == {len(self.numbers)}

    def outputs(self, batch: int) -> Rows:
        """Return the networks' outputs for a batch, None where they cannot be logits."""
        return self._outputs[batch]

    def target(self, name: str) -> tuple[Positions, list[tuple[int, ...]], list[Rows]]:
        """Return the positions of a contraction, and the shapes and values of each batch."""
        return self._drawn[name], self._shapes[name], self._rows[name]

    def release(self, name: str) -> None:
        """Forget what was kept of a contraction."""
        self._rows.pop(name, None)


@dataclass(frozen=True)
class Informed(Refit):
    """A refit that uses values which were kept.

    Attributes:
        refit: The refit.
        call: The same, with these values.
    """

    refit: Refit
    call: Callable[..., Outcome]

    def settles(self, problem: Problem) -> dict[str, int]:
        """Return what the refit does."""
        return self.refit.settles(problem)

    def samples(self, networks: Sequence[Network]) -> int:
        """Return what the refit does."""
        return self.refit.samples(networks)

    def __call__(
        self,
        fused: Network,
        couplings: Couplings,
        plans: Sequence[NormPlan | WeightPlan],
        data: Calibration,
        samples: int,
    ) -> Outcome:
        """Refit in place; see `Refit`."""
        return self.call(fused, couplings, plans, data, samples)


class KeptParents:
    """What is wanted of the fused network's contractions, from values that were kept.

    Args:
        targets: Mixes the networks' values.
        kept: The values.
        visits: The guests among the networks.
        again: Whether values are asked for again later.
    """

    def __init__(self, targets: Targets, kept: KeptRows, visits: Visits, again: bool) -> None:
        self.targets, self.kept, self.visits, self.again = targets, kept, visits, again
        couplings = targets.couplings
        count = len(couplings.problem.networks)
        self._has_say = [contributes(couplings, k) for k in range(count)]

    def goal(self, aim: Aim) -> Goal:
        """Return what is wanted of a contraction."""
        problem, name = self.targets.problem, aim.producer.node
        axis = aim.axis_in(problem.networks[0])
        sample, shapes, batches = self.kept.target(name)
        if not self.again:
            self.kept.release(name)
        batches = [[r if s else None for r, s in zip(rows, self._has_say)] for rows in batches]
        values = sample.joined([self._mixed(aim, rows) for rows in batches])
        activated = None
        if aim.activation is not None:
            acted = [[self._act(aim, k, r) for k, r in enumerate(rows)] for rows in batches]
            activated = sample.joined([self._mixed(aim, rows) for rows in acted])
        told = self.visits.said(aim.at, axis, sample, values)
        among(values, told)
        if activated is not None:
            among(activated, [(w, self._acted(aim, problem.anchor, said)) for w, said in told])
        return Goal(sample, shapes, values, activated)

    def _mixed(self, aim: Aim, rows: Sequence[Tensor | None]) -> Tensor:
        axis = aim.axis_in(self.targets.problem.networks[0])
        return self.targets.mix(aim.at, aim.producer.weight, axis, rows, -1)

    def _act(self, aim: Aim, k: int, rows: Tensor | None) -> Tensor | None:
        return None if rows is None else self._acted(aim, k, rows)

    def _acted(self, aim: Aim, k: int, rows: Tensor) -> Tensor:
        """Return what one network's activation behind a contraction makes of values."""
        network = self.targets.problem.networks[k]
        node = network.nodes[str(aim.activation)]
        return Run(network, network.example).apply(node, node.all_input_nodes[0], rows)

    def outputs(self, batch: int) -> list[tuple[float, Any]]:
        """Return the shares and outputs of all that have a share."""
        guests = self.visits.outputs(batch)
        left = 1 - sum(share for share, _ in guests)
        outputs = zip(self.targets.problem.output_weights, self.kept.outputs(batch), self._has_say)
        own = [(left * w, value) for w, value, says in outputs if says]
        return [(share, value) for share, value in (*own, *guests) if share]
