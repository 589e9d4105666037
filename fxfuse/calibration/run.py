"""Run networks over calibration data, node by node, and hand values to whoever wants them.

`record` and `run_over` run a network through; a `Track` takes it from stop to stop, all batches to
the same nodes. A value is freed as soon as nothing reads it any more, so that only the frontier of
a run is held; at a stop, what exceeds a memory budget of it waits in a temporary file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import DataError
from ..graph.state import device_of
from ..graph.structures import tensors_in
from ..graph.trace import Interpreter
from ..spaces.network import Network
from .counted import Counted, Served
from .data import Calibration
from .shares import Batch
from .spill import SpillStore, Waiting, addresses_of

# Nodes that are not run, because the network does not have their layer -> the entry of this layer,
# and whether the node has the entry's value. The layer's last node has it, so that the value passes
# by the layer; the nodes inside have no value.
Bypass = Mapping[str, tuple[str, bool]]

# Of the largest value of a batch: what fits a cache is worked on faster. No fewer than `FEWEST`
# samples are run at a time, unless these need more than `BATCH_BYTES`.
CACHED_BYTES, BATCH_BYTES = 1 << 22, 1 << 24
BATCH_SAMPLES, FEWEST = 128, 4
READINGS = 2  # of weights take as long as one of values; each batch reads all weights


def record(
    network: Network, batch: Batch, reducers: Mapping[str, Callable[[Tensor], Any]]
) -> dict[str, Any]:
    """Run one batch and return what a function makes of the value of each named node.

    Args:
        network: The network.
        batch: Input tensors.
        reducers: By the names of nodes, a function of the value.
    """
    reduced: dict[str, Any] = {}
    waiting = set(reducers)
    size = working_batch([network])
    cut = [batch] if Served.is_whole(batch) else zip(*(t.split(size) for t in batch))
    runs = [Run(network, part) for part in cut] if waiting else []
    with torch.no_grad():
        for node in network.module.graph.nodes if runs else ():
            values = [run.step(node) for run in runs]
            if node.name in waiting:
                waiting.discard(node.name)
                joined = _joined(values, runs, network.samples_axes(node))
                reduced[node.name] = reducers[node.name](joined)
            if not waiting:
                break
    return reduced


def _joined(values: Sequence[Any], runs: Sequence[Run], axes: Sequence[int]) -> Tensor:
    """Return what runs over parts of a batch computed as one tensor, the samples first.

    Of the axes that can hold them, it is the first that has as many as the batch: the last state of
    a recurrent layer has its samples behind its layers.

    Several tensors (a tuple, a dictionary, a data class) become the features of one `(samples,
    features)`, as far as they have a row for each sample.
    """
    if all(isinstance(value, Tensor) and value.dim() for value in values):
        axes = [a for a in axes if values[0].shape[a] == runs[0].samples] or [0]
        return torch.cat([value.movedim(axes[0], 0) for value in values])
    parts = []
    for value, run in zip(values, runs):
        tensors = [t for t in tensors_in(value) if t.dim() and len(t) == run.samples]
        rows = [t.reshape(len(t), -1).float() for t in tensors] or [torch.zeros(run.samples, 1)]
        parts.append(torch.cat(rows, 1))
    return torch.cat(parts)


def batch_size(networks: Sequence[Network], budget: int, most: int, least: int = 1) -> int:
    """Return how many samples to run at a time.

    Args:
        networks: The networks that run.
        budget: Bytes that the largest value of any network may take.
        most: Never more samples.
        least: Never fewer samples.
    """
    largest = 1
    for network in networks:
        samples = len(network.example[0])
        sizes = [math.prod(s) for s in network.shapes.values() if s]
        largest = max(largest, 4 * max(sizes) // samples)
    return max(least, min(most, budget // largest))


def working_batch(networks: Sequence[Network]) -> int:
    """Return how many samples are run at a time where the size of batches does not matter."""
    if any(device_of(network.module).type != "cpu" for network in networks):
        return batch_size(networks, BATCH_BYTES, BATCH_SAMPLES)
    fewest = batch_size(networks, BATCH_BYTES, max(FEWEST, _samples_per_reading(networks)))
    return batch_size(networks, CACHED_BYTES, BATCH_SAMPLES, fewest)


def _samples_per_reading(networks: Sequence[Network]) -> int:
    """Return for how many samples weights have to be read once, not to take longer than values."""
    samples = 1
    for network in networks:
        values = sum(map(math.prod, network.shapes.values())) / len(network.example[0])
        weights = sum(p.numel() for p in network.module.parameters())
        samples = max(samples, min(int(READINGS * weights / max(values, 1)), BATCH_SAMPLES))
    return samples


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
        visit: Called with each node of the first network and its value in every network, None
            where a network has none.
        bypass: Per network, the nodes that are not run, because it does not have their layer.
    """
    bypass = bypass or [{}] * len(networks)
    runs = [Run(n, batch, b) for n, b in zip(networks, bypass)]
    with torch.no_grad():
        for nodes in zip(*(n.module.graph.nodes for n in networks)):
            values = [run.step(node) for run, node in zip(runs, nodes)]
            visit(nodes[0], values)


class Run(Interpreter):
    """One network on its way through one batch, in eval mode.

    Args:
        network: The network.
        batch: Input tensors.
        bypass: The nodes that are not run, because the network does not have their layer.
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
        self._entries: dict[str, Any] = {}  # values that bypassed nodes will have
        self._updated: dict[str, Tensor] = {}  # buffers that the run may write to
        self._users = Counter(entry for entry, _ in self.bypass.values())
        self._missing: set[fx.Node] = set()  # nodes without a value
        device = device_of(network.module)
        self.args_iter = iter([t.to(device) for t in batch])
        self.samples, self.counted = len(batch[0]), Counted.of(batch)
        network.module.eval()

    def step(self, node: fx.Node) -> Any:
        """Run the next node, free what is read no more, and return the node's value.

        What is made of a value inside a layer that is passed by, as its size, has no value either.
        """
        if node.name in self.bypass:
            value = self._passed_by(node)
        elif self._missing.isdisjoint(node.all_input_nodes):
            value = self.peek(node)
        else:
            value = None
            self._missing.add(node)
        self.env[node] = value
        for unread in self.user_to_last_uses.get(node, []):
            self.env.pop(unread, None)
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return an attribute; of a buffer that the network writes to, this run's own copy."""
        value = super().get_attr(target, args, kwargs)
        if target in self.network.updated:
            value = self._updated.setdefault(target, value.clone())
        return value

    def _passed_by(self, node: fx.Node) -> Any:
        """Return the value of a node that is not run."""
        entry, has_value = self.bypass[node.name]
        if entry not in self._entries and any(n.name == entry for n in self.env):
            self._entries[entry] = self.value_of(entry)
        value = self._entries[entry] if has_value else None
        if not has_value:
            self._missing.add(node)
        self._users[entry] -= 1
        if not self._users[entry]:
            self._entries.pop(entry, None)
        return value

    def lacks(self, name: str) -> bool:
        """Tell whether a node is passed by, or reads what has no value."""
        read = self.network.nodes[name].all_input_nodes
        return name in self.bypass or not self._missing.isdisjoint(read)

    def value_of(self, name: str) -> Any:
        """Return the value of a node that is still to be read."""
        return next(value for node, value in self.env.items() if node.name == name)

    @property
    def values(self) -> list[Any]:
        """All values that are held; others may be put in their places, in the same order."""
        return [*self.env.values(), *self._entries.values()]

    @values.setter
    def values(self, values: Sequence[Any]) -> None:
        count = len(self.env)
        self.env = dict(zip(self.env, values[:count]))
        self._entries = dict(zip(self._entries, values[count:]))

    def peek(self, node: fx.Node) -> Any:
        """Return what a node gives, without stepping over it."""
        try:
            return self.run_node(node)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"a batch that the network refuses: {error}",
                where=f"node '{node.name}' of {self.network.name}",
                expected="batches like the first one, all that every network takes",
                do="check the shape and type of every batch of `data`",
            ) from error

    def apply(self, node: fx.Node, source: fx.Node, value: Tensor) -> Tensor:
        """Return what a node would give if one that it reads had another value."""
        live, before = source in self.env, self.env.get(source)
        self.env[source] = value.clone()  # the node may write to it
        try:
            result: Tensor = self.peek(node)
            return result
        finally:
            self.env.pop(source)
            if live:
                self.env[source] = before


def run_past(network: Network, batch: Batch, bypass: Bypass) -> list[Tensor]:
    """Return the output tensors for one batch, with some layers passed by."""
    run = Run(network, batch, bypass)
    value = None
    with torch.no_grad():
        for node in network.module.graph.nodes:
            value = run.step(node)
    return tensors_in(value)


def _last_uses(order: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node, those that nothing behind it in the order reads any more."""
    read_later: set[fx.Node] = set()
    last_read_by: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(order):
        last_read_by[node] = [n for n in dict.fromkeys(node.all_input_nodes) if n not in read_later]
        read_later.update(node.all_input_nodes)
    return last_read_by


Watch = Callable[[Run, fx.Node, Any], None]


class Track:
    """One network on its way over the first samples.

    Args:
        network: The network to run.
        data: Calibration inputs.
        samples: How many of the first ones; each process takes its own of them.
        size: How many of them are one batch.
        order: The order in which its nodes are run.
        store: Where its values wait between stops.
        bypass: Nodes that are not run, see `Run`.

    Attributes:
        samples: How many samples there are, of all processes together.
        numbers: Those of the samples of each batch, among them.
        sizes: How many samples each batch has.
    """

    def __init__(
        self,
        network: Network,
        data: Calibration,
        samples: int,
        size: int,
        order: Sequence[fx.Node],
        store: SpillStore,
        bypass: Bypass | None = None,
    ) -> None:
        self.network, self.order, self.store = network, order, store
        self.bypass, self.data = bypass, data.first(samples)
        size = self.data.at_a_time(size)
        self.samples, self.numbers = self.data.samples, self.data.numbers.split(size)
        self.sizes = [len(numbers) for numbers in self.numbers]
        self._size = size
        self._runs: list[Run] = []
        self._passed: list[int] = []  # number of nodes that each batch has passed
        self._waiting: dict[int, Waiting] = {}
        self._parameters = addresses_of(network.module)
        self._batches: Iterator[Batch] | None = None

    def go(self, batch: int, upto: int, watch: Watch | None = None) -> tuple[Run, Any]:
        """Run a batch from where it waits over the nodes before a place in the order.

        Args:
            batch: Which; batches set out in order.
            upto: Number of nodes to have passed.
            watch: Called with the run, each node on the way, and its value.

        Returns:
            The run, and the value of the last node it passed; None if it passed none now.
        """
        if batch == len(self._runs):
            self._set_out()
        run = self._runs[batch]
        if batch in self._waiting:
            run.values = self.store.take(self._waiting.pop(batch))
        value = None
        for node in islice(self.order, self._passed[batch], upto):
            value = run.step(node)
            if watch is not None:
                watch(run, node, value)
        self._passed[batch] = max(upto, self._passed[batch])
        return run, value

    def rest(self, batch: int) -> None:
        """Let a batch wait until it goes on."""
        run = self._runs[batch]
        waiting = self._waiting[batch] = self.store.put(run.values, self._parameters)
        run.values = waiting.values

    def _set_out(self) -> None:
        """Start a run for the next batch."""
        self._batches = self._batches or self.data.own(self._size)
        inputs = next(self._batches)
        copies = [t.clone() for t in inputs]  # batches may be parts of one tensor
        copied = inputs.like(copies) if isinstance(inputs, Served) else tuple(copies)
        self._runs.append(Run(self.network, copied, self.bypass, self.order))
        self._passed.append(0)
