"""What is written on the command line, checked before any work is done for it.

The command line: `fxfuse demo`, `fuse`, `align` and `inspect`.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from .._progress import heard_by
from ..alignment.inspection import inspect
from ..calibration.data import Calibration
from ..errors import ArgumentError, DataError, FuseError
from ..fusion.barrier import compare
from ..fusion.fuse import Method, align
from ..io.save import save_at_least_weights
from ..ir import Alignment
from ..presets import average, best, c2m3, clafusion, elastic_zip, git_rebasin, hmt, otfusion, zipit
from ..report import PICTURE_ENDINGS, Report, draw
from .references import file_hashes, load_data, load_example, load_model
from .terminal import show_alignment, show_inspection, stages

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


METHODS: dict[str, Callable[..., fx.GraphModule]] = {
    "best": best,
    "average": average,
    "otfusion": otfusion,
    "clafusion": clafusion,
    "hmt": hmt,
    "git_rebasin": git_rebasin,
    "zipit": zipit,
    "elastic_zip": elastic_zip,
    "c2m3": c2m3,
}


ALIGNING = {name: method for name, method in METHODS.items() if isinstance(method, Method)}


STOPPED = 130  # what a shell says of a program that was interrupted


app = typer.Typer(
    help="Fuse trained PyTorch networks of different depth and width into one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # references have brackets
)


_out, _err = Console(), Console(stderr=True)


_MODEL = "package.module:factory[?key=value&...][@checkpoint.safetensors]"


_Models = Annotated[list[str], typer.Argument(help=_MODEL)]


_DATA = "imagefolder:PATH[?size=..], mnist:PATH or package.module:factory"


_Data = Annotated[str, typer.Option(help=_DATA)]


_Samples = Annotated[int, typer.Option(help="Calibration samples to read.", min=1)]


_OUTPUT = "The fused network, a safetensors file of its weights."


_Output = Annotated[Path, typer.Option(help=_OUTPUT)]


_PAIRS = "Which layers correspond, a file of what `align --json` prints."


_Pairs = Annotated[Path | None, typer.Option(help=_PAIRS)]


_PAGE = "Write a web page about the fusion, .html."


_Page = Annotated[Path | None, typer.Option("--report", help=_PAGE)]


_Seed = Annotated[int, typer.Option(help="Of the order of samples.", min=0, max=2**32 - 1)]


_Picture = Annotated[
    Path | None, typer.Option(help=f"Draw the alignment: {', '.join(PICTURE_ENDINGS)}.")
]


def main() -> None:
    """Run the command line; errors of the library end it with status 2 and one message."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no text
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except FuseError as error:
        _err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        _err.print("stopped")
        sys.exit(STOPPED)


@app.command()
def demo(
    picture: Annotated[
        Path, typer.Option(help="Where to draw the alignment (.png, .svg or .pdf).")
    ] = Path("fxfuse-demo/alignment.png"),
    seed: Annotated[
        int, typer.Option(help="Of the split, the training and the order.", min=0, max=2**32 - 1)
    ] = 0,
) -> None:
    """Train two small networks on real digits, align and fuse them, and compare."""
    from .demo import run_demo  # scikit-learn, which only the demo needs

    require_file(picture, "--picture", PICTURE_ENDINGS)
    with stages(_err) as report:
        result = run_demo(picture, seed, lambda task, done, steps: report(task, done / steps))
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
    model: Annotated[str, typer.Argument(help=_MODEL)],
    data: Annotated[str | None, typer.Option(help=_DATA)] = None,
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
    with stages(_err) as report:
        (loaded,) = _load([model], report)
        example = tuple(map(load_example, inputs or ()))
        if data is not None:
            example = _read(data, 2, 0, report).example()
        found = inspect(loaded, example, progress=report)
    if as_json:
        typer.echo(found.to_json())
    else:
        show_inspection(_out, found)


@app.command("align")
def align_command(
    models: _Models,
    data: _Data,
    method: Annotated[str, typer.Option(help=", ".join(ALIGNING))] = "best",
    samples: _Samples = 1000,
    seed: _Seed = 0,
    picture: _Picture = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print JSON: networks, segments (label, reference, layers, costs)."
        ),
    ] = False,
) -> None:
    """Show which layers of two or more models correspond."""
    how = chosen(method, ALIGNING)
    require_file(picture, "--picture", PICTURE_ENDINGS)
    with stages(_err) as report:
        loaded = _load(models, report)
        calibration = _read(data, samples, seed, report)
        alignment = align(loaded, calibration, method=how, progress=report)
    if as_json:
        typer.echo(alignment.to_json(), nl=False)
    else:
        show_alignment(_out, alignment)
    _draw(alignment, picture, quiet=as_json)


@app.command("fuse")
def fuse_command(
    models: _Models,
    data: _Data,
    output: _Output,
    weights: Annotated[
        str | None, typer.Option(help="Shares of the models, such as 0.7,0.3, or auto; else equal.")
    ] = None,
    width: Annotated[
        float | None,
        typer.Option(help="Of the fused network, relative to the anchor's, on the whole; from 1."),
    ] = None,
    anchor: Annotated[
        int | None, typer.Option(help="Index of the model whose widths to take (the deepest).")
    ] = None,
    alignment: _Pairs = None,
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "best",
    samples: _Samples = 1000,
    seed: _Seed = 0,
    picture: _Picture = None,
    page: _Page = None,
) -> None:
    """Fuse trained models into one and save it."""
    how, given = chosen(method, METHODS), shares(weights)
    require_file(output, "--output")
    require_file(picture, "--picture", PICTURE_ENDINGS)
    require_file(page, "--report", [".html"])
    fusing: dict[str, Any] = {"--weights": given, "--width": width, "--anchor": anchor}
    shown = {"--alignment": alignment, "--picture": picture, "--report": page}
    require_fusing(method, ALIGNING, fusing | shown)
    plan = None if alignment is None else Alignment.load(alignment)
    with stages(_err) as report:
        loaded = _load(models, report)
        files = file_hashes(models)
        calibration = _read(data, samples, seed, report)
        wanted: dict[str, Any] = {"alignment": plan, "weights": given, "anchor": anchor}
        wanted |= {} if width is None else {"width": width}
        fused = how(loaded, calibration, **wanted, progress=report)
        report("save weights", 0.0)
        facts = fused.meta["fxfuse"]
        if isinstance(facts, Report):
            facts = replace(facts, files=files, seeds=facts.seeds | {"data": seed})
            fused.meta["fxfuse"] = facts
        refusal = save_at_least_weights(fused, output)
        if isinstance(facts, Report) and page is not None:
            named = dict(zip(facts.alignment.names, loaded)) | {"fused": fused}
            with _reading(data):
                report("compare", 0.0)
                labelled = load_data(data, seed=seed)
                with heard_by(partial(report, "compare")):
                    scores = compare(named, labelled, calibration.samples)
            facts.save_html(page, scores, _origin(models, data, calibration.samples))
    if refusal is not None:
        _say(f"weights alone, as there is {refusal.met}: {refusal.where}")
    if not isinstance(facts, Report):
        _say(f"the weights of {len(facts.pairs)} layers transferred: {output}")
        return
    _show_fusion(facts, calibration.samples, output)
    _draw(facts.alignment, picture)
    if page is not None:
        _say(f"report written in {page}")


def _show_fusion(facts: Report, samples: int, output: Path) -> None:
    show_alignment(_out, facts.alignment)
    _say(
        f"fused {len(facts.alignment.names)} models on {samples} samples in "
        f"{sum(facts.seconds.values()):.1f} s, widths of model {facts.anchor}: {output}"
    )


def _origin(models: Sequence[str], data: str, samples: int) -> dict[str, str]:
    """Return what the command line says of a fusion, by name."""
    told = {f"model {k}": reference for k, reference in enumerate(models)}
    return told | {"data": data, "samples": str(samples)}


def _load(models: Sequence[str], report: Callable[[str, float], None]) -> list[nn.Module]:
    loaded: list[nn.Module] = []
    for reference in models:
        report("load models", len(loaded) / len(models))
        loaded.append(load_model(reference))
    return loaded


def _read(
    reference: str, samples: int, seed: int, report: Callable[[str, float], None]
) -> Calibration:
    report("read data", 0.0)
    source = load_data(reference, seed=seed)
    with _reading(reference), heard_by(partial(report, "read data")):
        return Calibration(source, samples)


@contextmanager
def _reading(reference: str) -> Iterator[None]:
    try:
        yield
    except FuseError:
        raise
    except Exception as error:  # whatever the user's own loader raises
        raise DataError(
            f"data that cannot be read: {type(error).__name__}: {error}",
            where=f"'{reference}'",
            expected="batches whose first entry is the input",
            do="read the first batches in Python, and mend what fails there",
        ) from error


def _draw(alignment: Alignment, picture: Path | None, quiet: bool = False) -> None:
    if picture is None:
        return
    draw(alignment, picture)
    if not quiet:
        _say(f"alignment drawn in {picture}")


def _say(text: str) -> None:
    _out.print(text, markup=False, highlight=False, soft_wrap=True)
