"""The networks that are fused, on their way over the data together, and what they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from .data import Calibration
from .refit import start
from .statistics import Run
from .targets import Aim, Targets


@dataclass(frozen=True, eq=False)
class Goal:
    """What a contraction of the fused network has to give, of one batch.

    Attributes:
        value: The mean of the networks' values where the contraction's effect is complete.
        acted: The mean of what the activation behind it makes of them, if it alone reads them.
    """

    value: Tensor
    acted: Tensor | None


class Parents:
    """The networks on their way, a step ahead of the fused one where its targets ask for it."""

    def __init__(
        self,
        targets: Targets,
        order: Sequence[fx.Node],
        aims: dict[str, Aim],
        data: Calibration,
        samples: int,
    ) -> None:
        self.targets, self.at = targets, {a.at: a for a in aims.values()}
        networks = targets.mixer.balanced.networks
        self.orders, self.runs = [], []
        place = {node.name: i for i, node in enumerate(order)}
        for network, bypass in zip(networks, targets.bypasses):
            nodes = sorted(network.module.graph.nodes, key=lambda n: place[n.name])
            self.orders.append(nodes)
            self.runs.append(start(network, data, samples, nodes, bypass))
        self.done = 0
        self.caught: dict[str, list[Goal]] = {}
        self.outputs: list[list] = []

    def goals(self, node: str) -> list[Goal]:
        """Return what is wanted at a node, batch by batch; it is forgotten."""
        while node not in self.caught:
            self.advance()
        return self.caught.pop(node)

    def advance(self) -> None:
        """Take one step with all networks."""
        values = []
        for runs, order in zip(self.runs, self.orders):
            values.append([run.step(order[self.done]) for run in runs])
        node = self.orders[0][self.done]
        aim = self.at.get(node.name)
        if aim is not None:
            self.caught[node.name] = [
                self._mixed(aim, runs, batch) for runs, batch in zip(zip(*self.runs), zip(*values))
            ]
        if node.op == "output":
            self.outputs = values
        self.done += 1

    def _mixed(self, aim: Aim, runs: Sequence[Run], values: Sequence[Tensor | None]) -> Goal:
        """Return what is wanted of one batch, from each network's value there."""
        where = aim.at, aim.producer.weight, aim.axis_in(self.targets.mixer.balanced.networks[0])
        mean = self.targets.mix(*where, values)
        if aim.through is None:
            return Goal(mean, None)
        place = next(i for i, n in enumerate(self.orders[0]) if n.name == aim.through)
        acted: list[Tensor | None] = []
        for run, order, value in zip(runs, self.orders, values):
            source = run.network.inputs_of(order[place])[0]
            acted.append(None if value is None else run.apply(order[place], source, value))
        return Goal(mean, self.targets.mix(*where, acted))

    def finish(self) -> list[list]:
        """Go on to the end; return what each network gives for each batch."""
        while self.done < len(self.orders[0]):
            self.advance()
        return self.outputs
