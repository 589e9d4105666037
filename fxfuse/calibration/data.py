"""Calibration data of any form as batches of input tensors that can be read again.

The inputs are read once and kept, so that every stage sees the same samples even of a loader that
shuffles or augments. What exceeds a memory budget is kept in a temporary file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._progress import tell
from ..errors import DataError
from ..graph.trace import at_least_single
from .spill import SpillStore, Waiting

Batch = tuple[Tensor, ...]
MEMORY = 1 << 30  # bytes of inputs that are kept in memory


class Calibration:
    """Unlabelled inputs, read once, served in batches of any size.

    Args:
        data: A tensor `(N, ...)`, or an iterable of batches, each a tensor or a tuple, list or
            dict whose first entry is the input. An input may itself be a tuple of tensors.
        limit: Read at most this many samples.

    Raises:
        DataError: If there are no data, or they hold NaN, or are of another form.
    """

    def __init__(self, data: Any, limit: int | None = None) -> None:
        self._store = SpillStore(MEMORY)
        self._batches: list[Waiting] = []
        self.samples = 0
        is_tensor = isinstance(data, Tensor)  # then all of it is in memory in any case
        elsewhere = {data.untyped_storage().data_ptr()} if is_tensor else set()
        for batch in _batches(data):
            inputs = _inputs(batch)
            if limit is not None:
                inputs = tuple(t[: limit - self.samples] for t in inputs)
            if not len(inputs[0]):
                if self.samples == limit:
                    break
                continue
            if not is_tensor:  # a loader may use its buffers again
                inputs = tuple(t.clone() for t in inputs)
            _require_finite(inputs, self.samples)
            if self.samples:
                _require_alike(inputs, self._batch(0), self.samples)
            self._batches.append(self._store.put(inputs, elsewhere))
            self.samples += len(inputs[0])
            if limit is not None:
                tell(self.samples / limit)
        if not self.samples:
            raise DataError(
                "no samples",
                where="the argument `data`",
                expected="at least one batch; a few hundred unlabelled samples are usual",
                do="check the path or the loader; an iterator that was read before is empty",
            )

    def example(self, samples: int = 2) -> Batch:
        """Return the first few inputs, as one batch."""
        return tuple(t[:samples] for t in self._batch(0))

    def parted(self, every: int) -> tuple[Calibration, Calibration]:
        """Return all inputs but each `every`-th one, and each `every`-th one."""
        rest: list[Any] = []
        taken: list[Any] = []
        for start, batch in zip(range(0, self.samples, 64), self.chunks(64)):
            take = torch.arange(start, start + len(batch[0])) % every == every - 1
            for part, chosen in ((rest, ~take), (taken, take)):
                part.append((tuple(t[chosen] for t in batch),))
        return Calibration(rest), Calibration(taken)

    def chunks(self, size: int) -> Iterator[Batch]:
        """Yield all inputs in order, in batches of `size` samples, the last one shorter."""
        pending: list[Batch] = []
        for i in range(len(self._batches)):
            pending.append(self._batch(i))
            while sum(len(b[0]) for b in pending) >= size:
                joined = tuple(torch.cat(parts) for parts in zip(*pending))
                yield tuple(t[:size] for t in joined)
                pending = [tuple(t[size:] for t in joined)]
        if sum(len(b[0]) for b in pending):
            yield tuple(torch.cat(parts) for parts in zip(*pending))

    def _batch(self, i: int) -> Batch:
        """Return one batch as it was read."""
        batch: Batch = self._store.get(self._batches[i])
        return batch


def _batches(data: Any) -> Iterable[Any]:
    if isinstance(data, Tensor):
        return data.split(64) if data.dim() else []
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict)):
        return data
    raise DataError(
        f"calibration data of type {type(data).__name__}",
        where="the argument `data`",
        expected="a tensor (N, ...) or an iterable of batches, such as a DataLoader",
        do="pass the inputs as one tensor, or a loader over them",
    )


def _inputs(batch: Any) -> Batch:
    entry = batch
    if isinstance(batch, dict):
        entry = next(iter(batch.values()), None)
    elif isinstance(batch, (tuple, list)):
        entry = batch[0] if batch else None
    parts = tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)
    if parts and all(isinstance(p, Tensor) and p.dim() for p in parts):
        return tuple(at_least_single(p.detach()) for p in parts)
    raise DataError(
        f"a batch whose first entry is of type {type(entry).__name__}",
        where="the argument `data`",
        expected="a tensor, or a tuple, list or dict whose first entry is the input tensor",
        do="convert the samples to tensors (torchvision: transforms.ToTensor())",
    )


def _require_alike(inputs: Batch, first: Batch, before: int) -> None:
    """Refuse, before any work is done on it, a batch that cannot be joined to the first."""
    kinds = [[(tuple(t.shape[1:]), t.dtype) for t in batch] for batch in (inputs, first)]
    if kinds[0] != kinds[1]:
        raise DataError(
            f"a batch of samples {kinds[0]} after batches of samples {kinds[1]}",
            where=f"the batch that starts at sample {before} of `data`",
            expected="inputs of one shape and type",
            do="resize or pad the samples to one shape",
        )


def _require_finite(inputs: Batch, before: int) -> None:
    for t in inputs:
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise DataError(
                "inputs that are NaN or infinite",
                where=f"the batch that starts at sample {before} of `data`",
                expected="finite inputs",
                do="clean the samples or the transform that makes them",
            )
