"""The networks that are fused, on their way over the data together, and what they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from .data import Calibration
from .mixing import Mixer
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
        self.orders: list[list[fx.Node]] = []
        self.runs: list[list[Run] | None] = []
        place = {node.name: i for i, node in enumerate(order)}
        for k, (network, bypass) in enumerate(zip(networks, targets.bypasses)):
            nodes = sorted(network.module.graph.nodes, key=lambda n: place[n.name])
            self.orders.append(nodes)
            silent = _silent(targets.mixer, k)
            given = data, samples, nodes, bypass, networks
            runs = None if silent else start(network, *given)
            self.runs.append(runs)
        self.batches = max(len(runs) for runs in self.runs if runs is not None)
        self.done = 0
        self.caught: dict[str, list[Goal]] = {}
        self.outputs: list[list[Any]] = []

    def goals(self, node: str) -> list[Goal]:
        """Return what is wanted at a node, batch by batch; it is forgotten."""
        while node not in self.caught:
            self.advance()
        return self.caught.pop(node)

    def advance(self) -> None:
        """Take one step with all networks."""
        values: list[list[Any]] = []
        for runs, order in zip(self.runs, self.orders):
            node = order[self.done]
            values.append([None] * self.batches if runs is None else [r.step(node) for r in runs])
        node = self.orders[0][self.done]
        aim = self.at.get(node.name)
        if aim is not None:
            self.caught[node.name] = [self._mixed(aim, *each) for each in enumerate(zip(*values))]
        if node.op == "output":
            self.outputs = values
        self.done += 1

    def _mixed(self, aim: Aim, batch: int, values: Sequence[Tensor | None]) -> Goal:
        """Return what is wanted of one batch, from each network's value there."""
        where = aim.at, aim.producer.weight, aim.axis_in(self.targets.mixer.balanced.networks[0])
        mean = self.targets.mix(*where, values)
        if aim.through is None:
            return Goal(mean, None)
        place = next(i for i, n in enumerate(self.orders[0]) if n.name == aim.through)
        acted: list[Tensor | None] = []
        for runs, order, value in zip(self.runs, self.orders, values):
            if runs is None or value is None:
                acted.append(None)
                continue
            run, node = runs[batch], order[place]
            acted.append(run.apply(node, run.network.inputs_of(node)[0], value))
        return Goal(mean, self.targets.mix(*where, acted))

    def finish(self) -> list[list[Any]]:
        """Go on to the end; return what each network gives for each batch."""
        while self.done < len(self.orders[0]):
            self.advance()
        return self.outputs


def _silent(mixer: Mixer, k: int) -> bool:
    """Tell whether a network gives nothing, but a structure at most."""
    gives = any(c.given.any() for (_, j), c in mixer.couplings.items() if j == k)
    return not (mixer.weights[k] or mixer.output_weights[k] or gives)
