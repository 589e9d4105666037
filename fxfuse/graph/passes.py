"""Passes over a graph, and their runner: it lets a pass edit a copy, and checks the result.

How much is checked is set by `FXFUSE_DEBUG` or `with debug(n)`. 0: nothing. 1: each edited graph
is linted. 2: the outputs of a pass that claims to keep the function are compared, too. 3: each
graph is also written to the folder `$FXFUSE_DUMP` (default: the current one).

`canonical` is the form that the later stages expect. Checks go: assertions, and the comparisons
that only they need. A concatenation that lists the parts of an earlier one again reads the earlier
one instead, so that a stream that grows by concatenation is one stream with blocks on it, as a
residual stream is: `cat([a, b])`, `cat([a, b, c])` becomes `x = cat([a, b])`, `cat([x, c])`.
"""

from __future__ import annotations

import copy
import functools
import operator
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .._checked import checked
from ..errors import PassError
from .modes import eval_mode
from .trace import Interpreter
from .verify import lint, require_equal

_level: ContextVar[int | None] = ContextVar("fxfuse_debug", default=None)


def debug_level() -> int:
    """Return the level of checking in force, 0 to 3."""
    level = _level.get()
    if level is not None:
        return level
    text = os.environ.get("FXFUSE_DEBUG", "0")
    return int(text) if text.isdigit() else 0


@checked()
@contextmanager
def debug(level: int) -> Iterator[None]:
    """Set the level of checking inside a `with` block."""
    token = _level.set(level)
    try:
        yield
    finally:
        _level.reset(token)


def graph_pass(
    *, keeps_function: bool
) -> Callable[[Callable[..., None]], Callable[..., fx.GraphModule]]:
    """Make a pass of a function that edits a `GraphModule` in place.

    The pass takes a module, example inputs to check it on, and the function's other arguments. It
    returns an edited copy; new nodes have their pass and their inputs in `meta["origin"]`.

    Args:
        keeps_function: Whether the pass claims to keep the function; checked from level 2 on.
    """

    def wrap(body: Callable[..., None]) -> Callable[..., fx.GraphModule]:
        @functools.wraps(body)
        def run(module: fx.GraphModule, example: tuple[Tensor, ...], *args: Any) -> fx.GraphModule:
            start, name = time.perf_counter(), body.__name__
            edited = copy.deepcopy(module)
            old = {n.name for n in edited.graph.nodes}
            body(edited, *args)
            for node in edited.graph.nodes:
                if node.name not in old and "origin" not in node.meta:
                    node.meta["origin"] = (name, tuple(n.name for n in node.all_input_nodes))
            edited.delete_all_unused_submodules()
            edited.recompile()
            _check(name, module, edited, example, keeps_function)
            if debug_level() >= 3:
                _dump(name, edited, time.perf_counter() - start)
            return edited

        return run

    return wrap


def _check(
    name: str,
    before: fx.GraphModule,
    after: fx.GraphModule,
    example: tuple[Tensor, ...],
    keeps_function: bool,
) -> None:
    if debug_level() >= 1:
        try:
            lint(after)
        except RuntimeError as error:
            raise PassError(
                f"a graph that fx finds malformed: {error}",
                where=f"after the pass {name}",
                expected="a graph that graph.lint accepts",
                do="every node must be inserted before its users",
            ) from error
    if debug_level() >= 2 and keeps_function:
        require_equal(before, after, example, f"the pass {name}, which claims to keep the function")


def _dump(name: str, module: fx.GraphModule, seconds: float) -> None:
    folder = Path(os.environ.get("FXFUSE_DUMP", "."))
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("[0-9][0-9]_*.txt")))
    text = f"# {name}, {seconds:.3f} s\n{module.graph}\n"
    (folder / f"{number:02d}_{name}.txt").write_text(text)


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


def _unwritten_joins(module: fx.GraphModule, example: tuple[Tensor, ...]) -> set[str]:
    """Return the concatenations that nothing writes to later, nor to their parts."""
    joins: dict[str, list[tuple[Tensor, int]]] = {}  # tensors, and how often they were written to

    def look(node: fx.Node, value: Any, values: dict[fx.Node, Any]) -> None:
        if parts := [values[part] for part in _join(node)[0]]:
            joins[node.name] = [(t, t._version) for t in (value, *parts)]

    with eval_mode(module), torch.no_grad():
        Interpreter(module, look=look).run(*example)
    return {n for n, join in joins.items() if all(t._version == count for t, count in join)}


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
