"""Arguments of public functions, compared with their annotations before any work is done."""

from __future__ import annotations

import functools
import inspect
import numbers
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor, nn

from .errors import ArgumentError

F = TypeVar("F", bound=Callable[..., Any])

# What is read and refused with more to say than an annotation knows: networks and their inputs.
_ELSEWHERE = (nn.Module, Tensor)
_KINDS: dict[Any, Any] = {float: numbers.Real, int: numbers.Integral}


def checked(*but: str) -> Callable[[F], F]:
    """Let a function refuse arguments that are not of the kinds that it is annotated with.

    Args:
        but: Arguments that the function refuses by itself, with more to say.

    Example:
        >>> @checked()
        ... def half(number: float, times: Sequence[int] | None = None) -> float:
        ...     return number / 2
        >>> half(3)
        1.5
        >>> half("3")
        Traceback (most recent call last):
        fxfuse.errors.ArgumentError: '3', of type str
          where: the argument `number` of half
          expected: float
          to do: pass one of this kind
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        many = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        looked_at = {p.name for p in signature.parameters.values() if p.kind not in many} - {*but}

        @functools.cache
        def hints() -> dict[str, Any]:
            return get_type_hints(inspect.unwrap(function))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                if name in looked_at & hints().keys() and not _is_of(value, hints()[name]):
                    raise _refused(value, name, function.__qualname__, signature)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def _refused(value: Any, name: str, owner: str, signature: inspect.Signature) -> ArgumentError:
    text = repr(value)
    given = signature.parameters[name]
    optional = given.default is not given.empty
    return ArgumentError(
        f"{text if len(text) < 80 else 'a value'}, of type {type(value).__name__}",
        where=f"the argument `{name}` of {owner}",
        expected=str(given.annotation).replace(" | None", ", or None"),
        do="pass one of this kind" + (", or leave it out" if optional else ""),
    )


def _is_of(value: Any, kind: Any) -> bool:
    """Tell whether a value is of an annotated kind; of a kind that is not known here, it is."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_is_of(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if kind is None or kind is type(None):
        return value is None
    kind = origin or kind
    if kind is Any or not isinstance(kind, type) or kind in _ELSEWHERE:
        return True
    if getattr(kind, "_is_protocol", False):
        return callable(value) or not hasattr(kind, "__call__")  # noqa: B004
    if kind in (Mapping, dict):
        whole = isinstance(value, Mapping)
        return whole and all(_is_of(part, inner[1]) for part in value.values() if inner)
    if kind in (Sequence, Iterable):
        return inner[:1] == (nn.Module,) or _holds(value, kind, inner)
    return isinstance(value, _KINDS.get(kind, kind))


def _holds(value: Any, kind: Any, inner: tuple[Any, ...]) -> bool:
    """Tell whether a value is a list of some kind; numbers may be in an array."""
    if isinstance(value, (str, bytes)) or not isinstance(value, (kind, np.ndarray, Tensor)):
        return False
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim == 1
    return not isinstance(value, Sequence) or all(_is_of(part, inner[0]) for part in value if inner)
