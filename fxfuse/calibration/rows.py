"""What a contraction reads and gives, as rows.

A row is a position: a sample and a place in it, such as a pixel or a token. A convolution reads the
patch under its kernel. Where there are more positions than needed, some are drawn, one from each of
as many equal stretches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .affine import Affine

HELD_OUT = 4  # every fourth sample is held out of fits, to choose the ridge


@dataclass(frozen=True, eq=False)
class Positions:
    """Positions that were drawn, numbered within each batch: sample by sample, place by place.

    Attributes:
        at: The positions of each batch: first those to fit to, then those held out.
        fit: How many of each batch are to fit to.
        dual_every: How the fit is to be solved, see `least_squares.Regression`.
    """

    at: list[Tensor]
    fit: list[int]
    dual_every: int = 0

    def keep(self, batch: int, which: Tensor | None) -> None:
        """Leave out, in place, the positions of a batch that do not count.

        Args:
            batch: Which batch.
            which: Whether each of its positions counts; None if all do.
        """
        if which is not None:
            kept = which.to(self.at[batch].device)[self.at[batch]]
            self.at[batch], fit = self.at[batch][kept], kept[: self.fit[batch]]
            self.fit[batch] = int(fit.sum())

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Join the rows `(..., rows, units)` of all batches: first those to fit to."""
        pairs = list(zip(parts, self.fit))
        return torch.cat([p[..., :n, :] for p, n in pairs] + [p[..., n:, :] for p, n in pairs], -2)


def draw_positions(places: int, sizes: Sequence[int], count: int, dual_every: int = 0) -> Positions:
    """Draw positions evenly; those of every fourth sample are held out.

    Args:
        places: Number of places in one sample.
        sizes: Number of samples of each batch.
        count: Number of positions to draw, up to rounding; all if there are no more.
        dual_every: See `Positions`.
    """
    generator, seen, at, fit = torch.Generator().manual_seed(0), 0, [], []
    share = min(count / max(places * sum(sizes), 1), 1.0)
    for size in sizes:
        of_batch = round(places * size * share)
        shifts = torch.rand(of_batch, generator=generator, dtype=torch.float64)
        stretch = places * size / max(of_batch, 1)
        drawn = ((torch.arange(of_batch) + shifts * (share < 1)) * stretch + 1e-9).long()
        drawn = drawn.clamp(max=places * size - 1)
        held = (seen + drawn // max(places, 1)) % HELD_OUT == HELD_OUT - 1
        at.append(torch.cat([drawn[~held], drawn[held]]))
        fit.append(int((~held).sum()))
        seen += size
    return Positions(at, fit, dual_every)


def output_rows(y: Tensor, axis: int, at: Tensor | None = None) -> Tensor:
    """Return values `(positions, units)`; at some positions, a copy of them.

    Args:
        y: The values: units along `axis`, samples and places along the others, in order.
        axis: The axis of the units.
        at: Positions; all if not given.
    """
    moved = y.movedim(axis, -1)
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
