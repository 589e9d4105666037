"""The command line: `fxfuse demo`, `inspect`, `align`, `fuse`, and the smaller tools."""

from __future__ import annotations

import io
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from ..alignment.inspection import inspect
from ..errors import ArgumentError, FuseError
from ..fusion.fuse import align
from ..presets import NAMED, method_named
from ..report import PICTURE_ENDINGS, draw
from ..version import versions
from . import tools
from .common import (
    ALIGNING,
    Across,
    AlignmentFile,
    Anchor,
    Card,
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
    as_options,
    complain,
    err,
    example_of,
    load_models,
    out,
    parsed_weights,
    read_data,
    require_writable,
    say,
)
from .recipe import EXAMPLE, Recipe, carry_out
from .terminal import show_alignment, show_inspection, stages

FAILED, INTERRUPTED = 2, 130  # the statuses that shells know


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
            complain(f"error: {as_options(str(error))}", "red")
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
        example = example_of(data, inputs, [model], [network], progress)
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
    aligning = method_named(method, ALIGNING, "--method")
    require_writable(picture, "--picture", PICTURE_ENDINGS)
    with stages(err) as progress:
        networks = load_models(models, progress)
        calibration = read_data(data, models, networks, samples, seed, progress)
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
    across: Across = False,
    alignment: AlignmentFile = None,
    method: Annotated[str, typer.Option(help=", ".join(NAMED))] = "best",
    samples: Samples = 1000,
    seed: Seed = 0,
    picture: Picture = None,
    page: Page = None,
    card: Card = None,
) -> None:
    """Fuse trained models into one and save it."""
    shares = parsed_weights(weights)
    carry_out(
        Recipe(
            tuple(models),
            data,
            str(output),
            method,
            samples,
            seed,
            tuple(shares) if isinstance(shares, list) else shares,
            width,
            anchor,
            None if alignment is None else str(alignment),
            across=across,
            picture=None if picture is None else str(picture),
            report=None if page is None else str(page),
            card=None if card is None else str(card),
        )
    )


@app.command("run")
def run_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe: see `fxfuse recipe --example`.")],
) -> None:
    """Fuse as a recipe says."""
    steps = Recipe.load(recipe)
    os.chdir(recipe.resolve().parent)
    carry_out(steps)


@app.command("recipe")
def recipe_command(
    example: Annotated[
        bool, typer.Option("--example", help="Print a recipe to start from.")
    ] = False,
    check: Annotated[Path | None, typer.Option(help="Read a recipe and print all it says.")] = None,
) -> None:
    """Print an example of a recipe, or check one."""
    if example == (check is not None):
        raise ArgumentError(
            "both of them" if example else "neither of them",
            where="--example and --check",
            expected="one of both",
            do="say `fxfuse recipe --example > recipe.yaml`, and change that file",
        )
    say((EXAMPLE if check is None else str(Recipe.load(check))).rstrip())


for _name, _command in tools.COMMANDS.items():
    app.command(_name)(_command)
