"""Nested values: the tensors in them, and copies with something else in place of these."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a nested value, those in data classes included."""
    if isinstance(value, Tensor):
        return [value]
    parts: list[Any] = []
    if is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, Mapping):
        parts = [*value.values()]
    elif isinstance(value, (tuple, list)):
        parts = [*value]
    return [tensor for part in parts for tensor in tensors_in(part)]


@dataclass(frozen=True)
class Slot:
    """Where a tensor stands in a call, by its number."""

    number: int


def rebuilt(
    value: Any, leaf: Callable[[Any, tuple[Any, ...]], Any], path: tuple[Any, ...] = ()
) -> Any:
    """Return a nested value of the same kind, with what a function makes of each of its leaves."""
    if isinstance(value, Slot):
        return leaf(value, path)
    if is_dataclass(value) and not isinstance(value, type):
        given = [f.name for f in fields(value) if f.init]
        return replace(value, **{n: rebuilt(getattr(value, n), leaf, (*path, n)) for n in given})
    if isinstance(value, Mapping):
        parts = {k: rebuilt(v, leaf, (*path, k)) for k, v in value.items()}
        same: Any = copy.copy(value) if isinstance(value, MutableMapping) else {}
        for key, part in parts.items():
            same[key] = part
        return same
    if isinstance(value, (tuple, list)):
        items = [rebuilt(v, leaf, (*path, i)) for i, v in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return leaf(value, path)
