"""Write values that JSON lacks, such as tuples and types, as JSON objects, and read them back.

Such a value is written as an object with one key, its kind: `{"tuple": [..]}`, `{"dtype":
"float32"}`. Reading runs nothing: names are looked up among what `_allowlist` allows.
"""

from __future__ import annotations

import base64
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._allowlist import function_of, name_of_function


class Wrong(Exception):
    """A value that cannot be written down, or a description that cannot be right."""


def require(good: bool, fault: str) -> None:
    """Refuse what is not good."""
    if not good:
        raise Wrong(fault)


Inner = Callable[[Any], Any]  # writes or reads a value that lies inside another one


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        types: The types of its values.
        write: Of a value and of what writes those inside it: what JSON can hold.
        read: Of what was written and of what reads the values inside it: the value again.
    """

    types: type | tuple[type, ...]
    write: Callable[[Any, Inner], Any]
    read: Callable[[Any, Inner], Any]


def _plain(kind: type, write: Callable[[Any], Any], read: Callable[[Any], Any]) -> Kind:
    """Return a kind whose values hold no others."""
    return Kind(kind, lambda value, _: write(value), lambda written, _: read(written))


def _constant(kind: type) -> Kind:
    """Return a kind whose values torch has by name, such as `torch.float32`."""
    return _plain(kind, _name_in_torch, lambda name: _of_torch(name, kind))


def _name_in_torch(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _of_torch(name: str, kind: type) -> Any:
    value = vars(torch).get(name)
    require(isinstance(value, kind), f"no {kind.__name__}: {str(name)[:100]!r}")
    return value


def _write_parts(values: Any, inner: Inner) -> list[Any]:
    return [inner(value) for value in values]


def _write_function(function: Any, _: Inner) -> str:
    name = name_of_function(function) if callable(function) else None
    if name is None:
        raise Wrong(f"{called(function)}, a {type(function).__name__}")
    return name


def _write_named_tuple(value: Any, inner: Inner) -> list[Any]:
    return [type(value).__name__, list(value._fields), _write_parts(value, inner)]


def _read_named_tuple(written: Any, inner: Inner) -> Any:
    name, fields, parts = written
    return class_of_tuples(name, tuple(fields))(*map(inner, parts))


def kind_of(value: Any) -> str:
    """Return the name of a value's kind; what is of no other may be a function."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "namedtuple"
    kinds = (name for name, kind in KINDS.items() if isinstance(value, kind.types))
    return next(kinds, "function")


def called(value: Any) -> str:
    """Return what a function, a class or another value is called in an error."""
    name = getattr(value, "__qualname__", None) or repr(value)
    return f"'{getattr(value, '__module__', '')}.{name}'".replace("'.", "'")[:200]


def function_named(name: str) -> Callable[..., Any]:
    """Return the function of a name, if it may be called."""
    function = function_of(name)
    if function is None:
        raise Wrong(f"a function that is not allowed: {name[:100]!r}")
    return function


@lru_cache(maxsize=256)
def class_of_tuples(name: str, fields: tuple[str, ...]) -> type:
    """Return a class of named tuples like one in the model's code, which need not be there."""
    require(all(isinstance(n, str) for n in (name, *fields)), "names that are not text")
    return namedtuple(name, fields)


# The first kind that has a value's type is its kind: `torch.Size` comes before `tuple`.
KINDS: dict[str, Kind] = {
    "float": _plain(float, lambda x: str(float(x)), float),  # infinite, or not a number
    "complex": _plain(
        complex,
        lambda z: [str(z.real), str(z.imag)],
        lambda parts: complex(float(parts[0]), float(parts[1])),
    ),
    "dtype": _constant(torch.dtype),
    "memory_format": _constant(torch.memory_format),
    "layout": _constant(torch.layout),
    "device": _plain(torch.device, str, torch.device),
    "range": _plain(range, lambda r: [r.start, r.stop, r.step], lambda ends: range(*ends)),
    "ellipsis": _plain(type(...), lambda _: None, lambda _: ...),
    "slice": Kind(
        slice,
        lambda s, inner: _write_parts((s.start, s.stop, s.step), inner),
        lambda ends, inner: slice(*map(inner, ends)),
    ),
    "size": Kind(torch.Size, _write_parts, lambda parts, inner: torch.Size(map(inner, parts))),
    "tuple": Kind(tuple, _write_parts, lambda parts, inner: tuple(map(inner, parts))),
    "set": Kind(
        (set, frozenset),
        lambda values, inner: sorted(_write_parts(values, inner), key=repr),
        lambda parts, inner: set(map(inner, parts)),
    ),
    "dict": Kind(
        dict,
        lambda values, inner: [_write_parts(pair, inner) for pair in values.items()],
        lambda pairs, inner: {inner(key): inner(value) for key, value in pairs},
    ),
    "namedtuple": Kind((), _write_named_tuple, _read_named_tuple),
    "function": Kind((), _write_function, lambda name, _: function_named(name)),
}


# --- tensors --------------------------------------------------------------------------------------


def contiguous(tensor: Tensor) -> Tensor:
    """Return a tensor as it goes to the file: contiguous, on the CPU, real."""
    refused = tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta
    require(not refused, "a tensor that is sparse, quantised or without data")
    real = tensor.detach().cpu().resolve_conj().resolve_neg()
    return (torch.view_as_real(real) if real.is_complex() else real).contiguous()


def data_of(tensor: Tensor) -> tuple[str, str, tuple[int, ...]]:
    """Return the bytes of a contiguous tensor in base64, its type by name, and its shape."""
    raw = tensor.view(-1).view(torch.uint8).numpy().tobytes()
    return base64.b64encode(raw).decode("ascii"), _name_in_torch(tensor.dtype), tuple(tensor.shape)


def tensor_of(data: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of such data, type and shape."""
    raw, kind = bytearray(base64.b64decode(data, validate=True)), _of_torch(dtype, torch.dtype)
    if not raw:
        require(0 in shape, "a tensor without data")
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(raw, dtype=torch.uint8).clone().view(kind).view(shape)


def memory_order(tensor: Tensor) -> list[int]:
    """Return the axes of a tensor from the outermost in memory to the innermost."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))


def in_memory_order(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return a tensor with its axes laid out in memory in an order, the outermost first."""
    require(sorted(order) == list(range(tensor.dim())), "axes that are not a permutation")
    back = [order.index(dim) for dim in range(len(order))]
    return tensor.permute(order).contiguous().permute(back)
