"""Find the unit spaces of a network, and move their units."""

from __future__ import annotations

import numpy as np
from torch import fx, nn

from .._checked import checked
from ..graph.calls import Example, ToCall
from ..graph.inputs import Inputs
from ..graph.state import device_of
from ..graph.trace import as_given, run_once, trace_sharing, without_autocast
from ..graph.wrappers import unwrapped
from ..ir import Spaces
from ._moves import draw_orders
from ._moves import rearrange as rearrange
from .network import analyse


@checked()
@without_autocast()
def find_spaces(module: nn.Module, example: Example, *, inputs: ToCall | None = None) -> Spaces:
    """Find the unit spaces of any traceable module.

    Args:
        module: The network; not modified.
        example: One batch as the network takes it: a tensor `(N, ...)`, a tuple of arguments, or a
            mapping from their names.
        inputs: From the example to args, kwargs of forward, where it is no batch as usual.

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
    return _analyse(module, example, inputs)[1]


@checked()
@without_autocast()
def permute(
    module: nn.Module, example: Example, seed: int = 0, *, inputs: ToCall | None = None
) -> fx.GraphModule:
    """Return a network of the same function with every space randomly permuted.

    Args:
        module: The network; not modified.
        example: One batch as the network takes it.
        seed: Of the permutations.
        inputs: As for `find_spaces`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(3, 4)
        >>> bool(torch.allclose(permute(net, x)(x), net(x), atol=1e-6))
        True
    """
    graph, spaces = _analyse(module, example, inputs)
    order = draw_orders(spaces, np.random.default_rng(abs(seed)))
    return as_given(module, rearrange(graph, spaces, order))


def _analyse(
    module: nn.Module, example: Example, to_call: ToCall | None
) -> tuple[fx.GraphModule, Spaces]:
    given = Inputs.of(unwrapped(module), example, to_call)
    graph = trace_sharing(module, given)
    tensors = given.on(device_of(graph))
    try:
        return graph, analyse(graph, tensors)[1]
    except Exception:  # a plain run says what is wrong with the batch, or cuts what refuses it
        run_once(graph, tensors, "the model")
        return graph, analyse(graph, tensors)[1]
