"""Values that JSON lacks, read by their kind: the small half of `decoding`.

Nothing here calls what a file names: types are looked up in torch, functions in `naming`.
"""

from __future__ import annotations

import base64
from collections import namedtuple
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .naming import function_of


class Wrong(Exception):
    """Something in a description that cannot be."""


def require(good: bool, what: str) -> None:
    """Refuse what is not good."""
    if not good:
        raise Wrong(what)


def tensor_of(data: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor whose bytes are given in base64."""
    raw, kind = bytearray(base64.b64decode(data, validate=True)), _of_torch(torch.dtype)(dtype)
    if not raw:
        require(0 in shape, "a tensor without data")
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(raw, dtype=torch.uint8).clone().view(kind).view(shape)


def _of_torch(kind: type) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        found = vars(torch).get(name)
        require(isinstance(found, kind), f"no {kind.__name__}: {str(name)[:100]!r}")
        return found

    return find


def function_named(name: str) -> Callable[..., Any]:
    """Return the function of a name, if it may be called."""
    found = function_of(name)
    if found is None:
        raise Wrong(f"a function that is not allowed: {name[:100]!r}")
    return found


def _namedtuple(parts: list[Any]) -> Any:
    name, fields, values = parts
    return kind_of_tuple(name, tuple(fields))(*values)


@lru_cache(maxsize=256)
def kind_of_tuple(name: str, fields: tuple[str, ...]) -> type:
    """Return a class of named tuples like one of the model's code, which is not needed for it."""
    require(all(isinstance(n, str) for n in (name, *fields)), "names that are no text")
    return namedtuple(name, fields)


PLAIN: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "complex": lambda parts: complex(float(parts[0]), float(parts[1])),
    "dtype": _of_torch(torch.dtype),
    "memory_format": _of_torch(torch.memory_format),
    "layout": _of_torch(torch.layout),
    "device": torch.device,
    "range": lambda parts: range(*parts),
    "ellipsis": lambda _: ...,
    "function": function_named,
}
CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "size": torch.Size,
    "slice": lambda parts: slice(*parts),
    "dict": dict,
    "namedtuple": _namedtuple,
}
