"""Find the unit spaces of a network, and move their units."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..graph.names import with_given_names
from ..graph.state import tensors_of
from ..graph.trace import (
    Example,
    as_example,
    copy_modes,
    device_of,
    run_once,
    trace_sharing,
    without_autocast,
)
from ..ir import Axis, Space, Spaces
from ._solve import spaces_of
from .network import label_network


@without_autocast()
def find_spaces(module: nn.Module, example: Example) -> Spaces:
    """Find the unit spaces of any traceable module.

    Args:
        module: The network; not modified.
        example: One batch as the network takes it, a tensor `(N, ...)` or a tuple of tensors.

    Returns:
        The spaces, and what is fixed with the reason for it.

    Raises:
        TraceError: If the module cannot be traced.
        DataError: If it refuses the example.

    Example:
        >>> net = torch.nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(space.name, space.size) for space in find_spaces(net, torch.zeros(1, 4))]
        [('0', 8)]
    """
    return _analyse(module, example)[1]


@without_autocast()
def permute(module: nn.Module, example: Example, seed: int = 0) -> fx.GraphModule:
    """Return a network of the same function with every space randomly permuted.

    Args:
        module: The network; not modified.
        example: One batch as the network takes it.
        seed: Of the permutations.

    Example:
        >>> net = torch.nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(3, 4)
        >>> bool(torch.allclose(permute(net, x)(x), net(x), atol=1e-6))
        True
    """
    graph, spaces = _analyse(module, example)
    rng = np.random.default_rng(seed)
    order: dict[str, np.ndarray] = {}
    for space in spaces:
        order[space.name] = _shuffle(space, order, rng)
    return with_given_names(rearrange(graph, spaces, order))


def _analyse(module: nn.Module, example: Example) -> tuple[fx.GraphModule, Spaces]:
    graph = trace_sharing(module)
    inputs = as_example(example, device_of(graph))
    try:
        ledger = label_network(graph, inputs)
    except Exception:  # a plain run says what is wrong with the batch, or cuts what refuses it
        run_once(graph, inputs, "the model")
        ledger = label_network(graph, inputs)
    return graph, spaces_of(ledger)


def rearrange(
    module: fx.GraphModule, spaces: Spaces, order: dict[str, np.ndarray]
) -> fx.GraphModule:
    """Move units: the place of unit `u` of space `s` takes the content of unit `order[s][u]`."""
    moved = copy_modes(module, copy.deepcopy(module))
    for name, tensor in tensors_of(moved).items():
        values, axes = tensor.detach(), [axis for _, axis in spaces.on(name)]
        sources = {
            dim: _sources(spaces.sizes[name, dim], spaces.places[name, dim], order)
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


def _sources(size: int, along: list[tuple[Space, Axis]], order: dict[str, np.ndarray]) -> Tensor:
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


def _shuffle(space: Space, order: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Draw an order of a space's units, given the order of the blocks that they travel with."""
    if space.blocks is None:
        return rng.permutation(space.size)
    source = np.empty(space.size, dtype=int)
    moved = order.get(space.parent) if space.parent else None
    for block in np.unique(space.blocks):
        units = np.flatnonzero(space.blocks == block)
        taken = np.flatnonzero(space.blocks == (block if moved is None else moved[block]))
        source[units] = rng.permutation(taken)
    return source
