"""Which process of a run has which samples.

If all processes read the same samples, as one script with a tensor or a loader does, they are dealt
out: sample `i` belongs to process `i` modulo their number, as `DistributedSampler` deals them. If
each reads samples of its own, as from a loader with such a sampler, these are its share. Samples
are numbered as if one process read one of each share in turn.
"""

from __future__ import annotations

import zlib
from collections import Counter
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .._ranks import gathered, rank, world
from ..errors import DataError

Batch = tuple[Tensor, ...]


class Dealing:
    """Finds out, while data are read, whether all processes read the same.

    Attributes:
        read: A checksum of each sample that this process has read.
        alike: Whether all processes read the same; None while nothing is read.
    """

    def __init__(self) -> None:
        self.read: list[int] = []
        self.alike: bool | None = None

    def own(self, inputs: Batch, whole: bool = False) -> Batch:
        """Return the samples of the next batch that belong to this process.

        Args:
            inputs: The batch.
            whole: Whether it is one sample.

        Raises:
            DataError: If batches are samples, and there are several processes.
        """
        if whole and world() > 1:
            raise DataError(
                "batches that cannot be cut, as graphs, in several processes",
                where="the argument `data`",
                expected="one process, or tensors with a first axis of samples",
                do="run it in one process",
            )
        if whole:
            self.read.append(0)
            return inputs
        if world() == 1:
            self.read += [0] * len(inputs[0])
            return inputs
        start = len(self.read)
        self.read += [reduce(lambda before, t: checksum(t, before), row, 0) for row in zip(*inputs)]
        if self.alike is None:
            first = gathered(torch.tensor(self.read))
            self.alike = all(torch.equal(first[0], other) for other in first)
        if not self.alike:
            return inputs
        rows = torch.arange(start, len(self.read)) % world() == rank()
        return tuple(t[rows] for t in inputs)

    def owners(self) -> Tensor | None:
        """Return the process that has each sample, in order; None for a process alone.

        Raises:
            DataError: If processes read the same samples in different orders, or only in part.
        """
        if world() == 1:
            return None
        read = gathered(torch.tensor(self.read, dtype=torch.long))
        if self.alike and not all(torch.equal(read[0], other) for other in read):
            raise _mixed("the same samples first, then different ones")
        if self.alike:
            return torch.arange(len(self.read)) % world()
        if len(read[0]) > 1 and all(Counter(r.tolist()) == Counter(read[0].tolist()) for r in read):
            raise _mixed("the same samples, each in an order of its own")
        turns = torch.cat([torch.arange(len(r)) for r in read])
        owners = torch.cat([torch.full((len(r),), k) for k, r in enumerate(read)])
        return owners[turns.argsort(stable=True)]


def checksum(tensor: Tensor, start: int = 0) -> int:
    """Return a checksum of the values of a tensor; `start` is that of what comes before it."""
    content: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return zlib.crc32(content, start)


def _mixed(what: str) -> DataError:
    return DataError(
        f"processes that read {what}",
        where="the argument `data`",
        expected="the same samples in the same order, which are then dealt out, or other samples "
        "in each process",
        do="give loaders that shuffle the same seed everywhere, or a DistributedSampler",
    )
