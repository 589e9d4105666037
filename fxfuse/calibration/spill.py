"""Tensors that wait in memory up to a budget; what exceeds it waits in a temporary file.

The file has no name, so that it is gone when the process ends, however it ends. Tensors that share
memory share it again when they come back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import DataError

# where a piece of memory lies in the file: start and size in bytes, and the device it was on
_Place = tuple[int, int, torch.device]


@dataclass(frozen=True, eq=False)
class _Stored:
    """A tensor whose memory lies in the file.

    Attributes:
        piece: Which of the pieces of memory that were stored with it.
        dtype: Its type.
        offset: Where it begins in that memory, in elements.
        shape: Its shape.
        stride: Its strides.
    """

    piece: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Waiting:
    """What `SpillStore.put` returns for values, to get them back.

    Attributes:
        values: The values; tensors in the file are replaced.
        size: Bytes of memory they take, 0 if they lie in the file.
        places: Where their memory lies in the file.
    """

    values: Any
    size: int
    places: tuple[_Place, ...] = ()


class SpillStore:
    """Keeps values in memory up to a budget, the others in a temporary file.

    Values are tensors, or tuples, lists and dictionaries with tensors in them.

    Args:
        budget: Bytes to keep in memory.
    """

    def __init__(self, budget: int) -> None:
        self.room = budget
        self._file: Any = None
        self._end = 0
        self._free: dict[int, list[int]] = {}  # size -> places in the file that are free again

    def __enter__(self) -> SpillStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def put(self, values: Any, elsewhere: Collection[int] = ()) -> Waiting:
        """Store values.

        Args:
            values: What to store; nothing else should hold it.
            elsewhere: Addresses of memory that others hold in any case, such as that of a network's
                parameters. Tensors there stay as they are and cost nothing.

        Raises:
            DataError: If the file cannot be written.
        """
        pieces = _memory_of(values, elsewhere)
        size = sum(piece.nbytes() for piece in pieces.values())
        if size <= self.room:
            self.room -= size
            return Waiting(values, size)
        places = tuple(self._write(piece) for piece in pieces.values())
        numbers = {address: i for i, address in enumerate(pieces)}

        def stored(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.layout != torch.strided:
                return value
            piece = numbers.get(value.untyped_storage().data_ptr())
            if piece is None:
                return value
            layout = int(value.storage_offset()), tuple(value.shape), value.stride()
            return _Stored(piece, value.dtype, *layout)

        return Waiting(tree_map(stored, values), 0, places)

    def get(self, waiting: Waiting) -> Any:
        """Return values, which stay in the store."""
        pieces = [self._read(place) for place in waiting.places]

        def restored(value: Any) -> Any:
            if not isinstance(value, _Stored):
                return value
            piece = pieces[value.piece]
            empty = torch.empty(0, dtype=value.dtype, device=piece.device)
            return empty.set_(piece, value.offset, value.shape, value.stride)

        return tree_map(restored, waiting.values) if pieces else waiting.values

    def take(self, waiting: Waiting) -> Any:
        """Return values, and free their place in the store."""
        values = self.get(waiting)
        self.room += waiting.size
        for start, size, _ in waiting.places:
            self._free.setdefault(size, []).append(start)
        return values

    def _write(self, piece: torch.UntypedStorage) -> _Place:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed on exit)
        size, free = piece.nbytes(), self._free.get(piece.nbytes())
        start = free.pop() if free else self._end
        self._end = max(self._end, start + size)
        left = _bytes_of(piece).cpu().numpy().data
        try:
            self._file.seek(start)
            while left:  # one call may write less than all
                left = left[self._file.write(left) :]
        except OSError as error:
            raise _no_room(self._end, error) from error
        return start, size, piece.device

    def _read(self, place: _Place) -> torch.UntypedStorage:
        start, size, device = place
        content = np.empty(size, np.uint8)
        left = content.data
        self._file.seek(start)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise OSError("the temporary file ends before what was written to it")
            left = left[count:]
        return torch.from_numpy(content).to(device).untyped_storage()


def addresses_of(module: torch.nn.Module) -> set[int]:
    """Return the addresses of a module's parameters and buffers, for `SpillStore.put`."""
    return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}


def _memory_of(values: Any, elsewhere: Collection[int]) -> dict[int, torch.UntypedStorage]:
    """Return the pieces of memory of values by address, each once, without those elsewhere."""
    pieces = {}
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            piece = value.untyped_storage()
            if piece.nbytes() and piece.data_ptr() not in elsewhere:
                pieces[piece.data_ptr()] = piece
    return pieces


def _no_room(size: int, error: OSError) -> DataError:
    return DataError(
        f"a temporary file of {size / 2**30:.1f} GiB that cannot be written ({error})",
        where=f"{tempfile.gettempdir()}, for values that do not fit the memory budget",
        expected="a disk with room for them",
        do="set TMPDIR to a larger disk, use fewer samples, or keep more of the values of a refit "
        "in memory: LeastSquares(frontier=...)",
    )


def _bytes_of(piece: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=piece.device).set_(piece)
