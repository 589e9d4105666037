"""A contraction as rows: at which positions it is fitted, and what it reads and gives there.

Where positions are plentiful, a part of them says as much as all. They are drawn one from each of
as many equal stretches, so that all samples and places have their say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .composition import Affine
from .correction import HELD


@dataclass(frozen=True, eq=False)
class Sample:
    """Positions of a contraction, numbered sample by sample within each batch.

    Attributes:
        at: Batch by batch, first those to fit on.
        fit: Batch by batch, how many these are; the others are held out.
        thin: If there is to be one equation for each position, not for each input, every
            how-manieth has one; otherwise 0.
    """

    at: list[Tensor]
    fit: list[int]
    thin: int = 0

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Put rows `(..., rows, units)` of all batches behind each other, those to fit on first."""
        pairs = list(zip(parts, self.fit))
        return torch.cat([p[..., :n, :] for p, n in pairs] + [p[..., n:, :] for p, n in pairs], -2)


def sample(places: int, sizes: Sequence[int], wanted: int, thin: int = 0) -> Sample:
    """Draw positions; every fourth sample is held out.

    Args:
        places: Positions of one sample.
        sizes: Samples of each batch.
        wanted: How many positions, about.
        thin: See `Sample`.
    """
    generator, seen, at, fit = torch.Generator().manual_seed(0), 0, [], []
    share = min(wanted / max(places * sum(sizes), 1), 1.0)
    for size in sizes:
        count = round(places * size * share)
        shifts = torch.rand(count, generator=generator, dtype=torch.float64)
        stretch = places * size / max(count, 1)
        drawn = ((torch.arange(count) + shifts * (share < 1)) * stretch + 1e-9).long()
        drawn = drawn.clamp(max=places * size - 1)
        held = (seen + drawn // max(places, 1)) % HELD == HELD - 1
        at.append(torch.cat([drawn[~held], drawn[held]]))
        fit.append(int((~held).sum()))
        seen += size
    return Sample(at, fit, thin)


def rows_at(value: Tensor, axis: int, at: Tensor) -> Tensor:
    """Return a copy `(positions, units)` of what a value holds at some positions.

    Args:
        value: Units along `axis`, samples and places along the others.
        axis: Which.
        at: Positions, numbered as the other axes lie.
    """
    moved = value.movedim(axis, -1)
    found: Tensor = moved[torch.unravel_index(at.to(value.device), moved.shape[:-1])]
    return found


def reads_at(x: Tensor, affine: Affine, at: Tensor) -> Tensor:
    """Return what a map reads at some positions, `(groups, positions, kernel * in / groups)`.

    Args:
        x: What it reads, as a whole.
        affine: The map; of its weight only the shape counts.
        at: Positions of what it gives.
    """
    n, at = len(affine.kernel), at.to(x.device)
    if not n:
        return rows_at(x, -1, at)[None]
    x = F.pad(x, [p for p in reversed(affine.padding) for _ in range(2)])
    sizes = x.shape[2:]
    geometry = zip(sizes, affine.kernel, affine.stride, affine.dilation)
    places = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in geometry]
    sample, *corner = torch.unravel_index(at, (len(x), *places))
    for size, axis, stride in zip(sizes, corner, affine.stride):
        sample = sample * size + axis * stride
    taps = torch.zeros(1, dtype=torch.long, device=x.device)
    for size, k, d in zip(sizes, affine.kernel, affine.dilation):
        taps = (taps[:, None] * size + torch.arange(k, device=x.device) * d).flatten()
    flat = x.movedim(1, -1).reshape(-1, x.shape[1])  # a unit beside the other: copied at a stroke
    seen: Tensor = flat.index_select(0, (sample[:, None] + taps).flatten())
    seen = (
        seen.view(len(at), len(taps), affine.groups, affine.weight.shape[1])
        .permute(2, 0, 1, 3)
        .flatten(2)
    )
    return seen


def weight_as_rows(weight: Tensor, affine: Affine) -> Tensor:
    """Return a weight as `(groups, kernel * in / groups, out / groups)`, to go with `reads_at`."""
    found: Tensor = weight.movedim(1, -1).unflatten(0, (affine.groups, -1)).flatten(2).mT
    return found


def rows_as_weight(rows: Tensor, affine: Affine) -> Tensor:
    """Return `(out, in / groups, *kernel)` from what `weight_as_rows` returns."""
    shape = affine.weight.shape
    return rows.mT.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def units_as_rows(units: Tensor, groups: int) -> Tensor:
    """Return `(positions, units)` as `(groups, positions, units / groups)`."""
    found: Tensor = units.unflatten(1, (groups, -1)).transpose(0, 1)
    return found
