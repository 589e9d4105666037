"""A fusion written down: what `fxfuse run recipe.yaml` and `fxfuse fuse` do.

A recipe is a file of YAML. `include` names other files whose keys hold where the recipe has none.
Paths and modules are those of the folder that the recipe is in.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import fx, nn

from .._files import write_text
from .._progress import Progress, heard_by
from .._ranks import rank
from .._schema import read, written
from ..calibration.data import Calibration
from ..errors import ArgumentError, FusionWarning
from ..fusion.barrier import compare
from ..fusion.heads import Heads, Separate, Union
from ..ir import Alignment
from ..presets import NAMED, method_named
from ..report import PICTURE_ENDINGS, Report, amount, card_of, draw
from .common import (
    ALIGNING,
    NETWORK,
    as_options,
    complain,
    data_errors,
    err,
    load_models,
    out,
    read_data,
    require_no_options,
    require_writable,
    say,
    write_network,
)
from .references import file_hashes, load_data
from .terminal import show_alignment, show_scores, stages

FUSED = "fused"
LONG = 10.0  # seconds: what took longer is told how to be faster
EXAMPLE = """\
# What `fxfuse run recipe.yaml` fuses: as it stands, two small networks of the demo. Name yours.
# Paths and modules are those of the folder of this file.
models:  # yours: my_project:deep@deep.safetensors, hf:PATH, timm:NAME, or a file that fxfuse wrote
  - fxfuse.cli.demo:trained?depth=2&width=16
  - fxfuse.cli.demo:trained?depth=1&width=12&seed=1
data: fxfuse.cli.demo:unseen  # yours: imagefolder:photos?size=224, text:, npz:, dataset:PATH
output: fused.safetensors

# Everything below may be left out.
method: best  # or another preset, such as average, git_rebasin, zipit or ties
weights: [0.5, 0.5]  # a share of each model, or auto
width: 1.0  # room for unlike units: 1.5 allows 2.25 times the multiply-adds
samples: 1000  # unlabelled ones; labels are only counted, never fused on
seed: 0  # of the order of the samples
report: report.html  # a page about the fusion
picture: alignment.svg
card: card.md  # a model card in the form that model hubs read, there as README.md

# anchor: 0  # whose widths the result has; the deepest model if left out
# across: true  # take models of other kinds than the anchor's as targets
# alignment: alignment.json  # of `fxfuse align ... --json`
# heads: {kind: separate}  # for models of different tasks; kind: union takes labels: [[..], [..]]
# include: [common.yaml]  # keys that this file does not have
"""


@dataclass(frozen=True)
class HeadsChoice:
    """The heads of a fusion of models of different tasks.

    Attributes:
        kind: `separate` for a head of each model, `union` for one with the labels of all.
        after: The layer behind which the models are cut, or `auto`.
        labels: Of `union`, the labels of each model's outputs, in order.
        multiply_adds: With `auto`, how many the result may take, relative to the anchor.
        parameters: With `auto`, how many it may have, relative to the anchor.
    """

    kind: str
    after: str | None = None
    labels: tuple[tuple[str | int, ...], ...] = ()
    multiply_adds: float = float("inf")
    parameters: float = float("inf")

    def heads(self) -> Heads:
        """Return the heads that `fuse` takes.

        Raises:
            ArgumentError: If there is no such kind, or labels are given that nobody needs.
        """
        if self.kind == "separate" and not self.labels:
            return Separate(self.after, self.multiply_adds, self.parameters)
        if self.kind == "union":
            return Union(
                labels=self.labels,
                after=self.after,
                multiply_adds=self.multiply_adds,
                parameters=self.parameters,
            )
        raise ArgumentError(
            f"heads of the kind '{self.kind}'" + " with labels" * bool(self.labels),
            where="the recipe, heads",
            expected="kind: separate, without labels, or kind: union, with the labels of each",
            do="write heads: {kind: separate}, or heads: {kind: union, labels: [[..], [..]]}",
        )


@dataclass(frozen=True)
class Recipe:
    """A fusion from files to files.

    Attributes:
        models: References of the models.
        data: Reference of the calibration data.
        output: Where to write the fused network.
        method: The name of a preset.
        samples: How many samples to read.
        seed: Of their order.
        weights: A share of each model, or `auto`; equal if not given.
        width: Of the result, in widths of the anchor.
        anchor: Index of the model whose widths the result has.
        alignment: A file of an alignment.
        heads: For models of different tasks.
        across: Take models of other kinds than the anchor's, too.
        picture: Where to draw the alignment.
        report: Where to write a page about the fusion.
        card: Where to write a model card.
    """

    models: tuple[str, ...]
    data: str
    output: str
    method: str = "best"
    samples: int = 1000
    seed: int = 0
    weights: tuple[float, ...] | str | None = None
    width: float | None = None
    anchor: int | None = None
    alignment: str | None = None
    heads: HeadsChoice | None = None
    across: bool = False
    picture: str | None = None
    report: str | None = None
    card: str | None = None

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe, with what it includes.

        Raises:
            ArgumentError: If a file cannot be read or is no recipe; says which key is wrong.
        """
        recipe: Recipe = read(cls, _keys_of(path, ()), f"the recipe {path}")
        return recipe

    def __str__(self) -> str:
        """Return the recipe in YAML, with the defaults that the result depends on."""
        whole, chosen = written(self), written(self, defaults=False)
        kept = {
            key: whole[key] for key in ("models", "data", "output", "method", "samples", "seed")
        }
        return str(yaml.safe_dump(kept | chosen, sort_keys=False))


def _keys_of(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Return the keys of a recipe and of those that it includes; its own count."""
    try:
        keys = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _unreadable(path, f"a recipe that cannot be read: {error}") from error
    if not isinstance(keys, dict):
        raise _unreadable(path, f"a recipe that holds a {type(keys).__name__}")
    included = keys.pop("include", [])
    names = [included] if isinstance(included, str) else included
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _unreadable(path, f"an include of {included!r}")
    known: dict[str, Any] = {}
    for name in names:
        other = path.parent / name
        if other.resolve() in [p.resolve() for p in (path, *above)]:
            raise _unreadable(path, f"a recipe that includes itself: {name}")
        known |= _keys_of(other, (path, *above))
    return known | keys


def _unreadable(path: Path, met: str) -> ArgumentError:
    return ArgumentError(
        met,
        where=str(path),
        expected="a YAML file of keys such as models, data and output; include: names files",
        do="compare it with what `fxfuse recipe --example` prints",
    )


def carry_out(recipe: Recipe) -> None:
    """Fuse as a recipe says, write its files, and print what was done."""
    files = {name: _path(getattr(recipe, name)) for name in ("picture", "report", "card")}
    output = Path(recipe.output)
    fusing = method_named(recipe.method, NAMED, "the key `method`")
    require_writable(output, "--output", NETWORK)
    require_writable(files["picture"], "--picture", PICTURE_ENDINGS)
    require_writable(files["report"], "--report", [".html"])
    require_writable(files["card"], "--card", [".md"])
    of_fusing = ("weights", "width", "anchor", "alignment", "heads", *files)
    named = {f"--{name}": getattr(recipe, name) for name in of_fusing}
    named["--across"] = recipe.across or None
    require_no_options(recipe.method, ALIGNING, named)
    given = _options(recipe)
    with stages(err) as progress:
        networks = load_models(recipe.models, progress)
        hashes = file_hashes(recipe.models)
        chosen = recipe.samples, recipe.seed, progress
        calibration = read_data(recipe.data, recipe.models, networks, *chosen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FusionWarning)  # they are shown below
            fused = fusing(networks, calibration, **given, progress=progress)
        record = fused.meta["fxfuse"]
        if isinstance(record, Report):
            record = replace(record, files=hashes, seeds=record.seeds | {"data": recipe.seed})
            fused.meta["fxfuse"] = record
        if rank():
            return  # the first process writes, and says what was done
        write_network(fused, output, progress)
        scores: dict[str, tuple[float, float]] = {}
        if isinstance(record, Report):
            scores = _scores(recipe, networks, fused, calibration, progress)
            _write(recipe, record, scores, files)
    if isinstance(record, Report):
        _show(record, scores, calibration.samples, output)
    else:
        say(f"the weights of {len(record.pairs)} layers transferred: {output}")
    for what, path in files.items():
        if path is not None:
            say(f"{SAID[what]} in {path}")


SAID = {
    "picture": "alignment drawn",
    "report": "report written",
    "card": "model card written",
}


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _options(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of `fuse` that a recipe gives."""
    weights = list(recipe.weights) if isinstance(recipe.weights, tuple) else recipe.weights
    options: dict[str, Any] = {"weights": weights, "width": recipe.width, "anchor": recipe.anchor}
    if recipe.alignment is not None:
        options["alignment"] = Alignment.load(recipe.alignment)
    if recipe.across:
        options["across"] = True
    if recipe.heads is not None:
        options["heads"] = recipe.heads.heads()
    return {name: value for name, value in options.items() if value is not None}


def _scores(
    recipe: Recipe,
    networks: list[nn.Module],
    fused: fx.GraphModule,
    calibration: Calibration,
    progress: Progress,
) -> dict[str, tuple[float, float]]:
    """Return accuracy and loss of each network on the samples, if these have labels."""
    if recipe.heads is not None:
        return {}
    names = fused.meta["fxfuse"].alignment.names
    compared = dict(zip(names, networks)) | {FUSED: fused}
    progress("compare", 0.0)
    with data_errors(recipe.data), heard_by(partial(progress, "compare")):
        data = load_data(recipe.data, seed=recipe.seed, models=recipe.models)
        return compare(compared, data, calibration.samples, ensemble=names)


def _write(
    recipe: Recipe,
    report: Report,
    scores: Mapping[str, tuple[float, float]],
    files: Mapping[str, Path | None],
) -> None:
    """Write the picture, the page and the card that a recipe asks for."""
    facts = {"recipe": str(recipe)}
    if files["report"] is not None:
        report.save_html(files["report"], scores, facts)
    if files["card"] is not None:
        parents = dict(zip(report.alignment.names, recipe.models))
        write_text(files["card"], card_of(report, Path(recipe.output).name, parents, scores, facts))
    if files["picture"] is not None:
        draw(report.alignment, files["picture"])


def _show(
    report: Report, scores: Mapping[str, tuple[float, float]], samples: int, output: Path
) -> None:
    show_alignment(out, report.alignment)
    say(report.table)
    if scores:
        show_scores(out, scores)
    for sentence in report.warnings:
        complain(f"warning: {as_options(sentence)}", "yellow")
    say(
        f"fused {amount(len(report.alignment.names), 'model')} on {amount(samples, 'sample')} in "
        f"{sum(report.seconds.values()):.1f} s, widths of model {report.anchor}: {output}"
    )
    if sum(report.seconds.values()) > LONG:
        say(_faster(report))


def _faster(report: Report) -> str:
    """Say what took longest, and what would make it faster."""
    stage = max(report.seconds, key=report.seconds.__getitem__)
    share = report.seconds[stage] / sum(report.seconds.values())
    layers = ", ".join(f"{layer.node} {layer.seconds:.1f} s" for layer in report.dearest[:3])
    dearest = f" (of it {layers})" if layers and stage == "refit" else ""
    moments = ", or --method clafusion, which fits moments only" if layers else ""
    return f"{share:.0%} of this in '{stage}'{dearest}; faster: fewer --samples{moments}"
