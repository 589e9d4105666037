"""The networks that are fused, on their way over the data together, and what they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from .data import Calibration
from .refit import start
from .statistics import Run
from .targets import Aim, Targets, inverted


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
        self.caught: dict[str, list[Tensor]] = {}
        self.outputs: list[list[Any]] = []

    def target(self, node: str) -> list[Tensor]:
        """Return the target at a node, batch by batch; it is forgotten."""
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

    def _mixed(self, aim: Aim, runs: Sequence[Run], values: Sequence[Tensor | None]) -> Tensor:
        """Return the target of one batch from each network's value there."""
        dim = aim.axis_in(self.targets.mixer.balanced.networks[0])
        where = aim.at, aim.producer.weight, dim
        mean = self.targets.mix(*where, values)
        if aim.through is None:
            return mean
        place = next(i for i, n in enumerate(self.orders[0]) if n.name == aim.through)

        def act(k: int, value: Tensor) -> Tensor:
            node = self.orders[k][place]
            return runs[k].apply(node, runs[k].network.inputs_of(node)[0], value)

        acts = [None if v is None else act(k, v) for k, v in enumerate(values)]
        return inverted(lambda t: act(0, t), self.targets.mix(*where, acts), mean)

    def finish(self) -> list[list[Any]]:
        """Go on to the end; return what each network gives for each batch."""
        while self.done < len(self.orders[0]):
            self.advance()
        return self.outputs
