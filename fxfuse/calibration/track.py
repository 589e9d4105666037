"""A network on its way over many batches, from stop to stop.

All batches stop at the same nodes. At a stop, each batch holds only the values that later nodes
read, the frontier of its run. What exceeds a memory budget waits in a temporary file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch import fx

from ..spaces.network import Network
from .data import Batch, Calibration
from .run import Bypass, Run
from .spill import SpillStore, Waiting, addresses_of

Watch = Callable[[fx.Node, Any], None]


class Track:
    """One network on its way over the first samples.

    Args:
        network: The network to run.
        data: Calibration inputs.
        samples: How many of the first ones.
        size: How many of them are one batch.
        order: The order in which its nodes are run.
        store: Where its values wait between stops.
        bypass: Nodes that are not run, see `Run`.

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
        store: SpillStore,
        bypass: Bypass | None = None,
    ) -> None:
        self.network, self.order, self.store = network, order, store
        self.bypass, self.data = bypass, data
        self.sizes = [min(size, samples - start) for start in range(0, samples, size)]
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
            watch: Called with each node on the way, and its value.

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
                watch(node, value)
        self._passed[batch] = max(upto, self._passed[batch])
        return run, value

    def rest(self, batch: int) -> None:
        """Let a batch wait until it goes on."""
        run = self._runs[batch]
        waiting = self._waiting[batch] = self.store.put(run.values, self._parameters)
        run.values = waiting.values

    def _set_out(self) -> None:
        """Start a run for the next batch."""
        self._batches = self._batches or self.data.chunks(self._size)
        inputs, count = next(self._batches), self.sizes[len(self._runs)]
        copies = tuple(t[:count].clone() for t in inputs)  # batches may be parts of one tensor
        self._runs.append(Run(self.network, copies, self.bypass, self.order))
        self._passed.append(0)
