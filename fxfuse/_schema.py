"""Frozen data classes to plain JSON values and back, every value checked against its annotation.

Annotations may be `None`, `bool`, `int`, `float`, `str`, unions of these, `tuple[X, ...]`,
`frozenset[str]`, `dict[str, X]`, data classes, and `Any`, which takes what was parsed as it is.
Numbers that JSON lacks are written as "inf", "-inf" and "nan". A field that has `written=False` in
its metadata is left out.
"""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from .errors import ArgumentError, FuseError

_NUMBERS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    type(None): "null",
}


def written(value: Any, defaults: bool = True) -> Any:
    """Return a value of plain types, tuples, dictionaries and data classes as JSON knows it.

    Args:
        value: The value.
        defaults: Whether fields that have their default are written, too; they are read the same.
    """
    if is_dataclass(value) and not isinstance(value, type):
        parts = ((f, getattr(value, f.name)) for f in _written_fields(value))
        kept = ((f, part) for f, part in parts if defaults or part != _default(f))
        return {f.name: written(part, defaults) for f, part in kept}
    if isinstance(value, (tuple, list)):
        return [written(part, defaults) for part in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): written(part, defaults) for key, part in value.items()}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(float(value))
    return value


def _written_fields(kind: Any) -> list[Field[Any]]:
    return [f for f in fields(kind) if f.metadata.get("written", True)]


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def parsed(text: str, what: str) -> Any:
    """Parse JSON.

    Args:
        text: The text.
        what: What the text is of, for the error.

    Raises:
        ArgumentError: If it is not JSON, or a key occurs twice in one object.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError, TypeError) as error:
        raise ArgumentError(
            f"text that is not JSON: {error}",
            where=what,
            expected="JSON",
            do="compare it with a newly written file; check quotes, brackets and commas",
        ) from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"a key that occurs twice among {', '.join(key for key, _ in pairs)}")
    return fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} without quotes")  # as json.loads would take NaN


def read(hint: Any, value: Any, where: str) -> Any:
    """Return a parsed JSON value as its annotation wants it.

    Args:
        hint: The annotation.
        value: What was parsed.
        where: What the value belongs to; errors add the place inside it.

    Raises:
        ArgumentError: At the first value of another type, unknown or missing key.
    """
    if isinstance(hint, type) and is_dataclass(hint):
        return _object(hint, value, where)
    if hint is Any:
        return value
    origin, parts = get_origin(hint), get_args(hint)
    if origin is tuple and isinstance(value, list):
        return _tuple(parts, value, where)
    if origin is frozenset and isinstance(value, list):
        return frozenset(_tuple((parts[0], ...), value, where))
    if origin is dict and isinstance(value, dict):
        return {key: read(parts[1], part, f"{where}.{key}") for key, part in value.items()}
    if origin in (Union, types.UnionType):
        return _one_of(parts, value, where)
    if hint is float and isinstance(value, str) and value in _NUMBERS:
        return _NUMBERS[value]
    if hint is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise unexpected(value, where, in_words(hint))


def _tuple(parts: Sequence[Any], value: list[Any], where: str) -> tuple[Any, ...]:
    if len(parts) == 2 and parts[1] is Ellipsis:
        return tuple(read(parts[0], part, f"{where}[{i}]") for i, part in enumerate(value))
    if len(parts) != len(value):
        raise unexpected(value, where, f"{len(parts)} entries")
    return tuple(read(p, part, f"{where}[{i}]") for i, (p, part) in enumerate(zip(parts, value)))


def _one_of(parts: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and type(None) in parts:
        return None
    *others, last = (part for part in parts if part is not type(None))
    for part in others:
        try:
            return read(part, value, where)
        except FuseError:
            continue
    return read(last, value, where)


def _object(kind: type, value: Any, where: str) -> Any:
    hints = _hints(kind)
    if not isinstance(value, dict):
        raise unexpected(value, where, in_words(kind))
    unknown = [key for key in value if key not in hints]
    missing = [key for key, (_, needed) in hints.items() if needed and key not in value]
    if unknown or missing:
        fault = f"an unknown key '{unknown[0]}'" if unknown else f"no key '{missing[0]}'"
        raise ArgumentError(
            fault,
            where=where,
            expected=in_words(kind),
            do="correct the key, or write the file again",
        )
    return kind(**{key: read(hints[key][0], v, f"{where}.{key}") for key, v in value.items()})


@cache
def _hints(kind: type) -> dict[str, tuple[Any, bool]]:
    """Return the annotation of each field, and whether it has to be given."""
    hints = get_type_hints(kind)
    return {
        f.name: (hints[f.name], f.default is MISSING and f.default_factory is MISSING)
        for f in _written_fields(kind)
    }


def in_words(hint: Any) -> str:
    """Say what an annotation asks for."""
    if isinstance(hint, type) and is_dataclass(hint):
        return "an object with " + ", ".join(f"'{key}'" for key in _hints(hint))
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (tuple, frozenset):
        return f"a list of {in_words(parts[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(part) for part in parts)
    return "an object" if origin is dict else _WORDS.get(hint, str(hint))


def unexpected(value: Any, where: str, expected: str) -> ArgumentError:
    """Return the error for a value of the wrong kind."""
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return ArgumentError(
        f"{shown} where something else belongs",
        where=where,
        expected=expected,
        do="correct it, or write the file again",
    )
