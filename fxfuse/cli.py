"""The command line: `fxfuse demo` and `fxfuse fuse`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from . import presets
from .data import Calibration
from .display import draw
from .errors import ArgumentError, FuseError
from .evaluation import compare
from .files import sha256_of
from .fusion import Method, fuse
from .references import load_data, load_model, save_weights

METHODS: dict[str, Method] = {"best": presets.best, "clafusion": presets.clafusion}
app = typer.Typer(
    help="Fuse trained PyTorch networks of different depth and width into one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # references have brackets
)
_out, _err = Console(), Console(stderr=True)


def main() -> None:
    """Run the command line; errors of the library end it with status 2 and one message."""
    try:
        app()
    except FuseError as error:
        _err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        _err.print("stopped")
        sys.exit(130)


@app.command()
def demo(
    picture: Annotated[
        Path, typer.Option(help="Where to draw the alignment (.png, .svg or .pdf).")
    ] = Path("fxfuse-demo/alignment.png"),
    seed: Annotated[int, typer.Option(help="Of the split, the training and the order.")] = 0,
) -> None:
    """Train two small networks on real digits, align and fuse them, and compare."""
    from .demo import run_demo

    with _bar() as bar:
        tasks: dict[str, int] = {}

        def report(task: str, done: int, steps: int) -> None:
            if task not in tasks:
                tasks[task] = bar.add_task(task, total=steps)
            bar.update(tasks[task], completed=done)

        result = run_demo(picture, seed, report)
    table = Table(title=f"scikit-learn digits, {result.test_images} test images, seed {seed}")
    table.add_column("network")
    table.add_column("parameters", justify="right")
    table.add_column("accuracy", justify="right")
    for name, size, accuracy in result.rows:
        table.add_row(name, f"{size:,}", f"{accuracy:.1f} %")
    _out.print(table)
    _out.print(f"alignment drawn in {result.picture}", soft_wrap=True)


@app.command("fuse")
def fuse_command(
    models: Annotated[
        list[str],
        typer.Argument(help="package.module:factory[?key=value&...][@checkpoint.safetensors]"),
    ],
    data: Annotated[
        str, typer.Option(help="imagefolder:PATH[?size=..], mnist:PATH or package.module:factory")
    ],
    output: Annotated[Path, typer.Option(help="Fused weights, a safetensors file.")],
    weights: Annotated[
        str | None, typer.Option(help="Shares of the models, such as 0.7,0.3; equal by default.")
    ] = None,
    anchor: Annotated[
        int | None, typer.Option(help="Index of the model whose widths to take (the deepest).")
    ] = None,
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "best",
    samples: Annotated[int, typer.Option(help="Calibration samples to read.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the order of samples.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="Draw the alignment here.")] = None,
    page: Annotated[
        Path | None, typer.Option("--report", help="Write a web page about the fusion here.")
    ] = None,
) -> None:
    """Fuse trained models into one and save its weights."""
    chosen, shares = _method(method), _numbers(weights)
    _require_folder(output)
    if page is not None:
        _require_folder(page, "--report", ".html")
    loaded = [load_model(reference) for reference in models]
    with _bar() as bar:
        tasks: dict[str, int] = {}

        def report(stage: str, share: float) -> None:
            for other in (t for s, t in tasks.items() if s != stage):
                bar.update(other, completed=1.0)
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=1.0)
            bar.update(tasks[stage], completed=share)

        report("read data", 0.0)
        source = load_data(data, seed=seed)
        calibration = Calibration(source, samples, lambda share: report("read data", share))
        fused = fuse(
            loaded, calibration, weights=shares, anchor=anchor, method=chosen, progress=report
        )
        save_weights(fused.state_dict(), output)
        report("save weights", 1.0)
    report = fused.meta["fxfuse"]
    _out.print(str(report.alignment), markup=False, highlight=False)
    _out.print(
        f"fused {len(loaded)} models on {calibration.samples} samples in "
        f"{sum(report.seconds.values()):.1f} s, widths of model {report.anchor}: {output}",
        soft_wrap=True,
    )
    if picture is not None:
        draw(report.alignment, picture)
        _out.print(f"alignment drawn in {picture}", soft_wrap=True)
    if page is not None:
        _write_page(page, fused, models, loaded, data, seed, calibration.samples)


def _write_page(
    page: Path,
    fused: nn.Module,
    models: Sequence[str],
    loaded: Sequence[nn.Module],
    data: str,
    seed: int,
    samples: int,
) -> None:
    """Write the report of a fusion, with accuracies if the data have labels, and file hashes."""
    report = fused.meta["fxfuse"]
    named = dict(zip(report.alignment.names, loaded)) | {"fused": fused}
    found = compare(named, load_data(data, seed=seed), samples)
    paths = [Path(reference.partition("@")[2]) for reference in models]
    files = {str(path): sha256_of(path) for path in paths if path.is_file()}
    facts = {f"model {k}": reference for k, reference in enumerate(models)}
    facts |= {"data": data, "samples": str(samples)}
    report = replace(report, files=files, seeds=report.seeds | {"data": seed})
    report.save_html(page, found, facts)
    _out.print(f"report written in {page}", soft_wrap=True)


@contextmanager
def _bar() -> Iterator[Progress]:
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=_err, disable=not _err.is_terminal) as bar:
        yield bar


def _method(name: str) -> Method:
    if name in METHODS:
        return METHODS[name]
    raise ArgumentError(
        f"the method '{name}'",
        where="--method",
        expected=f"one of {', '.join(METHODS)}",
        do="leave it out for the best one",
    )


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(
            f"weights '{text}'",
            where="--weights",
            expected="numbers with commas between them, such as 0.7,0.3",
            do="leave it out for equal weights",
        ) from error


def _require_folder(path: Path, option: str = "--output", ending: str = ".safetensors") -> None:
    """Refuse a path that cannot be written before any work is done for it."""
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if path.is_dir() or not parent.is_dir():
        raise ArgumentError(
            "an output that is a folder" if path.is_dir() else f"a file in the way: {parent}",
            where=f"{option} {path}",
            expected="the path of a file to write",
            do=f"give a file name that ends in {ending}",
        )
