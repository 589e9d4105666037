"""Write a traced graph the way the later stages expect it, without changing its function.

Checks (assertions and the comparisons they need) are dropped, and a join that lists again what an
earlier join has put together reads that join instead, so that a stream that grows by concatenation
is one stream with blocks on it, as a residual stream is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from .passes import graph_pass

_QUESTIONS = {"size", "dim", "numel", "ndimension", "is_floating_point"}  # methods that only ask
_COMPARISONS: set[Callable] = {
    getattr,
    isinstance,
    len,
    torch.equal,
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    *(operator.and_, operator.or_, operator.not_, operator.mod, operator.floordiv),
    *(operator.getitem, operator.mul, operator.add, operator.sub),
}


@graph_pass(keeps_function=True)
def canonical(module: fx.GraphModule) -> None:
    """Drop checks and nest joins."""
    _drop_checks(module.graph)
    _nest_joins(module.graph)


def _drop_checks(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        checks = node.op == "call_function" and node.target is torch._assert
        if checks or (not node.users and _only_asks(node)):
            graph.erase_node(node)


def _only_asks(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _QUESTIONS
    return node.op == "call_function" and node.target in _COMPARISONS


def _nest_joins(graph: fx.Graph) -> None:
    seen: list[tuple[list[fx.Node], int, fx.Node]] = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
            continue
        parts, dim = _join(node)
        if not parts:
            continue
        earlier = [s for s in seen if s[1] == dim and s[0] == parts[: len(s[0])] and s[2] != node]
        seen.append((parts, dim, node))
        longest = max(earlier, key=lambda s: len(s[0]), default=None)
        if longest is not None and 1 < len(longest[0]) < len(parts):
            node.args = ([longest[2], *parts[len(longest[0]) :]], dim)
            node.kwargs = {}


def _join(node: fx.Node) -> tuple[list[fx.Node], int]:
    """Return what a join joins, and along which axis."""
    parts = node.args[0] if node.args else node.kwargs.get("tensors", ())
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    known = isinstance(parts, (list, tuple)) and isinstance(dim, int)
    return (list(parts), dim) if known and "out" not in node.kwargs else ([], 0)
