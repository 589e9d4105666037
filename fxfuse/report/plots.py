"""Heat maps, bars and curves: layer costs, couplings, fits and barriers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import coo_array, csr_array

from ..errors import ArgumentError
from ..ir import Alignment, LayerFit
from ._shared import (
    ALIKE,
    CHOSEN,
    GREY,
    UNLIKE,
    CostMatrix,
    cost_matrices,
    require_picture,
    save_figure,
    split_prefix,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# --- layer costs ----------------------------------------------------------------------------------

_CELL, _LETTER, _TITLE_LETTER = 0.27, 0.066, 0.095  # widths in inches
_COSTS = "cost of pairing two layers; grey: layers of different kinds, which never pair"


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
    above = [0.45 + _LETTER * max(map(len, m.columns)) for m in matrices]
    heights = [_CELL * len(m.rows) + top + 0.25 for m, top in zip(matrices, above)]
    longest = max(len(text) for text in [*(m.title for m in matrices), _COSTS])
    width, height = max(left + inner + 1.1, 0.4 + _TITLE_LETTER * longest), sum(heights) + _CELL
    figure, y = Figure(figsize=(width, height)), height - _CELL
    figure.text(0.15 / width, y / height, _COSTS, size=8, color="#57606a")
    for matrix, needed in zip(matrices, heights):
        y -= needed
        size = _CELL * len(matrix.columns) / width, _CELL * len(matrix.rows) / height
        _draw_matrix(figure.add_axes((left / width, (y + 0.25) / height, *size)), matrix)
        place = 0.15 / width, (y + needed - 0.25) / height
        figure.text(*place, matrix.title, size=9, weight="bold", parse_math=False)
    save_figure(figure, target)


def _draw_matrix(axes: Axes, matrix: CostMatrix) -> None:
    costs = np.ma.masked_invalid(np.array(matrix.costs, dtype=float))
    axes.set_facecolor("#e4e4e0")
    image = axes.imshow(costs, cmap="cividis_r", aspect="auto", interpolation="nearest")
    path: Any = {"color": CHOSEN, "marker": "o", "markersize": 5, "linewidth": 1.4}
    axes.plot(range(len(matrix.columns)), matrix.chosen, markerfacecolor="white", **path)
    names: Any = {"size": 7, "parse_math": False}
    axes.set_xticks(range(len(matrix.columns)), matrix.columns, rotation=90, **names)
    axes.set_yticks(range(len(matrix.rows)), matrix.rows, **names)
    axes.xaxis.tick_top()
    axes.tick_params(length=2)
    if costs.count() > 2 and len(matrix.rows) > 2:
        cell = 1 / max(len(matrix.columns), 3)
        scale = axes.inset_axes((1.0 + 0.3 * cell, 0, 0.2 * cell, 1))
        axes.figure.colorbar(image, cax=scale, format="%.3g")
        scale.tick_params(labelsize=7, length=2)


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


def draw_coupling(matrix: csr_array, path: str | os.PathLike[str], title: str = "") -> None:
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
    maps = {"in place": matrix, "fused units ordered": ordered}
    for axes, (name, shown) in zip(figure.subplots(1, 2), maps.items()):
        artist = _coupling_panel(axes, shown)
        axes.set_title(name, size=10)
        axes.set_xlabel("units of the network", size=9)
        axes.set_ylabel("units of the fused network", size=9)
        axes.tick_params(labelsize=8)
    figure.colorbar(artist, ax=figure.axes, label="share given", shrink=0.8)
    figure.suptitle(title, size=11, parse_math=False)
    save_figure(figure, target)


def _coupling_panel(axes: Axes, matrix: csr_array) -> Any:
    """Draw few entries as dots, which no resolution swallows, and many as an image."""
    rows, columns = matrix.shape
    few = matrix.nnz <= 4 * (rows + columns) and rows * columns > 48 * 48
    largest = max(float(matrix.max()), 1e-12)
    style: Any = {"cmap": "viridis_r", "vmin": 0.0, "vmax": largest}
    if not few:
        dense = np.ma.masked_equal(matrix.toarray(), 0.0)  # nothing is white, as between dots
        return axes.imshow(dense, aspect="auto", interpolation="auto", **style)
    entries = coo_array(matrix)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    size = float(np.clip((220 / max(rows, columns, 1)) ** 2, 1.5, 60))
    style |= {"s": size, "marker": "s", "linewidths": 0}
    return axes.scatter(entries.col, entries.row, c=entries.data, **style)


# --- fits and barriers ----------------------------------------------------------------------------


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
    axes.axvline(poor, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xlabel("R squared of its target, on samples that the fit did not see", size=9)
    axes.tick_params(axis="x", labelsize=8)
    save_figure(figure, target)


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
