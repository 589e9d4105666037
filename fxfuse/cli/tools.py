"""The smaller commands: `fxfuse barrier`, `narrow`, `permute` and `verify`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, get_args

import typer

from .._progress import heard_by
from ..calibration.data import Calibration
from ..fusion.barrier import barrier, labelled_part
from ..fusion.narrow import narrow
from ..graph.verify import verify
from ..presets import method_named
from ..report import PICTURE_ENDINGS
from ..spaces.spaces import permute
from ..width.importance import magnitude
from ..width.narrower import Unit
from ..width.net2net import WidthReport
from .common import (
    ALIGNING,
    NETWORK,
    Curve,
    Data,
    DataOrNone,
    Inputs,
    Model,
    Output,
    Samples,
    Seed,
    Shares,
    data_errors,
    err,
    example_of,
    load_models,
    parsed_shares,
    read_data,
    require_writable,
    say,
    write_network,
)
from .references import load_data
from .terminal import stages


def barrier_command(
    first: Model,
    second: Model,
    data: Data,
    weights: Shares = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
    method: Annotated[str, typer.Option(help=", ".join(ALIGNING))] = "best",
    samples: Samples = 1000,
    seed: Seed = 0,
    picture: Curve = None,
) -> None:
    """Show loss and accuracy of the fusions of two models, along their weights; needs labels."""
    fusing = method_named(method, ALIGNING, "--method")
    shares = parsed_shares(weights)
    require_writable(picture, "--picture", PICTURE_ENDINGS)
    with stages(err) as progress:
        networks = load_models([first, second], progress)
        progress("read data", 0.0)
        with data_errors(data), heard_by(partial(progress, "read data")):
            batches = load_data(data, seed=seed, models=[first, second])
            labelled = labelled_part(batches, samples, networks)
        inputs = Calibration([call for call, _ in labelled], models=networks)
        chosen: Any = {"weights": shares, "method": fusing, "progress": progress}
        curve = barrier(networks, inputs, labelled, **chosen)
    say(str(curve))
    if picture is not None:
        curve.draw(picture)
        say(f"drawn in {picture}")


def narrow_command(
    model: Model,
    output: Output,
    to: Annotated[
        float, typer.Option(help="What to keep: a share, or a number of what --of says.")
    ] = 0.5,
    of: Annotated[str, typer.Option(help=", ".join(get_args(Unit)))] = "width",
    data: DataOrNone = None,
    inputs: Inputs = None,
    samples: Samples = 1000,
    seed: Seed = 0,
) -> None:
    """Make a model smaller; with data, refit it to compute what it did as far as it can."""
    require_writable(output, "--output", NETWORK)
    with stages(err) as progress:
        (network,) = load_models([model], progress)
        known: Any = {"to": to, "of": of, "progress": progress}
        if data is None:
            example = example_of(data, inputs, [model], [network], progress)
            small = narrow(network, example, importance=magnitude, refit=None, **known)
        else:
            read = read_data(data, [model], [network], samples, seed, progress)
            small = narrow(network, read, **known)
        write_network(small, output, progress)
    report: WidthReport = small.meta["fxfuse"]
    before, after = (sum(sizes[k] for sizes in report.sizes.values()) for k in (0, 1))
    for space, reason in report.kept.items():
        say(f"{space} keeps its width: {reason}")
    say(f"{after:,} units instead of {before:,}: {output}")


def permute_command(
    model: Model,
    output: Output,
    data: DataOrNone = None,
    inputs: Inputs = None,
    seed: Annotated[int, typer.Option(help="Seed of the new order of the units.", min=0)] = 0,
) -> None:
    """Shuffle the units of a model; it still computes the same."""
    require_writable(output, "--output", NETWORK)
    with stages(err) as progress:
        (network,) = load_models([model], progress)
        example = example_of(data, inputs, [model], [network], progress)
        shuffled = permute(network, example, seed)
        verify(network, shuffled, example)
        write_network(shuffled, output, progress)
    say(f"permuted, and computes the same: {output}")


def verify_command(
    before: Model, after: Model, data: DataOrNone = None, inputs: Inputs = None
) -> None:
    """Tell whether two models compute the same; if not, name the first node that differs."""
    with stages(err) as progress:
        first, second = pair = load_models([before, after], progress)
        verify(first, second, example_of(data, inputs, [before, after], pair, progress))
    say("both compute the same")


COMMANDS: dict[str, Callable[..., None]] = {
    "barrier": barrier_command,
    "narrow": narrow_command,
    "permute": permute_command,
    "verify": verify_command,
}
