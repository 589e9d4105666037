"""Networks on their way over all batches, which rest between stops: in memory or in a file.

Between two stops each batch is taken along by itself, so that what is held of all batches is no
more than what is still to be read at a stop, the frontier. Beyond a budget it lies in a temporary
file, which has no name and is gone with the process, whatever happens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from .data import Batch, Calibration
from .errors import DataError
from .network import Network
from .statistics import Bypass, Run

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
