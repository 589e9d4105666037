"""The inputs and outputs of a contraction as matrices, a row for each position.

A row is a position: a sample and a place in it, such as a pixel or a token. A convolution reads the
patch under its kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .affine import Affine


def output_rows(y: Tensor, axis: int, at: Tensor | None = None) -> Tensor:
    """Return values `(positions, units)`; at some positions, a copy of them.

    Args:
        y: The values: units along `axis`, samples and places along the others, in order.
        axis: The axis of the units.
        at: Positions; all if not given.
    """
    moved = y.movedim(axis, -1) if y.dim() > 1 else y[None]  # of parameters alone: one position
    if at is None:
        return moved.reshape(-1, moved.shape[-1])
    rows: Tensor = moved[torch.unravel_index(at.to(y.device), moved.shape[:-1])]
    return rows


def input_rows(x: Tensor, affine: Affine, at: Tensor | None = None) -> Tensor:
    """Return what a map reads at some positions, `(groups, positions, kernel * in / groups)`.

    Args:
        x: All that it reads.
        affine: The map; only its geometry counts.
        at: Positions of its output; all if not given.
    """
    if not affine.kernel:
        return output_rows(x, -1, at)[None]
    x = F.pad(x, [p for p in reversed(affine.padding) for _ in range(2)])
    sizes = x.shape[2:]
    geometry = zip(sizes, affine.kernel, affine.stride, affine.dilation)
    places = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in geometry]
    if at is None:
        at = torch.arange(len(x) * math.prod(places))
    corner, *offsets = torch.unravel_index(at.to(x.device), (len(x), *places))
    for size, offset, stride in zip(sizes, offsets, affine.stride):
        corner = corner * size + offset * stride  # number of the first pixel under the kernel
    taps = torch.zeros(1, dtype=torch.long, device=x.device)
    for size, k, d in zip(sizes, affine.kernel, affine.dilation):
        taps = (taps[:, None] * size + torch.arange(k, device=x.device) * d).flatten()
    pixels = x.movedim(1, -1).reshape(-1, x.shape[1])  # channels side by side
    read = pixels.index_select(0, (corner[:, None] + taps).flatten())
    grouped = read.view(len(corner), len(taps), affine.groups, x.shape[1] // affine.groups)
    rows: Tensor = grouped.permute(2, 0, 1, 3).flatten(2)
    return rows


def weight_as_rows(weight: Tensor, affine: Affine) -> Tensor:
    """Return a weight as `(groups, kernel * in / groups, out / groups)`, as `input_rows` are."""
    rows: Tensor = weight.movedim(1, -1).unflatten(0, (affine.groups, -1)).flatten(2).mT
    return rows


def rows_as_weight(rows: Tensor, kernel: Sequence[int]) -> Tensor:
    """Return `(out, in / groups, *kernel)` from what `weight_as_rows` returns."""
    weight: Tensor = rows.mT.flatten(0, 1).unflatten(1, (*kernel, -1)).movedim(-1, 1)
    return weight


def in_groups(rows: Tensor, groups: int) -> Tensor:
    """Return rows `(positions, units)` as `(groups, positions, units / groups)`."""
    grouped: Tensor = rows.unflatten(1, (groups, -1)).transpose(0, 1)
    return grouped
