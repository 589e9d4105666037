"""Calibration data: whatever the user has, as batches of input tensors that can be read again.

The inputs are read once and kept, so that a shuffling or augmenting loader shows every stage the
same samples; beyond a memory budget they lie in a temporary file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._progress import tell
from ..errors import DataError

Batch = tuple[Tensor, ...]


class Spool:
    """A list of tensor tuples that spills to a temporary file beyond a budget.

    Args:
        budget: Bytes to keep in memory.
    """

    def __init__(self, budget: int = 1 << 30) -> None:
        self.budget = budget
        self._kept: list[Batch | None] = []
        self._spilled: dict[int, tuple[int, list[tuple[torch.dtype, torch.Size, int]]]] = {}
        self._file: Any = None

    def append(self, batch: Batch) -> None:
        """Add a tuple of tensors."""
        size = sum(t.numel() * t.element_size() for t in batch)
        if size <= self.budget:
            self.budget -= size
            self._kept.append(batch)
            return
        self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as this)
        self._file.seek(0, 2)
        parts = []
        start = self._file.tell()
        for t in batch:
            raw = t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            self._file.write(raw)
            parts.append((t.dtype, t.shape, len(raw)))
        self._spilled[len(self._kept)] = (start, parts)
        self._kept.append(None)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, i: int) -> Batch:
        kept = self._kept[i]
        if kept is not None:
            return kept
        start, parts = self._spilled[i]
        self._file.seek(start)
        tensors = []
        for dtype, shape, size in parts:
            raw = np.frombuffer(bytearray(self._file.read(size)), np.uint8)
            tensors.append(torch.from_numpy(raw).view(dtype).view(shape))
        return tuple(tensors)

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))


class Calibration:
    """Unlabelled inputs, read once, served in batches of any size.

    Args:
        data: A tensor `(N, ...)`, or an iterable of batches, each a tensor or a tuple, list or
            dict whose first entry is the input. An input may itself be a tuple of tensors.
        limit: Read at most this many samples.

    Raises:
        DataError: If there are no data, or they hold NaN, or are of another form.
    """

    def __init__(
        self,
        data: Any,
        limit: int | None = None,
    ) -> None:
        self._batches = Spool()
        self.samples = 0
        for batch in _batches(data):
            inputs = _inputs(batch)
            if limit is not None:
                inputs = tuple(t[: limit - self.samples] for t in inputs)
            if not len(inputs[0]):
                if self.samples == limit:
                    break
                continue
            if not isinstance(data, Tensor):  # a loader may use its buffers again
                inputs = tuple(t.clone() for t in inputs)
            _require_finite(inputs, self.samples)
            if self.samples:
                _require_alike(inputs, self._batches[0], self.samples)
            self._batches.append(inputs)
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
        return tuple(t[:samples] for t in self._batches[0])

    def parted(self, every: int) -> tuple[Calibration, Calibration]:
        """Return all inputs but one in `every`, and these."""
        parts: tuple[list[Any], list[Any]] = [], []
        for start, batch in zip(range(0, self.samples, 64), self.chunks(64)):
            last = torch.arange(start, start + len(batch[0])) % every == every - 1
            for part, chosen in zip(parts, (~last, last)):
                part.append((tuple(t[chosen] for t in batch),))
        return Calibration(parts[0]), Calibration(parts[1])

    def chunks(self, size: int) -> Iterator[Batch]:
        """Yield all inputs in order, in batches of `size` samples, the last one shorter."""
        waiting: list[Batch] = []
        for batch in self._batches:
            waiting.append(batch)
            while sum(len(b[0]) for b in waiting) >= size:
                joined = tuple(torch.cat(parts) for parts in zip(*waiting))
                yield tuple(t[:size] for t in joined)
                waiting = [tuple(t[size:] for t in joined)]
        if waiting and len(waiting[0][0]) + len(waiting) > 1:
            yield tuple(torch.cat(parts) for parts in zip(*waiting))


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
        return tuple(p.detach() for p in parts)
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
