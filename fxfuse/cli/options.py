"""The options of the commands: their types and help, and the checks before any work is done."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from ..errors import ArgumentError
from ..report import PICTURE_ENDINGS

T = TypeVar("T")

MODEL = "package.module:factory[?key=value&...][@checkpoint.safetensors]"
DATA = "imagefolder:PATH[?size=..], mnist:PATH or package.module:factory"

Models = Annotated[list[str], typer.Argument(help=MODEL)]
Data = Annotated[str, typer.Option(help=DATA)]
Samples = Annotated[int, typer.Option(help="How many calibration samples to read.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of the order of the samples.", min=0, max=2**32 - 1)]
Output = Annotated[
    Path, typer.Option(help="Where to write the fused network, as a safetensors file.")
]
Weights = Annotated[
    str | None,
    typer.Option(help="Shares of the models, such as 0.7,0.3, or auto; equal if left out."),
]
Width = Annotated[
    float | None,
    typer.Option(help="Width of the fused network on the whole, in widths of the anchor; from 1."),
]
Anchor = Annotated[
    int | None,
    typer.Option(help="Index of the model whose widths to take; the deepest if left out."),
]
AlignmentFile = Annotated[
    Path | None,
    typer.Option(help="Which layers correspond: a file of what `align --json` prints."),
]
Picture = Annotated[
    Path | None,
    typer.Option(help=f"Where to draw the alignment: {', '.join(PICTURE_ENDINGS)}."),
]
Page = Annotated[
    Path | None,
    typer.Option("--report", help="Where to write a web page about the fusion: .html."),
]


def method_named(name: str, methods: Mapping[str, T]) -> T:
    """Return the method of a name."""
    if name in methods:
        return methods[name]
    raise ArgumentError(
        f"the method '{name}'",
        where="--method",
        expected=f"one of {', '.join(methods)}",
        do="leave it out for the best one",
    )


def require_no_options(
    method: str, aligning: Container[str], options: Mapping[str, object]
) -> None:
    """Refuse options of aligning and mixing if the method does neither.

    Args:
        method: Its name.
        aligning: The names of the methods that have such options.
        options: What was given for each of them, None if nothing.
    """
    given = [name for name, value in options.items() if value is not None]
    if given and method not in aligning:
        raise ArgumentError(
            f"{', '.join(given)} with the method '{method}'",
            where="--method",
            expected="no such option, as this method aligns and mixes nothing",
            do="leave the option out, or choose another method",
        )


def parsed_weights(text: str | None) -> list[float] | Literal["auto"] | None:
    """Return the numbers of a text such as `0.7,0.3`; None and `auto` stay as they are."""
    if text == "auto":
        return "auto"
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(
            f"weights '{text}'",
            where="--weights",
            expected="numbers with commas between them, such as 0.7,0.3, or auto",
            do="leave it out for equal weights",
        ) from error


def require_writable(path: Path | None, option: str, endings: Sequence[str] = ()) -> None:
    """Refuse a path that cannot be written, or whose ending is none of those that are allowed."""
    fault = "" if path is None else _fault_of(path, endings)
    if fault:
        raise ArgumentError(
            fault,
            where=f"{option} {path}",
            expected="the path of a file to write",
            do=f"give a file name that ends in {' or '.join(endings or ['.safetensors'])}",
        )


def _fault_of(path: Path, endings: Sequence[str]) -> str:
    """Say why a file cannot be written; the text is empty if it can."""
    try:
        folder = path.resolve().parent
        while not folder.exists():
            folder = folder.parent
        if path.is_dir():
            return "a folder instead of a file"
        if path.exists() and not path.is_file():
            return "a device instead of a file"
        if not folder.is_dir():
            return f"a file in the way: {folder}"
        if not os.access(folder, os.W_OK):
            return f"a folder that cannot be written to: {folder}"
    except (OSError, RuntimeError, ValueError) as error:
        return f"a path that cannot be used: {error}"
    if endings and path.suffix not in endings:
        return f"a file with the ending '{path.suffix}'"
    return ""
