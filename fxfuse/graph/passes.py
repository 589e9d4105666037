"""The runner of passes: it copies the graph, lets the pass edit the copy, and checks the result.

How much is checked is set by `FXFUSE_DEBUG` or `with debug(n)`. 0: nothing. 1: each edited graph is
linted. 2: the outputs of a pass that claims to keep the function are compared, too. 3: each graph
is also written to the folder `$FXFUSE_DUMP` (default: the current one).
"""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from ..errors import PassError
from .verify import lint, require_equal

_level: ContextVar[int | None] = ContextVar("fxfuse_debug", default=None)


def debug_level() -> int:
    """Return the level of checking in force, 0 to 3."""
    level = _level.get()
    if level is not None:
        return level
    text = os.environ.get("FXFUSE_DEBUG", "0")
    return int(text) if text.isdigit() else 0


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
