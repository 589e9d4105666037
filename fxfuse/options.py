"""What is written on the command line, checked before any work is done for it."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from .errors import ArgumentError

T = TypeVar("T")


def chosen(name: str, methods: Mapping[str, T]) -> T:
    """Return the method of a name."""
    if name in methods:
        return methods[name]
    raise ArgumentError(
        f"the method '{name}'",
        where="--method",
        expected=f"one of {', '.join(methods)}",
        do="leave it out for the best one",
    )


def require_fusing(method: str, able: Container[str], options: Mapping[str, object]) -> None:
    """Refuse what means nothing to a method that is not `able` to align and mix."""
    given = [name for name, value in options.items() if value is not None]
    if given and method not in able:
        raise ArgumentError(
            f"{', '.join(given)} with the method '{method}'",
            where="--method",
            expected="no such option, as this method aligns and mixes nothing",
            do="leave the option out, or choose another method",
        )


def shares(text: str | None) -> list[float] | Literal["auto"] | None:
    """Return the numbers of a text with commas between them, or the word that leaves them open."""
    if text == "auto":
        return "auto"
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(
            f"weights '{text}'",
            where="--weights",
            expected="numbers with commas between them, such as 0.7,0.3, or auto",
            do="leave it out for equal weights",
        ) from error


def require_file(path: Path | None, option: str, endings: Sequence[str] = ()) -> None:
    """Refuse a path that cannot be written before any work is done for it."""
    fault = "" if path is None else _fault_of(path, endings)
    if fault:
        raise ArgumentError(
            fault,
            where=f"{option} {path}",
            expected="the path of a file to write",
            do=f"give a file name that ends in {' or '.join(endings or ['.safetensors'])}",
        )


def _fault_of(path: Path, endings: Sequence[str]) -> str:
    try:
        parent = path.resolve().parent
        while not parent.exists():
            parent = parent.parent
        if path.is_dir():
            return "a folder instead of a file"
        if path.exists() and not path.is_file():
            return "a device instead of a file"
        if not parent.is_dir():
            return f"a file in the way: {parent}"
        if not os.access(parent, os.W_OK):
            return f"a folder that cannot be written to: {parent}"
    except (OSError, RuntimeError, ValueError) as error:
        return f"a path that cannot be used: {error}"
    if endings and path.suffix not in endings:
        return f"a file with the ending '{path.suffix}'"
    return ""
