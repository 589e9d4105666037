"""The command line: `fxfuse demo`, `inspect`, `align`, `fuse`, and the smaller tools."""

from __future__ import annotations

import io
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from torch import nn
from typer.core import TyperGroup

from .._progress import Progress, heard_by
from ..alignment.inspection import inspect
from ..errors import FuseError, FusionWarning
from ..fusion.barrier import compare
from ..fusion.fuse import align
from ..ir import Alignment
from ..presets import NAMED
from ..report import PICTURE_ENDINGS, Report, amount, draw
from ..version import versions
from . import tools
from .common import (
    ALIGNING,
    NETWORK,
    AlignmentFile,
    Anchor,
    Data,
    DataOrNone,
    Inputs,
    Model,
    Models,
    Output,
    Page,
    Picture,
    Samples,
    Seed,
    Weights,
    Width,
    complain,
    data_errors,
    err,
    example_of,
    load_models,
    method_named,
    out,
    parsed_weights,
    read_data,
    require_no_options,
    require_writable,
    say,
    write_network,
)
from .references import file_hashes, load_data
from .terminal import show_alignment, show_inspection, show_scores, stages

FAILED, INTERRUPTED = 2, 130  # the statuses that shells know
FUSED = "fused"


class _Commands(TyperGroup):
    """The commands; an interrupt ends each with one word, an error with one message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("stopped")
            raise typer.Exit(INTERRUPTED) from None
        except FuseError as error:
            if ctx.params.get("with_traceback"):
                complain(traceback.format_exc(), "dim")
            complain(f"error: {error}", "red")
            raise typer.Exit(FAILED) from None


app = typer.Typer(
    cls=_Commands,
    help="Fuse trained PyTorch networks of different depth and width into one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # references have brackets
)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no text
            stream.reconfigure(errors="backslashreplace")
    app()


def _show_versions(asked: bool) -> None:
    if asked:
        numbers = versions()
        say(f"fxfuse {numbers.pop('fxfuse')}")
        say(", ".join(f"{name} {number}" for name, number in numbers.items()))
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print versions.", callback=_show_versions, is_eager=True),
    ] = False,
    with_traceback: Annotated[
        bool,
        typer.Option("--traceback", help="Show where in the code an error is from; comes first."),
    ] = False,
) -> None:
    """Fuse trained PyTorch networks of different depth and width into one."""


@app.command()
def demo(
    picture: Annotated[
        Path, typer.Option(help="Where to draw the alignment (.png, .svg or .pdf).")
    ] = Path("fxfuse-demo.png"),
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
    with stages(err) as progress:
        result = run_demo(picture, seed, progress)
    table = Table(title=f"scikit-learn digits, {result.test_images} test images, seed {seed}")
    table.add_column("network")
    table.add_column("parameters", justify="right")
    table.add_column("accuracy", justify="right")
    for name, size, accuracy in result.rows:
        table.add_row(name, f"{size:,}", f"{accuracy:.1f} %")
    out.print(table)
    say(f"alignment drawn in {result.picture}")


@app.command("inspect")
def inspect_command(
    model: Model,
    data: DataOrNone = None,
    inputs: Inputs = None,
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
    with stages(err) as progress:
        (network,) = load_models([model], progress)
        example = example_of(data, inputs, progress)
        inspection = inspect(network, example, progress=progress)
    if as_json:
        typer.echo(inspection.to_json())
    else:
        show_inspection(out, inspection)


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
    with stages(err) as progress:
        networks = load_models(models, progress)
        calibration = read_data(data, samples, seed, progress)
        alignment = align(networks, calibration, method=aligning, progress=progress)
    if as_json:
        typer.echo(alignment.to_json(), nl=False)
    else:
        show_alignment(out, alignment)
    if picture is not None:
        draw(alignment, picture)
        if not as_json:
            say(f"alignment drawn in {picture}")


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
    require_writable(output, "--output", NETWORK)
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
    with stages(err) as progress:
        networks = load_models(models, progress)
        hashes = file_hashes(models)
        calibration = read_data(data, samples, seed, progress)
        if options["alignment"] is None and method in ALIGNING and len(models) > 1:
            given["alignment"] = align(  # with the costs of all pairs, which fusing does without
                networks, calibration, method=ALIGNING[method], progress=progress
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FusionWarning)  # they are shown below
            fused = fusing(networks, calibration, **given, progress=progress)
        record = fused.meta["fxfuse"]
        if isinstance(record, Report):
            record = replace(record, files=hashes, seeds=record.seeds | {"data": seed})
            fused.meta["fxfuse"] = record
        write_network(fused, output, progress)
        if isinstance(record, Report):
            compared = dict(zip(record.alignment.names, networks)) | {FUSED: fused}
            scores = _scores(compared, data, seed, calibration.samples, progress)
        if page is not None:
            record.save_html(page, scores, _origin(models, data, calibration.samples))
    if isinstance(record, Report):
        _show_fusion(record, scores, calibration.samples, output)
    else:
        say(f"the weights of {len(record.pairs)} layers transferred: {output}")
    if picture is not None:
        draw(record.alignment, picture)
        say(f"alignment drawn in {picture}")
    if page is not None:
        say(f"report written in {page}")


def _show_fusion(
    report: Report, scores: Mapping[str, tuple[float, float]], samples: int, output: Path
) -> None:
    show_alignment(out, report.alignment)
    if scores:
        show_scores(out, scores)
    for sentence in report.warnings:
        complain(f"warning: {sentence}", "yellow")
    say(
        f"fused {amount(len(report.alignment.names), 'model')} on {amount(samples, 'sample')} in "
        f"{sum(report.seconds.values()):.1f} s, widths of model {report.anchor}: {output}"
    )


def _scores(
    networks: dict[str, nn.Module], data: str, seed: int, samples: int, progress: Progress
) -> dict[str, tuple[float, float]]:
    """Return accuracy and loss of each network on the calibration data, if these have labels."""
    progress("compare", 0.0)
    with data_errors(data), heard_by(partial(progress, "compare")):
        apart = [name for name in networks if name != FUSED]
        return compare(networks, load_data(data, seed=seed), samples, ensemble=apart)


def _origin(models: Sequence[str], data: str, samples: int) -> dict[str, str]:
    """Return what the command line says of a fusion, by name."""
    references = {f"model {k}": reference for k, reference in enumerate(models)}
    return references | {"data": data, "samples": str(samples)}


for _name, _command in tools.COMMANDS.items():
    app.command(_name)(_command)
