"""Networks on their way over all batches, which rest between stops: in memory or in a file.

Between two stops each batch is taken along by itself, so that what is held of all batches is no
more than what is still to be read at a stop, the frontier. Beyond a budget it lies in a temporary
file, which has no name and is gone with the process, whatever happens.

Run networks over calibration data and hand each wanted value to a reducer as it appears.

Values are freed as soon as nothing reads them any more, so what is held is the frontier of the run.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import DataError
from ..graph.trace import Interpreter, device_of
from ..spaces.network import Network
from .data import Batch, Calibration

Watch = Callable[[fx.Node, Any], None]


@dataclass(frozen=True, eq=False)
class _Away:
    """A tensor whose storage lies in the file."""

    storage: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a storage lies in the file, and on which device it was."""

    start: int
    size: int
    device: torch.device


class Frontier:
    """What runs hold at a stop: in memory up to a budget, the rest in a temporary file.

    A run keeps its place as long as its values fit, so of many runs that are taken along in turn
    the first stay in memory. What shares memory shares it afterwards as well.

    Args:
        budget: Bytes to keep in memory.
    """

    def __init__(self, budget: int) -> None:
        self.room = budget
        self._kept: dict[Run, int] = {}
        self._away: dict[Run, list[_Place]] = {}
        self._file: Any = None
        self._end = 0
        self._free: dict[int, list[int]] = {}  # size -> places in the file
        self._owned: dict[fx.GraphModule, set[int]] = {}

    def __enter__(self) -> Frontier:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def rest(self, run: Run) -> None:
        """Let a run rest until `wake`."""
        storages = self._storages(run)
        size = sum(s.nbytes() for s in storages.values())
        if size <= self.room:
            self.room -= size
            self._kept[run] = size
            return
        self._away[run] = [self._write(s) for s in storages.values()]
        number = {pointer: i for i, pointer in enumerate(storages)}

        def away(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.layout != torch.strided:
                return value
            at = number.get(value.untyped_storage().data_ptr())
            if at is None:
                return value
            layout = int(value.storage_offset()), tuple(value.shape), value.stride()
            return _Away(at, value.dtype, *layout)

        run.exchange(lambda value: tree_map(away, value))

    def wake(self, run: Run) -> None:
        """Bring back what a resting run holds."""
        if run in self._kept:
            self.room += self._kept.pop(run)
            return
        storages = [self._read(place) for place in self._away.pop(run, ())]

        def back(value: Any) -> Any:
            if not isinstance(value, _Away):
                return value
            storage = storages[value.storage]
            empty = torch.empty(0, dtype=value.dtype, device=storage.device)
            return empty.set_(storage, value.offset, value.shape, value.stride)

        run.exchange(lambda value: tree_map(back, value))

    def _storages(self, run: Run) -> dict[int, torch.UntypedStorage]:
        """Return the memory of what a run holds, each piece once, without the network's own."""
        module = run.network.module
        if module not in self._owned:
            own = [*module.parameters(), *module.buffers()]
            self._owned[module] = {t.untyped_storage().data_ptr() for t in own}
        found = {}
        for value in tree_leaves(list(run.values())):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                storage = value.untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in self._owned[module]:
                    found[storage.data_ptr()] = storage
        return found

    def _write(self, storage: torch.UntypedStorage) -> _Place:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed on exit)
        size, free = storage.nbytes(), self._free.get(storage.nbytes())
        start = free.pop() if free else self._end
        self._end = max(self._end, start + size)
        raw = _bytes_of(storage).cpu().numpy().data
        try:
            self._file.seek(start)
            while raw:  # one call may write less than all
                raw = raw[self._file.write(raw) :]
        except OSError as error:
            raise _no_room(self._end, error) from error
        return _Place(start, size, storage.device)

    def _read(self, place: _Place) -> torch.UntypedStorage:
        found = np.empty(place.size, np.uint8)
        raw = found.data
        self._file.seek(place.start)
        while raw:
            count = self._file.readinto(raw)
            if not count:
                raise OSError("the temporary file ends before what was written to it")
            raw = raw[count:]
        self._free.setdefault(place.size, []).append(place.start)
        return torch.from_numpy(found).to(place.device).untyped_storage()


def _no_room(size: int, error: OSError) -> DataError:
    return DataError(
        f"a temporary file of {size / 2**30:.1f} GiB that cannot be written ({error})",
        where=f"{tempfile.gettempdir()}, for values of all samples between two layers",
        expected="room for what exceeds the memory that the refit may take",
        do="give more memory, LeastSquares(frontier=...), a larger disk, TMPDIR, or less samples",
    )


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Track:
    """One network on its way over the first samples, from stop to stop.

    Args:
        network: The network to run.
        data: Calibration inputs.
        samples: How many of the first ones.
        size: How many of them are one batch.
        order: As for `statistics.Run`.
        frontier: Where its runs rest.
        bypass: As for `statistics.Run`.

    Attributes:
        sizes: Samples of each batch.
    """

    def __init__(
        self,
        network: Network,
        data: Calibration,
        samples: int,
        size: int,
        order: Sequence[fx.Node],
        frontier: Frontier,
        bypass: Bypass | None = None,
    ) -> None:
        self.network, self.order, self.frontier = network, order, frontier
        self.bypass, self.data = bypass, data
        self.sizes = [min(size, samples - start) for start in range(0, samples, size)]
        self._size = size
        self._runs: list[tuple[Run, int]] = []  # each with the number of nodes it has passed
        self._batches: Iterator[Batch] | None = None

    def go(self, batch: int, upto: int, watch: Watch | None = None) -> tuple[Run, Any]:
        """Wake a batch, and step it over the nodes before a place in the order.

        Args:
            batch: Which; batches set out in order.
            upto: Number of nodes to have passed.
            watch: Called with each node on the way, and its value.

        Returns:
            The run, and the value of the last node it passed; None if it passed none now.
        """
        if batch == len(self._runs):
            self._set_out()
        run, passed = self._runs[batch]
        self.frontier.wake(run)
        value = None
        for node in islice(self.order, passed, upto):
            value = run.step(node)
            if watch is not None:
                watch(node, value)
        self._runs[batch] = run, max(upto, passed)
        return run, value

    def rest(self, batch: int) -> None:
        """Let a batch rest."""
        self.frontier.rest(self._runs[batch][0])

    def _set_out(self) -> None:
        self._batches = self._batches or self.data.chunks(self._size)
        inputs, count = next(self._batches), self.sizes[len(self._runs)]
        own = tuple(t[:count].clone() for t in inputs)  # batches may be parts of one tensor
        run = Run(self.network, own, self.bypass, self.order)
        self._runs.append((run, 0))


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
