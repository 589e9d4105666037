"""Heat maps, bars and curves: layer costs, couplings, fits and barriers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import coo_array, csr_array, sparray

from .._checked import checked
from ..errors import ArgumentError
from ..ir import Alignment, LayerFit
from ._shared import (
    ALIKE,
    CHOSEN,
    GREY,
    INK,
    LAYER,
    MUTED,
    UNLIKE,
    CostMatrix,
    cost_matrices,
    require_picture,
    save_figure,
    shades,
    split_prefix,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# --- layer costs ----------------------------------------------------------------------------------

_CELL, _LETTER = 0.27, 0.066  # widths in inches
_COSTS = (
    "cost of pairing two layers: 0 if they tell",
    "samples apart in the same way (1 - CKA,",
    "unless another cost was chosen); grey: of",
    "different kinds, which never pair",
)


@checked()
def draw_costs(alignment: Alignment, path: str | os.PathLike[str]) -> None:
    """Write heat maps of the measured layer costs, the chosen pairs joined by a path.

    Rows are the layers of the network with the most in a segment, columns those of another one.
    Layers of different kinds, which never pair, are left blank.

    Raises:
        ArgumentError: If no costs were measured, or the ending is of no known format.
    """
    from matplotlib.figure import Figure

    target = require_picture(path)
    matrices = cost_matrices(alignment)
    if not matrices:
        raise ArgumentError(
            "an alignment without measured costs",
            where="Alignment.draw_costs",
            expected="costs of at least one segment",
            do="take the alignment of fxfuse.align(models, data), which measures all of them",
        )
    # of one layer on each side, the picture of the alignment shows the cost as well
    matrices = [m for m in matrices if len(m.rows) > 1] or matrices
    left = 0.5 + _LETTER * max(len(name) for m in matrices for name in m.rows)
    inner = _CELL * max(len(m.columns) for m in matrices)
    above = [0.62 + _LETTER * max(map(len, m.columns)) for m in matrices]
    heights = [_CELL * len(m.rows) + top + 0.25 for m, top in zip(matrices, above)]
    titles = [m.title.replace(": ", "\n", 1) for m in matrices]
    longest = max(len(line) for text in [*titles, *_COSTS] for line in text.split("\n"))
    width, height = max(left + inner + 1.1, 0.4 + 0.074 * longest), sum(heights) + 2.4 * _CELL
    figure, y = Figure(figsize=(width, height)), height - 2.4 * _CELL
    figure.text(0.15 / width, y / height, "\n".join(_COSTS), size=8, color=MUTED)
    finite = [c for m in matrices for row in m.costs for c in row if abs(c) != float("inf")]
    scale = min([0.0, *finite]), max([1e-12, *finite])
    for matrix, title, needed in zip(matrices, titles, heights):
        y -= needed
        size = _CELL * len(matrix.columns) / width, _CELL * len(matrix.rows) / height
        _draw_matrix(figure.add_axes((left / width, (y + 0.25) / height, *size)), matrix, scale)
        place = 0.15 / width, (y + needed - 0.25) / height
        figure.text(*place, title, size=8, weight="bold", va="center", parse_math=False)
    save_figure(figure, target)


def _draw_matrix(axes: Axes, matrix: CostMatrix, scale: tuple[float, float]) -> None:
    """Draw the costs of one segment, in the colours that all of the picture share."""
    costs = np.ma.masked_invalid(np.array(matrix.costs, dtype=float))
    axes.set_facecolor("#e4e4e0")
    low, high = scale
    colours: Any = {"cmap": _ramp(), "vmin": low, "vmax": high}
    image = axes.imshow(costs, aspect="auto", interpolation="nearest", **colours)
    path: Any = {"color": CHOSEN, "marker": "o", "markersize": 5, "linewidth": 1.4}
    axes.plot(range(len(matrix.columns)), matrix.chosen, markerfacecolor="white", **path)
    names: Any = {"size": 7, "parse_math": False}
    axes.set_xticks(range(len(matrix.columns)), matrix.columns, rotation=90, **names)
    axes.set_yticks(range(len(matrix.rows)), matrix.rows, **names)
    axes.xaxis.tick_top()
    axes.tick_params(length=2)
    if costs.count() > 2 and len(matrix.rows) > 2:
        cell = 1 / max(len(matrix.columns), 3)
        legend = axes.inset_axes((1.0 + 0.3 * cell, 0, 0.2 * cell, 1))
        axes.figure.colorbar(image, cax=legend, format="%.3g")
        legend.tick_params(labelsize=7, length=2)


def _ramp() -> Any:
    """Return the colours of a cost, from alike to unlike, as in the picture of an alignment."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("cost", [shades(i / 8)[0] for i in range(9)])


# --- couplings ------------------------------------------------------------------------------------


def near_diagonal(matrix: csr_array) -> np.ndarray:
    """Return an order of the rows that brings a matrix near its diagonal.

    Rows are sorted by the column of their largest entry, then by the mean of their columns.
    """
    rows, columns = matrix.shape
    sums = np.asarray(matrix.sum(1)).ravel()
    means = np.full(rows, np.inf)
    np.divide(matrix @ np.arange(columns), sums, out=means, where=sums > 0)
    largest = np.full(rows, columns)
    filled = np.diff(csr_array(matrix).indptr) > 0
    if columns:
        largest[filled] = np.asarray(matrix.argmax(axis=1)).ravel()[filled]
    return np.lexsort((means, largest))


@checked()
def draw_coupling(matrix: sparray, path: str | os.PathLike[str], title: str = "") -> None:
    """Write heat maps of what units give to fused units, before and after ordering the rows.

    Args:
        matrix: `(fused units, units)`.
        path: A file ending in .png, .svg or .pdf.
        title: Title of the picture, such as the space and the network.

    Raises:
        ArgumentError: If the ending is of no known format.
    """
    from matplotlib.figure import Figure

    target, matrix = require_picture(path), csr_array(matrix)
    figure = Figure(figsize=(10.5, 5.2), layout="constrained")
    ordered = csr_array(matrix[near_diagonal(matrix)])
    maps = {"fused units as they are": matrix, "fused units sorted by their partners": ordered}
    for axes, (name, shown) in zip(figure.subplots(1, 2), maps.items()):
        artist = _coupling_panel(axes, shown)
        axes.set_title(name, size=10)
        axes.set_xlabel("units of the network", size=9)
        axes.set_ylabel("units of the fused network", size=9)
        axes.tick_params(labelsize=8)
    label = "share of the fused unit that it gives"
    figure.colorbar(artist, ax=figure.axes, label=label, shrink=0.8)
    figure.suptitle(title, size=11, parse_math=False)
    save_figure(figure, target)


def _coupling_panel(axes: Axes, matrix: csr_array) -> Any:
    """Draw few entries as dots, which no resolution swallows, and many as an image."""
    rows, columns = matrix.shape
    few = matrix.nnz <= 4 * (rows + columns) and rows * columns > 48 * 48
    largest = max(float(matrix.max()), 1e-12)
    style: Any = {"cmap": _blues(), "vmin": 0.0, "vmax": largest}
    if not few:
        dense = np.ma.masked_equal(matrix.toarray(), 0.0)  # nothing is white, as between dots
        return axes.imshow(dense, aspect="auto", interpolation="auto", **style)
    entries = coo_array(matrix)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    size = float(np.clip((220 / max(rows, columns, 1)) ** 2, 1.5, 60))
    style |= {"s": size, "marker": "s", "linewidths": 0}
    return axes.scatter(entries.col, entries.row, c=entries.data, **style)


def _blues() -> Any:
    """Return the colours of a share; the palest is no white."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", [LAYER, ALIKE, INK])


# --- fits and barriers ----------------------------------------------------------------------------


@checked()
def draw_fits(layers: Sequence[LayerFit], path: str | os.PathLike[str], poor: float = 0.5) -> None:
    """Write a bar chart of how much of its target each refitted layer explains (R squared).

    Args:
        layers: The refitted layers.
        path: A file ending in .png, .svg or .pdf.
        poor: Bars that are shorter have the colour of what is unlike.

    Raises:
        ArgumentError: If nothing was refitted, or the ending is of no known format.
    """
    from matplotlib.figure import Figure

    target = require_picture(path)
    if not layers:
        raise ArgumentError(
            "a fusion without refitted layers",
            where="draw_fits",
            expected="a fusion with least squares, as the default is",
            do="fuse with Method(refit=LeastSquares())",
        )
    names = split_prefix([layer.node for layer in layers])[1]
    values = np.array([layer.explained for layer in layers])
    bars = np.clip(values, -0.05, None)  # a fit can be arbitrarily bad
    figure = Figure(figsize=(8.0, 0.9 + 0.22 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    colours = [UNLIKE if value < poor else ALIKE for value in values]
    axes.barh(range(len(values)), bars, color=colours, height=0.72)
    for i, value in enumerate(values):
        axes.text(max(value, 0) + 0.01, i, f"{value:.2f}", va="center", size=7)
    axes.set_yticks(range(len(names)), names, size=7, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(min(0.0, float(bars.min())), 1.08)
    line = axes.axvline(poor, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_title("How much of its target each refitted layer explains", size=11, loc="left")
    beside: Any = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "frameon": False}
    axes.legend([line], [f"below {poor:g}: the report warns"], fontsize=8, **beside)
    axes.set_xlabel("R squared, on samples that the fit did not see: 1 is all", size=9)
    axes.tick_params(axis="x", labelsize=8)
    save_figure(figure, target)


@checked()
def draw_barrier(
    weights: Sequence[float],
    losses: Sequence[float],
    accuracies: Sequence[float],
    names: tuple[str, str],
    path: str | os.PathLike[str],
) -> None:
    """Write loss and accuracy along the weights, each with the straight line between its ends.

    Args:
        weights: Share of the second network in each fusion.
        losses: Mean loss of each fusion.
        accuracies: Accuracy of each fusion in percent.
        names: How the two networks are called.
        path: A file ending in .png, .svg or .pdf.

    Raises:
        ArgumentError: If the ending is of no known format.
    """
    from matplotlib.figure import Figure

    target = require_picture(path)
    figure = Figure(figsize=(9.0, 3.9), layout="constrained")
    curves = [("loss", losses, UNLIKE), ("accuracy, %", accuracies, ALIKE)]
    for axes, (name, values, colour) in zip(figure.subplots(1, 2), curves):
        axes.plot(weights, values, color=colour, marker="o", markersize=4)
        straight: Any = {"color": GREY, "linewidth": 0.9, "linestyle": "--"}
        axes.plot([weights[0], weights[-1]], [values[0], values[-1]], **straight)
        label = f"weight of {names[1]} (the rest: {names[0]})"
        axes.set_xlabel(label, size=9, parse_math=False)
        axes.set_ylabel(name, size=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    save_figure(figure, target)
