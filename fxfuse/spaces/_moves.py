"""Moving the units of a network: each place takes the content of another of its space."""

from __future__ import annotations

import copy
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor, fx

from ..graph.state import tensors_of
from ..graph.trace import copy_modes
from ..ir import Axis, Space, Spaces


def draw_orders(
    spaces: Spaces, rng: np.random.Generator, names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """Draw an order of the units of each space.

    Args:
        spaces: Spaces, blocks before the spaces inside them.
        rng: Source of the orders.
        names: Spaces whose units change places; those of others only go with their blocks. All, if
            not given.
    """
    order: dict[str, np.ndarray] = {}
    for space in spaces:
        drawn = names is None or space.name in names
        order[space.name] = _shuffle(space, order, rng if drawn else None)
    return order


def rearrange(
    module: fx.GraphModule, spaces: Spaces, order: dict[str, np.ndarray]
) -> fx.GraphModule:
    """Move units: the place of unit `u` of space `s` takes the content of unit `order[s][u]`."""
    moved = copy_modes(module, copy.deepcopy(module))
    for name, tensor in tensors_of(moved).items():
        values, axes = tensor.detach(), [axis for _, axis in spaces.on(name)]
        sources = {
            dim: sources_along(spaces.sizes[name, dim], spaces.places[name, dim], order)
            for dim in {axis.dim for axis in axes}
        }
        groups = max((axis.groups for axis in axes), default=1)
        if groups > 1:
            values = _gather_grouped(values, sources, groups)
        else:
            for dim, source in sources.items():
                values = values.index_select(dim, source.to(values.device))
        tensor.data.copy_(values)
    return moved


def sources_along(
    size: int, along: list[tuple[Space, Axis]], order: dict[str, np.ndarray]
) -> Tensor:
    """Return, for each position along an axis, the position whose content it takes."""
    source = np.arange(size)
    for space, axis in along:
        source[axis.index] = axis.index[order[space.name]]
    return torch.from_numpy(source)


def _gather_grouped(weight: Tensor, sources: dict[int, Tensor], groups: int) -> Tensor:
    """Move the rows of a grouped weight, and the inputs within the group each row came from."""
    rows, inner = weight.shape[0], weight.shape[1]
    out = sources.get(0, torch.arange(rows))
    dense = sources.get(1, torch.arange(inner * groups)).view(groups, inner)
    group = torch.arange(rows) // (rows // groups)
    position = dense[group] - (out // (rows // groups))[:, None] * inner
    position = position.view(rows, inner, *[1] * (weight.dim() - 2)).expand_as(weight)
    return weight[out.to(weight.device)].gather(1, position.to(weight.device))


def _shuffle(
    space: Space, order: dict[str, np.ndarray], rng: np.random.Generator | None
) -> np.ndarray:
    """Draw an order of a space's units, given the order of the blocks that they travel with."""
    moved = order.get(space.parent) if space.parent else None
    blocks = np.zeros(space.size, dtype=int) if space.blocks is None else space.blocks
    source = np.empty(space.size, dtype=int)
    for block in np.unique(blocks):
        units = np.flatnonzero(blocks == block)
        taken = np.flatnonzero(blocks == (block if moved is None else moved[block]))
        source[units] = taken if rng is None else rng.permutation(taken)
    return source
