"""Find the unit spaces of a network, and move their units."""

from __future__ import annotations

import numpy as np
from torch import fx, nn

from .._checked import checked
from ..graph.inputs import Example, Inputs
from ..graph.trace import (
    as_given,
    device_of,
    run_once,
    trace_sharing,
    without_autocast,
)
from ..graph.wrappers import unwrapped
from ..ir import Spaces
from ._moves import draw_orders
from ._moves import rearrange as rearrange
from .network import analyse


@checked()
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
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(space.name, space.size) for space in find_spaces(net, torch.zeros(1, 4))]
        [('0', 8)]
    """
    return _analyse(module, example)[1]


@checked()
@without_autocast()
def permute(module: nn.Module, example: Example, seed: int = 0) -> fx.GraphModule:
    """Return a network of the same function with every space randomly permuted.

    Args:
        module: The network; not modified.
        example: One batch as the network takes it.
        seed: Of the permutations.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(3, 4)
        >>> bool(torch.allclose(permute(net, x)(x), net(x), atol=1e-6))
        True
    """
    graph, spaces = _analyse(module, example)
    order = draw_orders(spaces, np.random.default_rng(abs(seed)))
    return as_given(module, rearrange(graph, spaces, order))


def _analyse(module: nn.Module, example: Example) -> tuple[fx.GraphModule, Spaces]:
    graph = trace_sharing(module, example)
    inputs = Inputs.of(unwrapped(module), example).on(device_of(graph))
    try:
        return graph, analyse(graph, inputs)[1]
    except Exception:  # a plain run says what is wrong with the batch, or cuts what refuses it
        run_once(graph, inputs, "the model")
        return graph, analyse(graph, inputs)[1]
