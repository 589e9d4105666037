"""The graph module that all stages make: one whose constants stay out of the state.

Before version 2.14, torch forgets which buffers are not persistent when it makes or copies a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import BuiltinFunctionType
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.fx.graph_module import reduce_graph_module
from torch.overrides import get_ignored_functions
from torch.utils._pytree import tree_leaves


class Graph(fx.GraphModule):
    """A `GraphModule` whose buffers are persistent if they were so where it took them from.

    A copy keeps the name of its class, by which tables and errors call a network.
    """

    def __init__(
        self, root: nn.Module | dict[str, Any], graph: fx.Graph, class_name: str = "GraphModule"
    ) -> None:
        super().__init__(root, graph, class_name)
        if isinstance(root, nn.Module):
            _hide_alike(root, self)

    def _deepcopy_init(self) -> Callable[..., None]:
        return partial(Graph.__init__, class_name=type(self).__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        body, imports = super().__reduce__()[1]
        return unpickled, (body | {"_graphmodule_cls_name": type(self).__name__}, imports)


class _Reader(fx.Tracer):
    """Traces calls that make tensors of a traced size, which torch alone does not let through."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace the code of a graph."""
        makers = {
            name: function
            for name, function in vars(torch).items()
            if isinstance(function, BuiltinFunctionType) and function in get_ignored_functions()
        }
        with ExitStack() as patches:
            for name, function in makers.items():
                patches.enter_context(mock.patch.object(torch, name, _as_a_step(function)))
            return super().trace(root, concrete_args)


def _as_a_step(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        proxies = [x for x in tree_leaves((args, kwargs)) if isinstance(x, fx.Proxy)]
        if not proxies:
            return function(*args, **kwargs)
        return proxies[0].tracer.create_proxy("call_function", function, args, kwargs)

    return call


def unpickled(body: dict[str, Any], imports: str) -> fx.GraphModule:
    """Return a graph from what pickle has of it: code, which is traced."""
    body["_tracer_cls"] = _Reader
    module = reduce_graph_module(body, imports)
    assert isinstance(module, fx.GraphModule)
    module.graph._tracer_cls = None
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
