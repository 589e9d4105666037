"""What a forward writes to while it is traced: constants it makes, and buffers it assigns.

A call makes its constants anew, whereas fx keeps each as one tensor of the graph. And a buffer that
is assigned (`self.steps += 1`) is no step that fx knows: it would hold a proxy from then on.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..errors import TraceError
from .state import buffers_kept

_ASSIGNED = "add and concat floordiv lshift mod mul matmul or pow rshift sub truediv xor"
_OPERATORS = {f for f in vars(operator).values() if callable(f)}
_ASSIGNMENTS = {getattr(operator, f"__i{of}__") for of in _ASSIGNED.split()} | {operator.setitem}


def random_states() -> tuple[Any, ...]:
    """Return the states of the generators that a forward may draw from."""
    return random.getstate(), torch.get_rng_state().numpy().tobytes()


def require_nothing_drawn(before: Any, after: Any, module: nn.Module) -> None:
    """Refuse random numbers that would be constants of the graph, but are none in the module."""
    if before != after:
        raise TraceError(
            "random numbers that forward draws beside its inputs",
            where=type(module).__name__,
            expected="random numbers that are drawn at each call, not once for the graph",
            do="draw them by torch.randn_like(x) or x.new_empty(...).normal_(), or wrap the "
            "function that draws them with torch.fx.wrap",
        )


@contextmanager
def state_kept(shell: nn.Module) -> Iterator[None]:
    """Give a module back the buffers and values that it had before it was traced."""
    buffers = [
        (part, name, buffer)
        for part in shell.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    try:
        with buffers_kept(shell):
            yield
    finally:
        for part in shell.modules():
            for table in (vars(part), part._buffers):
                for name in [n for n, value in table.items() if isinstance(value, fx.Proxy)]:
                    table[name] = None
        for part, name, buffer in buffers:
            part._buffers[name] = buffer


def assigned(shell: nn.Module) -> dict[str, fx.Node]:
    """Return the values that a traced forward has assigned to buffers, by their names."""
    values = {}
    for path, part in shell.named_modules():
        for name, value in part._buffers.items():
            if isinstance(value, fx.Proxy):
                values[f"{path}.{name}" if path else name] = value.node
    return values


def write_assigned(shell: nn.Module, graph: fx.Graph, values: dict[str, fx.Node]) -> None:
    """Write the values that were assigned to buffers into them, at the end of a graph.

    Until then, what was read of a buffer is what it held before. A buffer that held nothing cannot
    be written to, and class and graph forget it alike with the next state that is loaded.
    """
    buffers = dict(shell.named_buffers())
    reads = {n.target: n for n in reversed(graph.nodes) if n.op == "get_attr"}
    with graph.inserting_before(graph.output_node()):
        for name, value in values.items():
            if name in buffers:
                buffer = reads[name] if name in reads else graph.get_attr(name)
                written = graph.call_method("copy_", (buffer, value))
                for node in (buffer, written):
                    node.meta.setdefault("nn_module_stack", value.meta.get("nn_module_stack") or {})


def make_constants_anew(shell: nn.Module, graph: fx.Graph, known: set[str]) -> None:
    """Let each call have constants of its own, which it may write to.

    Those that show a value several times stay: torch writes to no such tensor.

    Args:
        shell: The traced module, which holds the constants.
        graph: Its graph; edited in place.
        known: Names that the module had before it was traced.
    """
    own: dict[str, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr" and n.target not in known]:
        name = str(node.target)
        value = getattr(shell, name, None)
        if isinstance(value, Tensor) and 0 in value.stride():
            continue
        if name in own:  # the same tensor, read once more
            node.replace_all_uses_with(own[name])
            graph.erase_node(node)
            continue
        with graph.inserting_after(node):
            copy = own[name] = graph.call_method("clone", (node,))
        copy.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack") or {})
        node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)


def read_what_is_written(graph: fx.Graph) -> None:
    """Let what is read of a tensor after a write in place be read from the write, in place.

    `y.add_(1)` returns `y`. If the graph reads `y` itself, it does not show what comes after what.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if writes(node) and node.op == "call_method":
            for reader in list(node.args[0].users) if isinstance(node.args[0], fx.Node) else ():
                if order[reader] > order[node]:
                    reader.replace_input_with(node.args[0], node)


def write_item(tensor: Tensor, index: Any, value: Any) -> Any:
    """Write to a part of a tensor and return the tensor: a graph then shows what reads it after.

    Example:
        >>> write_item(torch.zeros(3), slice(1, None), 2.0)
        tensor([0., 2., 2.])
    """
    proxies = [x for x in tree_leaves((tensor, index, value)) if isinstance(x, fx.Proxy)]
    if proxies:  # code of a graph is traced when it is unpickled
        return proxies[0].tracer.create_proxy(
            "call_function", write_item, (tensor, index, value), {}
        )
    tensor[index] = value
    return tensor


def read_behind(write: Any, tensor: Tensor) -> Tensor:
    """Return a tensor as it is once something else has written to its memory."""
    return tensor


def writes(node: fx.Node) -> bool:
    """Tell whether a node writes to its first input: methods such as `add_`, and assigned items.

    Python's operators write where they assign (`x += y`); `x & y`, whose name is `and_`, does not.
    """
    target = node.target
    if node.op not in ("call_method", "call_function") or target in _OPERATORS:
        return target in _ASSIGNMENTS
    word = target if isinstance(target, str) else getattr(target, "__name__", "")
    return target is write_item or word.endswith("_") and not word.endswith("__")
