"""Which nodes of a model's graph in eval mode are which of its graph in training mode.

Nodes are numbered by what they do to what, so that equal numbers mean equal expressions but for
flags. Partners are then found backwards from the outputs, each node's arguments with it: the nodes
of eval mode are a subsequence of those of training mode, or the two do not match.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg


def path_of(node: fx.Node) -> str:
    """Return the module a node was traced in; a module that is called counts as in itself."""
    return _stack(node)[-1]


def maker_of(node: fx.Node) -> str:
    """Return the module whose forward made a node."""
    return _stack(node)[-2 if node.op == "call_module" else -1]


def _stack(node: fx.Node) -> list[str]:
    """Return the modules around a node; a repeated call of one is marked `@n` by fx."""
    return ["", *(path.split("@")[0] for path in node.meta.get("nn_module_stack") or ())]


def packs(node: fx.Node) -> bool:
    """Tell whether a node only makes an object (a named tuple) of outputs."""
    makes = node.op == "call_function" and isinstance(node.target, type)
    return makes and all(user.op == "output" or packs(user) for user in node.users)


def steps(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes of a graph without its output."""
    return [node for node in graph.nodes if node.op != "output"]


def match(
    shell: nn.Module, evaluating: fx.Graph, training: fx.Graph
) -> tuple[dict[fx.Node, fx.Node], list[tuple[fx.Node, str | int]]] | str:
    """Find every node of the graph of eval mode, in order, in the graph of training mode.

    Args:
        shell: The module that both were traced from.
        evaluating: Its graph in eval mode.
        training: Its graph in training mode.

    Returns:
        The node of training mode for each of eval mode, and the arguments, by place or name, of
        nodes of training mode that are False in eval mode and True in training mode; or else the
        module around the first difference. Objects that eval mode makes of other outputs are
        left out.
    """
    numbers = _numbers(shell, evaluating, training)
    partners = _partners(evaluating, training, numbers)
    if partners is None:
        return _difference(evaluating, training, numbers)
    flags: list[tuple[fx.Node, str | int]] = []
    for node, partner in partners.items():
        found = _flags(node, partner, partners)
        if found is None:
            return maker_of(node)
        flags += [(partner, key) for key in found]
    return partners, flags


def _numbers(shell: nn.Module, *graphs: fx.Graph) -> dict[fx.Node, int]:
    """Number nodes so that those of one number do the same to the same inputs, but for flags."""
    known: dict[str, int] = {}
    numbers: dict[fx.Node, int] = {}
    constants: dict[str, Tensor] = {}

    def target(node: fx.Node) -> str:
        name = str(node.target)
        if node.op == "get_attr" and name.startswith("_tensor_constant"):  # each trace has its own
            value = getattr(shell, name)
            alike = (k for k, v in constants.items() if v.dtype == value.dtype and v.equal(value))
            name = next(alike, name)
            constants.setdefault(name, value)
        return name

    def token(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{numbers[value]}"
        return "flag" if isinstance(value, bool) else _text(value)

    for graph in graphs:
        for node in graph.nodes:
            arguments = map_aggregate((node.args, node.kwargs), token)
            step = repr((node.op, target(node), path_of(node), arguments))
            numbers[node] = known.setdefault(step, len(known))
    return numbers


def _partners(
    evaluating: fx.Graph, training: fx.Graph, numbers: dict[fx.Node, int]
) -> dict[fx.Node, fx.Node] | None:
    """Find each node of one graph in the other, in order; None if one is missing.

    Backwards, since a step that only one mode repeats (`x.flatten(1)`) is told by who reads it.
    Objects made of other outputs than in training are left out.
    """
    partners: dict[fx.Node, fx.Node] = {}
    rest = steps(training)
    known = {numbers[node] for node in rest}
    for node in reversed(steps(evaluating)):
        if packs(node) and numbers[node] not in known:
            continue
        wanted = partners.get(node)
        while rest:
            other = rest.pop()
            if other is wanted or (wanted is None and numbers[other] == numbers[node]):
                break
        else:
            return None
        partners[node] = other
        for a, b in zip(_reads(node), _reads(other)):
            partners.setdefault(a, b)
    return partners


def _text(value: Any) -> str:
    """Write a constant, without the names of nodes that fx writes into messages of assertions."""
    return re.sub(r"Proxy\(\w+\)", "Proxy()", repr(value))


def _reads(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _flags(
    node: fx.Node, partner: fx.Node, partners: dict[fx.Node, fx.Node]
) -> list[str | int] | None:
    """Return the arguments of a node that follow the mode, None if others differ."""
    args, kwargs = map_arg((node.args, node.kwargs), partners.__getitem__)
    places: list[tuple[int | str, tuple[Any, Any]]] = [*enumerate(zip(args, partner.args))]
    places += [(key, (kwargs[key], partner.kwargs[key])) for key in kwargs]
    differing = [(key, x, y) for key, (x, y) in places if _text(x) != _text(y)]
    if any(x is not False or y is not True for _, x, y in differing):
        return None
    return [key for key, _, _ in differing]


def _difference(evaluating: fx.Graph, training: fx.Graph, numbers: dict[fx.Node, int]) -> str:
    """Return the module around the first step of eval mode that training mode does not take."""
    rest = steps(training)
    for node in steps(evaluating):
        place = next((i for i, m in enumerate(rest) if numbers[m] == numbers[node]), None)
        if place is None:
            known = {numbers[n] for n in evaluating.nodes}
            called = (node.op, node.target, path_of(node))
            same = [m for m in rest if (m.op, m.target, path_of(m)) == called]
            reads = same[0].all_input_nodes if same else []
            added = [m for m in reads if numbers[m] not in known]
            return maker_of(added[0] if added else node)  # what training adds names its own module
        del rest[: place + 1]
    return ""
