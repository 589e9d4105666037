"""A traced graph in the form that the later stages expect; its function stays.

Checks go: assertions, and the comparisons that only they need. A concatenation that lists the parts
of an earlier one again reads the earlier one instead. A stream that grows by concatenation is then
one stream with blocks on it, as a residual stream is: `cat([a, b])`, `cat([a, b, c])` becomes
`x = cat([a, b])`, `cat([x, c])`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from .passes import graph_pass
from .trace import Interpreter, eval_mode

_QUESTIONS = {"size", "dim", "numel", "ndimension", "is_floating_point"}  # methods without effect

_COMPARISONS: set[Any] = {
    getattr,
    isinstance,
    len,
    torch.equal,
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    *(operator.and_, operator.or_, operator.not_, operator.mod, operator.floordiv),
    *(operator.getitem, operator.mul, operator.add, operator.sub),
}


def canonical(module: fx.GraphModule, example: tuple[Tensor, ...]) -> fx.GraphModule:
    """Return a copy of a graph without checks, its concatenations nested; itself if it has none.

    Args:
        module: A traced network; not modified.
        example: Inputs to run it on.
    """
    if not any(_checks(node) or _join(node)[0] for node in module.graph.nodes):
        return module
    return _rewrite(module, example, _unwritten_joins(module, example))


@graph_pass(keeps_function=True)
def _rewrite(module: fx.GraphModule, unwritten: set[str]) -> None:
    _drop_checks(module.graph)
    _nest_joins(module.graph, unwritten)


class _Watcher(Interpreter):
    """Remember concatenations and their parts, and how often each had been written to by then."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.joins: dict[str, list[tuple[Tensor, int]]] = {}

    def run_node(self, n: fx.Node) -> Any:
        parts = [self.env[p] for p in _join(n)[0]]
        value = super().run_node(n)
        if parts:
            self.joins[n.name] = [(t, t._version) for t in (value, *parts)]
        return value


def _unwritten_joins(module: fx.GraphModule, example: tuple[Tensor, ...]) -> set[str]:
    """Return the concatenations that nothing writes to later, nor to their parts."""
    watcher = _Watcher(module)
    with eval_mode(module), torch.no_grad():
        watcher.run(*example)
    joins = watcher.joins.items()
    return {n for n, values in joins if all(t._version == version for t, version in values)}


def _drop_checks(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if _checks(node) or (not node.users and _only_asks(node)):
            graph.erase_node(node)


def _checks(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch._assert


def _only_asks(node: fx.Node) -> bool:
    """Tell whether a node has no effect but its value."""
    if node.op == "call_method":
        return node.target in _QUESTIONS
    return node.op == "call_function" and node.target in _COMPARISONS


def _nest_joins(graph: fx.Graph, unwritten: set[str]) -> None:
    earlier: list[tuple[list[fx.Node], int, fx.Node]] = []
    for node in graph.nodes:
        parts, dim = _join(node)
        if not parts or node.name not in unwritten:
            continue
        if len(parts) == 1:
            node.replace_all_uses_with(parts[0])
            graph.erase_node(node)
            continue
        heads = [e for e in earlier if e[1] == dim and e[0] == parts[: len(e[0])] != parts]
        longest = max(heads, key=lambda e: len(e[0]), default=None)
        earlier.append((parts, dim, node))
        if longest is not None:
            node.args, node.kwargs = ([longest[2], *parts[len(longest[0]) :]], dim), {}


def _join(node: fx.Node) -> tuple[list[fx.Node], int]:
    """Return what a concatenation joins, and along which axis; no parts for any other node."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
        return [], 0
    parts: Any = node.args[0] if node.args else node.kwargs.get("tensors", ())
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if "out" in node.kwargs or not isinstance(parts, (list, tuple)) or not isinstance(dim, int):
        return [], 0
    return list(parts), dim
