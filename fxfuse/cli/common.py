"""What the commands share: their arguments, the checks of these, models, data, and what they say.

What can be refused is refused before any work is done.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer
from rich.console import Console
from torch import fx, nn

from .._progress import Progress, heard_by
from ..calibration.data import Calibration
from ..errors import ArgumentError, DataError, FuseError
from ..fusion.fuse import Method
from ..graph.calls import Example
from ..io.save import save_at_least_weights
from ..presets import NAMED
from ..report import PICTURE_ENDINGS
from .references import load_data, load_example, load_model

T = TypeVar("T")

MODEL = (
    "package.module:factory[?key=value&...][@checkpoint], hf:PATH[?class=NAME] (a folder of "
    "transformers), timm:NAME[?key=value&...][@checkpoint], or a .safetensors file that fxfuse "
    "wrote."
)
DATA = (
    "imagefolder:PATH[?size=224&mean=(0.5,0.5,0.5)&std=(0.2,0.2,0.2)], mnist:PATH, "
    "text:PATH[?field=text&tokenizer=FOLDER&length=128] (lines or .jsonl, for the models' "
    "tokenizer if none is named), npz:PATH, dataset:PATH[?split=train, and as for text] (of "
    "save_to_disk), or package.module:factory[?key=value&...], which gives a tensor or batches."
)
INPUT = (
    "Shape of an input without the batch axis, such as 3x224x224 or 77:int64; once for each input "
    "of the model."
)

Model = Annotated[str, typer.Argument(help=MODEL)]
Models = Annotated[list[str], typer.Argument(help=MODEL)]
Data = Annotated[str, typer.Option(help=DATA)]
DataOrNone = Annotated[str | None, typer.Option(help=DATA)]
Inputs = Annotated[list[str] | None, typer.Option("--input", help=INPUT)]
Samples = Annotated[int, typer.Option(help="How many calibration samples to read.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of the order of the samples.", min=0, max=2**32 - 1)]
Output = Annotated[
    Path, typer.Option(help="Where to write the network: a file that ends in .safetensors.")
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
Across = Annotated[
    bool,
    typer.Option("--across", help="Take models of other kinds than the anchor's as targets."),
]
NETWORK = [".safetensors"]  # the endings of what a network is written to
AlignmentFile = Annotated[
    Path | None,
    typer.Option(help="Which layers correspond: a file of what `align --json` prints."),
]
Picture = Annotated[
    Path | None,
    typer.Option(help=f"Where to draw the alignment: {', '.join(PICTURE_ENDINGS)}."),
]
Card = Annotated[
    Path | None, typer.Option(help="Where to write a model card for a model hub: README.md.")
]
Shares = Annotated[str, typer.Option(help="Shares of the second model, increasing from 0 to 1.")]
Curve = Annotated[
    Path | None, typer.Option("--picture", help=f"Where to draw it: {', '.join(PICTURE_ENDINGS)}.")
]
Page = Annotated[
    Path | None,
    typer.Option("--report", help="Where to write a web page about the fusion: .html."),
]


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
    if text is None:
        return None
    return "auto" if text == "auto" else parsed_shares(text)


def parsed_shares(text: str) -> list[float]:
    """Return the numbers of a text such as `0.7,0.3`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(
            f"weights '{text}'",
            where="--weights",
            expected="numbers with commas between them, such as 0.7,0.3",
            do="leave it out for the usual weights",
        ) from error


def require_writable(path: Path | None, option: str, endings: Sequence[str]) -> None:
    """Refuse a path that cannot be written, or whose ending is none of those that are allowed."""
    fault = "" if path is None else _fault_of(path, endings)
    if fault:
        raise ArgumentError(
            fault,
            where=f"{option} {path}",
            expected=f"the path of a file to write that ends in {' or '.join(endings)}",
            do="name such a file in a folder that is there, or make the folder first",
        )


def _fault_of(path: Path, endings: Sequence[str]) -> str:
    """Say why a file cannot be written; the text is empty if it can."""
    try:
        folder = path.resolve().parent
        if path.is_dir():
            return "a folder instead of a file"
        if path.exists() and not path.is_file():
            return "a device instead of a file"
        if not folder.exists():
            return f"a folder that is not there: {folder}"
        if not folder.is_dir():
            return f"a file in the way: {folder}"
        if not os.access(folder, os.W_OK):
            return f"a folder that cannot be written to: {folder}"
    except (OSError, RuntimeError, ValueError) as error:
        return f"a path that cannot be used: {error}"
    return "" if path.suffix in endings else f"a file with the ending '{path.suffix}'"


ALIGNING = {name: method for name, method in NAMED.items() if isinstance(method, Method)}
out, err = Console(), Console(stderr=True)


def load_models(models: Sequence[str], progress: Progress) -> list[nn.Module]:
    """Return the models of some references."""
    networks: list[nn.Module] = []
    for reference in models:
        progress("load models", len(networks) / len(models))
        networks.append(load_model(reference))
    return networks


def read_data(
    data: str,
    models: Sequence[str],
    networks: Sequence[nn.Module],
    samples: int,
    seed: int,
    progress: Progress,
) -> Calibration:
    """Return so many samples of some data, in an order drawn with the seed.

    Args:
        data: Their reference.
        models: References of the models that will take them.
        networks: These models.
        samples: How many.
        seed: Of the order.
        progress: Told of the progress.
    """
    progress("read data", 0.0)
    batches = load_data(data, seed=seed, models=models)
    with data_errors(data), heard_by(partial(progress, "read data")):
        return Calibration(batches, samples, networks)


@contextmanager
def data_errors(reference: str) -> Iterator[None]:
    """Turn whatever the user's own loader raises into an error of the library."""
    try:
        yield
    except FuseError:
        raise
    except Exception as error:
        raise DataError(
            f"data that cannot be read: {type(error).__name__}: {error}",
            where=f"'{reference}'",
            expected="batches whose first entry is the input",
            do="read the first batches in Python, and mend what fails there",
        ) from error


def example_of(
    data: str | None,
    inputs: Sequence[str] | None,
    models: Sequence[str],
    networks: Sequence[nn.Module],
    progress: Progress,
) -> Example:
    """Return inputs for one run, from data or from shapes; models as for `read_data`.

    Raises:
        ArgumentError: If neither is given, or both.
    """
    if (data is None) == (not inputs):
        raise ArgumentError(
            "no inputs" if data is None else "inputs of two kinds",
            where="--data and --input",
            expected="either data, or the shape of each input",
            do="give one of them, such as --input 3x224x224",
        )
    if data is None:
        return tuple(map(load_example, inputs or ()))
    calibration = read_data(data, models, networks, 2, 0, progress)
    return calibration.as_call(calibration.example())


def write_network(network: fx.GraphModule, output: Path, progress: Progress) -> None:
    """Write a network, or its weights alone where there is more in it than a file can hold."""
    progress("save weights", 0.0)
    refusal = save_at_least_weights(network, output)
    if refusal is not None:
        say(f"weights alone, as there is {refusal.met}: {refusal.where}")


SPELLED = {  # arguments of Python, as the command line and recipes have them
    r"\bacross=True": "--across",
    r"\b(anchor|width|weights|method)=(['\"]?)([\w.,]+)\2": r"--\1 \3",
    r"\bheads=fxfuse\.heads\.Separate\(after=('[^']*')\)": (
        r"in a recipe heads: {kind: separate, after: \1}"
    ),
}


def as_options(text: str) -> str:
    """Return a text with the arguments that it advises spelled as options.

    Example:
        >>> as_options("the others as targets (across=True), or anchor=0")
        'the others as targets (--across), or --anchor 0'
    """
    for argument, option in SPELLED.items():
        text = re.sub(argument, option, text)
    return text


def complain(text: str, style: str) -> None:
    """Print something that went wrong, where errors go."""
    err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)
