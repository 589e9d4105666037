"""Heat maps and curves: layer costs with the chosen path, couplings, fits, barriers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import coo_array, csr_array

from ..errors import ArgumentError
from ..ir import Alignment, LayerFit, SegmentAlignment
from ._shared import require_picture, save_figure
from .alignment_picture import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_CELL, _LETTER = 0.27, 0.066  # inches of a cell of a heat map, of a letter of its labels


_TITLE = 0.095  # of a letter of its title


_COSTS = "cost of pairing two layers; grey: layers of different kinds, which never pair"


_ALIKE, _UNLIKE = "#2668ac", "#c85c20"


# --- layer costs ----------------------------------------------------------------------------------


def draw_costs(alignment: Alignment, path: str | os.PathLike[str]) -> None:
    """Write heat maps of the measured layer costs, the chosen pairs joined by a path.

    Rows are the layers of the network with the most in a segment, columns those of another one.
    Pairs of different kinds, which never match, are left blank.

    Raises:
        ArgumentError: If no costs were measured, or the ending is of no known format.
    """
    from matplotlib.figure import Figure

    target = require_picture(path)
    panels = _panels(alignment)
    if not panels:
        raise ArgumentError(
            "an alignment without measured costs",
            where="Alignment.draw_costs",
            expected="costs of at least one segment",
            do="take the alignment of fxfuse.align(models, data), which measures all of them",
        )
    labels = [_labels(s, k) for _, s, k in panels]
    left = 0.5 + _LETTER * max(len(x) for rows, _ in labels for x in rows)
    above = [0.45 + _LETTER * max(len(x) for x in columns) for _, columns in labels]
    inner = _CELL * max(len(columns) for _, columns in labels)
    heights = [_CELL * len(rows) + top + 0.25 for (rows, _), top in zip(labels, above)]
    titles = [
        f"{at + 1}. {s.label}: {alignment.names[s.reference]} (rows), {alignment.names[k]}"
        for at, s, k in panels
    ]
    longest = max(len(text) for text in [*titles, _COSTS])
    width, height = max(left + inner + 1.1, 0.4 + _TITLE * longest), sum(heights) + _CELL
    figure, y = Figure(figsize=(width, height)), height - _CELL
    figure.text(0.15 / width, y / height, _COSTS, size=8, color="#57606a")
    parts = zip(panels, labels, titles, heights)
    for (_, segment, k), (rows, columns), title, needed in parts:
        y -= needed
        box = _CELL * len(columns) / width, _CELL * len(rows) / height
        axes = figure.add_axes((left / width, (y + 0.25) / height, *box))
        _cost_panel(axes, segment, k, rows, columns)
        top = (y + needed - 0.25) / height
        figure.text(0.15 / width, top, title, size=9, weight="bold", parse_math=False)
    save_figure(figure, target)


def _panels(alignment: Alignment) -> list[tuple[int, SegmentAlignment, int]]:
    """Return the segments and networks that were measured; single pairs only if there is no more.

    Where there is one layer on each side, the alignment shows the cost as well.
    """
    found = [
        (at, segment, k)
        for at, segment in enumerate(alignment.segments)
        for k, matrix in enumerate(segment.costs)
        if matrix is not None and k != segment.reference
    ]
    return [(at, s, k) for at, s, k in found if len(s.slots[0]) > 1] or found


def _labels(segment: SegmentAlignment, k: int) -> tuple[list[str], list[str]]:
    rows = shortened(segment.slots[segment.reference])[1]
    columns = shortened([n for n in segment.slots[k] if n is not None])[1]
    return rows, columns


def _cost_panel(
    axes: Axes, segment: SegmentAlignment, k: int, rows: Sequence[str], columns: Sequence[str]
) -> None:
    costs = np.ma.masked_invalid(np.array(segment.costs[k], dtype=float))
    axes.set_facecolor("#e4e4e0")
    image = axes.imshow(costs, cmap="cividis_r", aspect="auto", interpolation="nearest")
    path = [i for i, name in enumerate(segment.slots[k]) if name is not None]
    style: Any = {"color": "#c8281e", "marker": "o", "markersize": 5, "linewidth": 1.4}
    axes.plot(range(len(path)), path, markerfacecolor="white", **style)
    axes.set_xticks(range(len(columns)), columns, size=7, rotation=90, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, size=7, parse_math=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=2)
    if costs.count() > 2 and len(rows) > 2:
        bar = axes.inset_axes((1.0 + 0.3 / max(len(columns), 3), 0, 0.2 / max(len(columns), 3), 1))
        shown = axes.figure.colorbar(image, cax=bar, format="%.3g")
        shown.ax.tick_params(labelsize=7, length=2)


# --- couplings ------------------------------------------------------------------------------------


def near_diagonal(matrix: csr_array) -> np.ndarray:
    """Return an order of the rows that brings a matrix near its diagonal.

    Rows are sorted by the column of their largest entry, then by the mean of their columns.
    """
    dense_rows, columns = matrix.shape
    total = np.asarray(matrix.sum(1)).ravel()
    centre = np.divide(
        matrix @ np.arange(columns), total, out=np.full(dense_rows, np.inf), where=total > 0
    )
    largest = np.full(dense_rows, columns)
    filled = np.diff(csr_array(matrix).indptr) > 0
    if columns:
        largest[filled] = np.asarray(matrix.argmax(axis=1)).ravel()[filled]
    return np.lexsort((centre, largest))


def draw_coupling(matrix: csr_array, path: str | os.PathLike[str], title: str = "") -> None:
    """Write heat maps of what units give to fused units, before and after ordering the rows.

    Args:
        matrix: `(fused units, units)`.
        path: A file ending in .png, .svg or .pdf.
        title: What it is of.

    Raises:
        ArgumentError: If the ending is of no known format.
    """
    from matplotlib.figure import Figure

    target, matrix = require_picture(path), csr_array(matrix)
    figure = Figure(figsize=(10.5, 5.2), layout="constrained")
    order = near_diagonal(matrix)
    pictures = {"in place": matrix, "fused units ordered": csr_array(matrix[order])}
    for axes, (name, shown) in zip(figure.subplots(1, 2), pictures.items()):
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
        shown = np.ma.masked_equal(matrix.toarray(), 0.0)  # nothing is white, as between dots
        return axes.imshow(shown, aspect="auto", interpolation="auto", **style)
    entries = coo_array(matrix)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    size = float(np.clip((220 / max(rows, columns, 1)) ** 2, 1.5, 60))
    return axes.scatter(
        entries.col, entries.row, c=entries.data, s=size, marker="s", linewidths=0, **style
    )


# --- fits and barriers ----------------------------------------------------------------------------


def draw_fits(layers: Sequence[LayerFit], path: str | os.PathLike[str], poor: float = 0.5) -> None:
    """Write a bar chart of how much of its target each refitted layer explains (R squared).

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
    names = shortened([layer.node for layer in layers])[1]
    values = np.array([layer.explained for layer in layers])
    figure = Figure(figsize=(8.0, 0.9 + 0.22 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    colours = [_UNLIKE if v < poor else _ALIKE for v in values]
    axes.barh(range(len(values)), np.clip(values, -0.05, None), color=colours, height=0.72)
    for i, value in enumerate(values):
        axes.text(max(value, 0) + 0.01, i, f"{value:.2f}", va="center", size=7)
    axes.set_yticks(range(len(names)), names, size=7, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(min(0.0, float(np.clip(values.min(), -0.05, 0))), 1.08)
    axes.axvline(poor, color="#8b949d", linewidth=0.8, linestyle="--")
    axes.set_xlabel("R squared of its target, on samples that the fit did not see", size=9)
    axes.tick_params(axis="x", labelsize=8)
    save_figure(figure, target)
