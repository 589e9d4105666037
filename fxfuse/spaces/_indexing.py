"""Rules of operators that read or write at places given by numbers: scatter, sampling, bags.

The numbers may come from an input. Units beside the axes that they point along stay free; units
along these axes are fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._along import across
from ._labels import LabelRun, Labels
from ._rules import Op

LETTERS = "abcdefghijklmnop"


def written_along(run: LabelRun, op: Op) -> Labels:
    """Values are added to, or put in the place of, rows that lie along an axis.

    The rows' numbers are a vector, or differ from place to place: then they meet the values.
    """
    tensor, dim = op["self"], op["dim"] % max(op["self"].dim(), 1)
    names = LETTERS[: tensor.dim()]
    operands, rows = [(tensor, names)], names[dim : dim + 1]
    index, source = op["index"], op["source"] if op["source"] is not None else op["src"]
    for other in (index, source, op["value"]):
        if isinstance(other, Tensor) and other.dim() == tensor.dim():
            sizes = zip(names, tensor.shape, other.shape)
            rows += "".join(c for c, n, m in sizes if n != m and c not in rows)
            operands.append((other, names))
        elif isinstance(other, Tensor):  # the numbers of whole rows, or one value for all
            operands.append((other, "z" * other.dim()))
    return across(run, operands, names, rows + "z")


def part_written(run: LabelRun, op: Op) -> Labels:
    """A tensor takes the place of a slice of another."""
    tensor, names = op["self"], LETTERS[: op["self"].dim()]
    rows = names[(op["dim"] or 0) % tensor.dim()]
    of_part = names if op["src"].dim() == tensor.dim() else names.replace(rows, "")
    return across(run, [(tensor, names), (op["src"], of_part)], names, rows)


def index_put(run: LabelRun, op: Op) -> Labels:
    """Values are written at numbered places, or where a mask says so.

    One value, or one row of values, that is written wherever a mask says so treats all places of
    the mask alike.
    """
    tensor, values = op["self"], op["values"]
    names, at, operands, picked, shared = LETTERS[: tensor.dim()], 0, [], [], 0
    for index in op["indices"]:
        mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        count = index.dim() if mask else 1
        if index is not None:
            operands.append((index, names[at : at + count] if mask else "z" * index.dim()))
            picked.append(range(at, at + count))
            shared = max(shared, 1 if mask else index.dim())
        at += count
    axes = [d for part in picked for d in part]
    together = axes == list(range(axes[0], axes[-1] + 1)) and _adjacent(op["indices"])
    rest = [c for d, c in enumerate(names) if d not in axes]
    before = axes[0] if together else 0
    of_values = [*rest[:before], *"z" * shared, *rest[before:]][-values.dim() or len(names) + 9 :]
    masks_only = all(
        len(set(letters)) == len(letters) and "z" not in letters for _, letters in operands
    )
    alike = all(n == 1 for c, n in zip(of_values, values.shape) if c == "z")
    places = "z" if masks_only and alike else "z" + "".join(names[d] for d in axes)
    operands = [(tensor, names), *operands, (values, "".join(of_values))]
    return across(run, operands, names, places)


def _adjacent(indices: list[Tensor | None]) -> bool:
    """Tell whether no axis that is taken whole lies between axes that are picked from."""
    given = [i for i, index in enumerate(indices) if index is not None]
    return given == list(range(given[0], given[-1] + 1))


def embedding_bag(run: LabelRun, op: Op) -> list[Labels]:
    """Sums of rows that are picked by number; each unit of a row is treated alike."""
    operands = [(op["weight"], "vd")]
    if op["per_sample_weights"] is not None:
        operands.append((op["per_sample_weights"], "i"))
    labels = across(run, operands, "bd", "vi")
    return [labels if out.shape == op.out[0].shape else Labels() for out in op.out]


def grid_sampler(run: LabelRun, op: Op) -> Labels:
    """Each channel is sampled at places that a grid says, the same for all channels."""
    places, sampled = "xyz"[: op["input"].dim() - 2], "uvw"[: op["input"].dim() - 2]
    operands = [(op["input"], "nc" + places), (op["grid"], "n" + sampled + "g")]
    return across(run, operands, "nc" + sampled, places + "g")


def unpool(run: LabelRun, op: Op) -> Labels:
    """Values go back to where pooling took them from, each channel its own way."""
    count = len(op["output_size"])
    lead, places = LETTERS[: op["self"].dim() - count], "xyz"[:count]
    operands = [(op["self"], lead + places), (op["indices"], lead + places)]
    return across(run, operands, lead + places, places)


def buckets(run: LabelRun, op: Op) -> Labels:
    """Each value is replaced by the number of its bucket."""
    names = LETTERS[: op.out.dim()]
    operands = [(op["self"], names)] if isinstance(op["self"], Tensor) else []
    return across(run, [*operands, (op["boundaries"], "z")], names, "z")
