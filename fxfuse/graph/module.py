"""The graph module that all stages make: one whose constants stay out of the state.

Before version 2.14, torch forgets which buffers are not persistent when it makes or copies a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import reduce_graph_module


class Graph(fx.GraphModule):
    """A `GraphModule` whose buffers are persistent if they were so where it took them from."""

    def __init__(
        self, root: nn.Module | dict[str, Any], graph: fx.Graph, class_name: str = "GraphModule"
    ) -> None:
        super().__init__(root, graph, class_name)
        if isinstance(root, nn.Module):
            _hide_alike(root, self)

    def _deepcopy_init(self) -> Callable[..., None]:
        return Graph.__init__

    def __reduce__(self) -> tuple[Any, ...]:
        return unpickled, super().__reduce__()[1]


def unpickled(body: dict[str, Any], imports: str) -> fx.GraphModule:
    """Return a graph from what pickle has of it."""
    module = reduce_graph_module(body, imports)
    assert isinstance(module, fx.GraphModule)
    root = nn.Module()
    vars(root).update(body)
    _hide_alike(root, module)
    return module


def _hide_alike(root: nn.Module, module: fx.GraphModule) -> None:
    """Leave those buffers out of the state of a graph that were left out where they come from."""
    owners = dict(root.named_modules())
    for path, part in module.named_modules():
        hidden = owners[path]._non_persistent_buffers_set if path in owners else set()
        part._non_persistent_buffers_set |= hidden & part._buffers.keys()
