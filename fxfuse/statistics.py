"""Run networks over calibration data and hand each wanted value to a reducer as it appears.

Values are freed as soon as nothing reads them any more, so what is held is the frontier of the run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .data import Batch, Calibration
from .errors import DataError
from .network import Network
from .tracing import Interpreter, device_of, tensors_in

Bypass = Mapping[str, tuple[str, bool]]
CACHED_BYTES = 1 << 22  # of the largest value of a batch: what fits a cache is worked on faster
BATCH_BYTES, BATCH_SAMPLES, FEWEST = 1 << 24, 128, 4


def record(
    network: Network, batch: Batch, reducers: Mapping[str, Callable[[Tensor], Any]]
) -> dict[str, Any]:
    """Run one batch and return what the reducer of each named node makes of its value."""
    found: dict[str, Any] = {}
    waiting = set(reducers)
    size = working_batch([network])
    runs = [Run(network, part) for part in zip(*(t.split(size) for t in batch))] if waiting else []
    with torch.no_grad():
        for node in network.module.graph.nodes if runs else ():
            values = [run.step(node) for run in runs]
            if node.name in waiting:
                waiting.discard(node.name)
                found[node.name] = reducers[node.name](torch.cat(values))
            if not waiting:
                break
    return found


def batch_size(networks: Sequence[Network], budget: int, most: int, least: int = 1) -> int:
    """Return how many samples fit a budget of bytes for the largest value of any network."""
    largest = 1
    for network in networks:
        samples = len(network.example[0])
        sizes = [math.prod(s) for s in network.book.shapes.values() if s]
        largest = max(largest, 4 * max(sizes) // samples)
    return max(least, min(most, budget // largest))


def working_batch(networks: Sequence[Network]) -> int:
    """Return how many samples are run at a time where the size of batches does not matter."""
    if any(device_of(network.module).type != "cpu" for network in networks):
        return batch_size(networks, BATCH_BYTES, BATCH_SAMPLES)
    fewest = batch_size(networks, BATCH_BYTES, FEWEST)
    return batch_size(networks, CACHED_BYTES, BATCH_SAMPLES, fewest)


def walk(
    networks: Sequence[Network],
    batch: Batch,
    visit: Callable[[fx.Node, list[Any]], None],
    bypass: Sequence[Bypass] | None = None,
) -> None:
    """Advance networks of one structure together through one batch, node by node, in eval mode.

    Args:
        networks: Networks whose graphs correspond node for node.
        batch: Input tensors on any device.
        visit: Called with each node of the first network and its value in every network.
        bypass: Per network, nodes that are not run, the layers a network does not have: the
            node whose value they hand on, and whether this node holds it (None otherwise).
    """
    bypass = bypass or [{}] * len(networks)
    runs = [Run(n, batch, b) for n, b in zip(networks, bypass)]
    with torch.no_grad():
        for nodes in zip(*(n.module.graph.nodes for n in networks)):
            values = [run.step(node) for run, node in zip(runs, nodes)]
            visit(nodes[0], values)


def relative_error_on(data: Calibration, model: Network, other: Network) -> float:
    """Return the root mean square error of a network's outputs, relative to a model's outputs."""
    wrong = power = 0.0
    device = device_of(model.module)
    for network in (model, other):
        network.module.eval()
    with torch.no_grad():
        for batch in data.chunks(working_batch([model, other])):
            inputs = [t.to(device) for t in batch]
            pair = [tensors_in(n.module(*inputs)) for n in (model, other)]
            for a, b in zip(*pair):
                if a.is_floating_point():
                    wrong += float((a.double() - b.double()).square().sum())
                    power += float(a.double().square().sum())
    return float((wrong / max(power, 1e-300)) ** 0.5)


class Run(Interpreter):
    """One network on its way through one batch, in eval mode.

    Args:
        network: The network.
        batch: Input tensors.
        bypass: See `walk`.
        order: The order in which its nodes will be stepped over, if not that of the graph.
    """

    def __init__(
        self,
        network: Network,
        batch: Batch,
        bypass: Bypass | None = None,
        order: Sequence[fx.Node] | None = None,
    ) -> None:
        super().__init__(network.module, garbage_collect_values=order is None)
        if order is not None:
            self.user_to_last_uses = _last_uses(order)
        self.network, self.bypass = network, bypass or {}
        self.held: dict[str, Any] = {}
        self.waiting = Counter(source for source, _ in self.bypass.values())
        device = device_of(network.module)
        self.samples = len(batch[0])
        self.args_iter = iter([t.to(device) for t in batch])
        network.module.eval()

    def step(self, node: fx.Node, given: Any = None) -> Any:
        """Run one node, or take over the value that it hands on, and free what is read no more.

        Args:
            node: The next node.
            given: Its value, if that is known already.
        """
        if given is not None:
            value = given
        elif node.name not in self.bypass:
            value = self._run(node)
        else:
            source, carries = self.bypass[node.name]
            if source not in self.held and self.is_live(source):
                self.held[source] = self.value_of(source)
            value = self.held[source] if carries else None
            self.waiting[source] -= 1
            if not self.waiting[source]:
                self.held.pop(source, None)
        self.env[node] = value
        for dead in self.user_to_last_uses.get(node, []):
            self.env.pop(dead, None)
        return value

    def value_of(self, name: str) -> Any:
        """Return the value of a node that is still live."""
        return next(value for node, value in self.env.items() if node.name == name)

    def is_live(self, name: str) -> bool:
        """Tell whether the value of a node is known and still to be read."""
        return any(node.name == name for node in self.env)

    def values(self) -> list[Any]:
        """Return all that is held."""
        return [*self.env.values(), *self.held.values()]

    def exchange(self, other: Callable[[Any], Any]) -> None:
        """Hold something else for each value."""
        self.env = {node: other(value) for node, value in self.env.items()}
        self.held = {name: other(value) for name, value in self.held.items()}

    def peek(self, node: fx.Node) -> Any:
        """Return what a node would give now, without stepping over it."""
        return self._run(node)

    def apply(self, node: fx.Node, source: fx.Node, value: Tensor) -> Tensor:
        """Return what a node would give if one that it reads had another value."""
        known = self.env.get(source)
        self.env[source] = value.clone()  # it may be written in place
        try:
            found: Tensor = self._run(node)
            return found
        finally:
            self.env.pop(source)
            if known is not None:
                self.env[source] = known

    def _run(self, node: fx.Node) -> Any:
        try:
            return self.run_node(node)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"a batch that the network refuses: {error}",
                where=f"node '{node.name}' of {self.network.name}",
                expected="batches like the first one, all that every network takes",
                do="check the shape and type of every batch of `data`",
            ) from error


def _last_uses(order: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node, those that nothing behind it in the order reads any more."""
    seen: set[fx.Node] = set()
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(order):
        dead = [n for n in dict.fromkeys(node.all_input_nodes) if n not in seen]
        found[node] = dead
        seen.update(dead)
    return found
