"""Find the unit spaces of a network, and move their units."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..graph.state import tensors_of
from ..graph.trace import (
    Example,
    as_example,
    copy_modes,
    device_of,
    plain_modes,
    run_once,
    trace_sharing,
)
from ..ir import Axis, Space, Spaces
from ._solve import spaces_of
from .network import label_network


@plain_modes()
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


@plain_modes()
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
    return rearrange(graph, spaces, order)


def _analyse(module: nn.Module, example: Example) -> tuple[fx.GraphModule, Spaces]:
    graph = trace_sharing(module)
    inputs = as_example(example, device_of(graph))
    try:
        book = label_network(graph, inputs)
    except Exception:  # a plain run says what is wrong with the batch, or cuts off what refuses it
        run_once(graph, inputs, "the model")
        book = label_network(graph, inputs)
    return graph, spaces_of(book)


def rearrange(
    module: fx.GraphModule, spaces: Spaces, order: dict[str, np.ndarray]
) -> fx.GraphModule:
    """Move units: the place of unit `u` of space `s` takes the content of unit `order[s][u]`."""
    moved = copy_modes(module, copy.deepcopy(module))
    for name, tensor in tensors_of(moved).items():
        dense = tensor.detach()
        axes = spaces.on(name)
        by_dim: dict[int, list[tuple[Space, Axis]]] = {}
        for space, axis in axes:
            by_dim.setdefault(axis.dim, []).append((space, axis))
        sources = {d: _sources(spaces.sizes[name, d], found, order) for d, found in by_dim.items()}
        groups = next((a.groups for _, a in axes if a.groups > 1), 1)
        if groups > 1:
            dense = _gather_grouped(dense, sources, groups)
        else:
            for d, source in sources.items():
                dense = dense.index_select(d, source.to(dense.device))
        tensor.data.copy_(dense)
    return moved


def _sources(size: int, found: list[tuple[Space, Axis]], order: dict[str, np.ndarray]) -> Tensor:
    source = np.arange(size)
    for space, axis in found:
        source[axis.index] = axis.index[order[space.name]]
    return torch.from_numpy(source)


def _gather_grouped(weight: Tensor, sources: dict[int, Tensor], groups: int) -> Tensor:
    """Gather rows and, within each row, the inputs of the group that the row came from."""
    rows, inner = weight.shape[0], weight.shape[1]
    out = sources.get(0, torch.arange(rows))
    dense = sources.get(1, torch.arange(inner * groups)).view(groups, inner)
    group = torch.arange(rows) // (rows // groups)
    position = dense[group] - (out // (rows // groups))[:, None] * inner
    position = position.view(rows, inner, *[1] * (weight.dim() - 2)).expand_as(weight)
    return weight[out.to(weight.device)].gather(1, position.to(weight.device))


def _shuffle(space: Space, order: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    if space.blocks is None:
        return rng.permutation(space.size)
    source = np.empty(space.size, dtype=int)
    moved = order.get(space.parent) if space.parent else None
    for block in np.unique(space.blocks):
        here = np.flatnonzero(space.blocks == block)
        there = np.flatnonzero(space.blocks == (block if moved is None else moved[block]))
        source[here] = rng.permutation(there)
    return source
