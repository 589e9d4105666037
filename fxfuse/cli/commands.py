"""The command line: `fxfuse demo`, `fuse`, `align` and `inspect`, their options, and their checks.

What can be refused is refused before any work is done.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from typer.core import TyperGroup

from .._progress import Progress, heard_by
from ..alignment.inspection import inspect
from ..calibration.data import Calibration
from ..errors import ArgumentError, DataError, FuseError, FusionWarning
from ..fusion.barrier import compare
from ..fusion.fuse import Method, align
from ..io.save import save_at_least_weights
from ..ir import Alignment
from ..presets import NAMED
from ..report import PICTURE_ENDINGS, Report, draw
from .references import file_hashes, load_data, load_example, load_model
from .terminal import show_alignment, show_inspection, stages

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


ALIGNING = {name: method for name, method in NAMED.items() if isinstance(method, Method)}
FAILED, INTERRUPTED = 2, 130  # the statuses that shells know

_out, _err = Console(), Console(stderr=True)


class _Commands(TyperGroup):
    """The commands; an interrupt ends each of them with one word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _err.print("stopped")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    help="Fuse trained PyTorch networks of different depth and width into one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # references have brackets
)


def main() -> None:
    """Run the command line; an error of the library ends it with one message."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no text
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except FuseError as error:
        _complain(f"error: {error}", "red")
        sys.exit(FAILED)


@app.command()
def demo(
    picture: Annotated[
        Path, typer.Option(help="Where to draw the alignment (.png, .svg or .pdf).")
    ] = Path("fxfuse-demo/alignment.png"),
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the split, the training and the order of the samples.",
            min=0,
            max=2**32 - 1,
        ),
    ] = 0,
) -> None:
    """Train two small networks on real digits, align and fuse them, and compare."""
    from .demo import run_demo  # scikit-learn, which only the demo needs

    require_writable(picture, "--picture", PICTURE_ENDINGS)
    with stages(_err) as progress:
        result = run_demo(picture, seed, progress)
    table = Table(title=f"scikit-learn digits, {result.test_images} test images, seed {seed}")
    table.add_column("network")
    table.add_column("parameters", justify="right")
    table.add_column("accuracy", justify="right")
    for name, size, accuracy in result.rows:
        table.add_row(name, f"{size:,}", f"{accuracy:.1f} %")
    _out.print(table)
    _say(f"alignment drawn in {result.picture}")


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help=MODEL)],
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Shape of an input without the batch axis, such as 3x224x224 or 77:int64; "
            "once for each input of the model.",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print JSON: name, parameters, free_units, chain, segments (label, resolution, "
            "layers), spaces (name, size, parent, axes, features), frozen (tensor, dim, count, "
            "node, reason).",
        ),
    ] = False,
) -> None:
    """Show what is found in a model: chain, layers, segments, spaces, what is fixed and why."""
    if (data is None) == (not inputs):
        raise ArgumentError(
            "no inputs" if data is None else "inputs of two kinds",
            where="--data and --input",
            expected="either data, or the shape of each input",
            do="give one of them, such as --input 3x224x224",
        )
    with stages(_err) as progress:
        (network,) = _load([model], progress)
        if data is None:
            example = tuple(map(load_example, inputs or ()))
        else:
            example = _read(data, 2, 0, progress).example()
        inspection = inspect(network, example, progress=progress)
    if as_json:
        typer.echo(inspection.to_json())
    else:
        show_inspection(_out, inspection)


@app.command("align")
def align_command(
    models: Models,
    data: Data,
    method: Annotated[str, typer.Option(help=", ".join(ALIGNING))] = "best",
    samples: Samples = 1000,
    seed: Seed = 0,
    picture: Picture = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print JSON: networks, segments (label, reference, layers, costs)."
        ),
    ] = False,
) -> None:
    """Show which layers of two or more models correspond."""
    aligning = method_named(method, ALIGNING)
    require_writable(picture, "--picture", PICTURE_ENDINGS)
    with stages(_err) as progress:
        networks = _load(models, progress)
        calibration = _read(data, samples, seed, progress)
        alignment = align(networks, calibration, method=aligning, progress=progress)
    if as_json:
        typer.echo(alignment.to_json(), nl=False)
    else:
        show_alignment(_out, alignment)
    if picture is not None:
        draw(alignment, picture)
        if not as_json:
            _say(f"alignment drawn in {picture}")


@app.command("fuse")
def fuse_command(
    models: Models,
    data: Data,
    output: Output,
    weights: Weights = None,
    width: Width = None,
    anchor: Anchor = None,
    alignment: AlignmentFile = None,
    method: Annotated[str, typer.Option(help=", ".join(NAMED))] = "best",
    samples: Samples = 1000,
    seed: Seed = 0,
    picture: Picture = None,
    page: Page = None,
) -> None:
    """Fuse trained models into one and save it."""
    fusing = method_named(method, NAMED)
    require_writable(output, "--output")
    require_writable(picture, "--picture", PICTURE_ENDINGS)
    require_writable(page, "--report", [".html"])
    options: dict[str, Any] = {
        "weights": parsed_weights(weights),
        "width": width,
        "anchor": anchor,
        "alignment": alignment,
    }
    files = {"--picture": picture, "--report": page}
    named = {f"--{name}": value for name, value in options.items()}
    require_no_options(method, ALIGNING, named | files)
    options["alignment"] = None if alignment is None else Alignment.load(alignment)
    given = {name: value for name, value in options.items() if value is not None}
    with stages(_err) as progress:
        networks = _load(models, progress)
        hashes = file_hashes(models)
        calibration = _read(data, samples, seed, progress)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FusionWarning)  # they are shown below
            fused = fusing(networks, calibration, **given, progress=progress)
        record = fused.meta["fxfuse"]
        if isinstance(record, Report):
            record = replace(record, files=hashes, seeds=record.seeds | {"data": seed})
            fused.meta["fxfuse"] = record
        progress("save weights", 0.0)
        refusal = save_at_least_weights(fused, output)
        if page is not None:
            compared = dict(zip(record.alignment.names, networks)) | {"fused": fused}
            scores = _scores(compared, data, seed, calibration.samples, progress)
            record.save_html(page, scores, _origin(models, data, calibration.samples))
    if refusal is not None:
        _say(f"weights alone, as there is {refusal.met}: {refusal.where}")
    if isinstance(record, Report):
        _show_fusion(record, calibration.samples, output)
    else:
        _say(f"the weights of {len(record.pairs)} layers transferred: {output}")
    if picture is not None:
        draw(record.alignment, picture)
        _say(f"alignment drawn in {picture}")
    if page is not None:
        _say(f"report written in {page}")


def _show_fusion(report: Report, samples: int, output: Path) -> None:
    show_alignment(_out, report.alignment)
    for sentence in report.warnings:
        _complain(f"warning: {sentence}", "yellow")
    _say(
        f"fused {len(report.alignment.names)} models on {samples} samples in "
        f"{sum(report.seconds.values()):.1f} s, widths of model {report.anchor}: {output}"
    )


def _scores(
    networks: dict[str, nn.Module], data: str, seed: int, samples: int, progress: Progress
) -> dict[str, tuple[float, float]]:
    """Return accuracy and loss of each network on the calibration data, if these have labels."""
    progress("compare", 0.0)
    with _data_errors(data), heard_by(partial(progress, "compare")):
        return compare(networks, load_data(data, seed=seed), samples)


def _origin(models: Sequence[str], data: str, samples: int) -> dict[str, str]:
    """Return what the command line says of a fusion, by name."""
    references = {f"model {k}": reference for k, reference in enumerate(models)}
    return references | {"data": data, "samples": str(samples)}


def _load(models: Sequence[str], progress: Progress) -> list[nn.Module]:
    networks: list[nn.Module] = []
    for reference in models:
        progress("load models", len(networks) / len(models))
        networks.append(load_model(reference))
    return networks


def _read(data: str, samples: int, seed: int, progress: Progress) -> Calibration:
    progress("read data", 0.0)
    batches = load_data(data, seed=seed)
    with _data_errors(data), heard_by(partial(progress, "read data")):
        return Calibration(batches, samples)


@contextmanager
def _data_errors(reference: str) -> Iterator[None]:
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


def _complain(text: str, style: str) -> None:
    _err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _say(text: str) -> None:
    _out.print(text, markup=False, highlight=False, soft_wrap=True)
