"""A fusion's report as one self-contained web page, which asks the network for nothing.

The templates beside this module say what the page looks like; here are the facts that they show.
They escape every text that comes from models, files or callers, and a content policy in the page
forbids the browser to fetch anything.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .._checked import checked
from .._files import write_text
from ._shared import (
    ALIKE,
    CHOSEN,
    INK,
    MUTED,
    UNLIKE,
    CostMatrix,
    amount,
    clean,
    cost_matrices,
    layers_of,
    parameters_in,
    shades,
)
from .alignment_picture import description_of, inserted_layers, largest_cost, lay_out, svg_of
from .report import Accuracy, Report


@checked()
def save_page(
    report: Report,
    path: str | os.PathLike[str],
    accuracy: Mapping[str, Accuracy],
    facts: Mapping[str, str],
) -> None:
    """Write the page of a report in one step.

    Args:
        report: What a fusion did.
        path: The file to write.
        accuracy: Accuracy in percent by the name of a network, or accuracy and loss.
        facts: Other facts about the run, by name.
    """
    write_text(path, page_of(report, accuracy, facts))


def page_of(report: Report, accuracy: Mapping[str, Accuracy], facts: Mapping[str, str]) -> str:
    """Return the page of a report as HTML."""
    alignment = report.alignment
    scene = lay_out(alignment, report.removed)
    top = largest_cost(alignment) or 1.0
    matrices = [matrix for matrix in cost_matrices(alignment) if len(matrix.rows) > 1]
    page = _environment().get_template("page.html.jinja")
    text = page.render(
        title="Fusion of " + " and ".join(alignment.names),
        report=report,
        networks=_networks(report),
        scores=[_score(name, value) for name, value in accuracy.items()],
        picture=Markup(svg_of(scene, description_of(alignment))),
        picture_height=scene.height,
        picture_shape=scene.height / scene.width,
        matrices=[(matrix, _cells(matrix, top)) for matrix in matrices],
        origin=_origin(report, facts),
        ink=INK,
        muted=MUTED,
        alike=ALIKE,
        unlike=UNLIKE,
        chosen=CHOSEN,
    )
    return clean(text)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fxfuse.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = _number
    environment.filters["clamp"] = lambda value, low, high: min(max(value, low), high)
    environment.globals["zip"] = zip
    return environment


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


class _Network(NamedTuple):
    """A row of the table of networks; of the last rows, only what they cost and where they are."""

    name: str
    parameters: str
    multiply_adds: str
    away: str
    layers: str = ""
    weight: str = ""
    anchor: str = ""
    changes: str = ""


def _networks(report: Report) -> list[_Network]:
    """Return a row for each network, for their ensemble, and for the fused one."""
    rows, count = [_Network(*row) for row in report.rows], len(report.alignment.names)
    return [_described(row, report, k) if k < count else row for k, row in enumerate(rows)]


def _described(row: _Network, report: Report, k: int) -> _Network:
    """Return the row of a network with what the fusion did to it."""
    alignment = report.alignment
    inserted = inserted_layers(alignment, report.removed, k)
    merged = len(report.removed[k]) if report.removed else 0
    changes = [amount(inserted, "neutral layer")] if inserted else []
    changes += [f"{amount(merged, 'layer')} merged away"] if merged else []
    changes += [f"relative error {report.errors[k]:.3g}"] if report.errors[k] else []
    return row._replace(
        parameters=row.parameters or parameters_in(alignment, k),
        layers=str(len(layers_of(alignment, k))),
        weight=f"{report.weights[k]:.4g}",
        anchor="yes" if k == report.anchor else "",
        changes=", ".join(changes),
    )


class _Score(NamedTuple):
    """A row of the table of accuracies."""

    name: str
    percent: float
    loss: float | None


def _score(name: str, value: Accuracy) -> _Score:
    percent, loss = value if isinstance(value, tuple) else (value, None)
    return _Score(name, percent, loss)


class _Cell(NamedTuple):
    """A cell of a heat map; blank where two layers never pair."""

    text: str = ""
    exact: str = ""
    fill: str = ""
    chosen: bool = False


def _cells(matrix: CostMatrix, top: float) -> list[list[_Cell]]:
    """Return the cells of a heat map in the colours of the picture, whose scale ends at `top`."""
    finite = [cost for row in matrix.costs for cost in row if abs(cost) != float("inf")]
    high = max(finite, default=0.0)

    def cell(cost: float, chosen: bool) -> _Cell:
        if abs(cost) == float("inf"):
            return _Cell(chosen=chosen)
        fill, _ = shades(min(abs(cost) / top, 1.0))
        text = f"{cost:.2f}" if high >= 0.1 else f"{cost:.2g}"
        return _Cell(text, f"{cost:.6g}", fill, chosen)

    return [
        [cell(cost, matrix.chosen[j] == i) for j, cost in enumerate(row)]
        for i, row in enumerate(matrix.costs)
    ]


def _origin(report: Report, facts: Mapping[str, str]) -> dict[str, str]:
    """Return what a fusion depends on, by name: what the caller says, seeds, files and versions."""
    seeds = {f"seed of {name}": str(seed) for name, seed in report.seeds.items()}
    files = {f"SHA-256 of {path}": digest for path, digest in report.files.items()}
    return {**facts, **seeds, **files, **report.versions}
