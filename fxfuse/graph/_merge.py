"""From the graphs of a network in eval mode and in training mode to one graph for both.

Each node of eval mode is looked for in the graph of training mode, in order. If all are there, that
graph serves both modes: its flags follow the mode (`Mode`), what only training computes branches
off at taps, and the output is a choice. Nodes are compared by numbers: equal numbers mean equal
expressions, flags aside.
"""

from __future__ import annotations

import re
from os.path import commonprefix
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_leaves

from .modes import Choice, Mode, Rate, Tap
from .state import part_at

# A node, the place or name of one of its arguments, and what this is in eval mode and in training
Flag = tuple[fx.Node, str | int, Any, Any]


def merge(shell: nn.Module, evaluating: fx.Graph, training: fx.Graph) -> fx.Graph | set[str]:
    """Make the graph of training mode serve eval mode as well.

    Args:
        shell: The module that both were traced from; it gets the modules that know the mode.
        evaluating: Its graph in eval mode.
        training: Its graph in training mode; edited in place.

    Returns:
        The graph; or the names of the modules that have to be kept whole, as one node each.
    """
    matched = match(shell, evaluating, training)
    if isinstance(matched, str):
        return {matched}
    partners, flags = matched
    shared = {*partners.values()}
    extra = [node for node in _steps(training) if node not in shared]
    always = [node for node in extra if node.kwargs.get("training") is True]
    flags += [(node, "training", False, True) for node in always]
    records = _records(training, extra, [flag[0] for flag in flags])
    whole = _recorders(shell, extra, {n for nodes in records.values() for n in nodes})
    if whole:
        return whole
    _branch_off(shell, training, extra, _results(evaluating, training, partners))
    _follow_mode(shell, flags, records)
    return training


# --- nodes of one mode in the other ---------------------------------------------------------------


def match(
    shell: nn.Module, evaluating: fx.Graph, training: fx.Graph
) -> tuple[dict[fx.Node, fx.Node], list[Flag]] | str:
    """Find every node of the graph of eval mode, in order, in the graph of training mode.

    Args:
        shell: The module that both were traced from.
        evaluating: Its graph in eval mode.
        training: Its graph in training mode.

    Returns:
        For each node of eval mode, that of training mode, and the arguments of nodes of training
        mode that are False in eval mode and True in training mode, or numbers that differ, with
        both values. Or, if a node is missing, the module around the first difference. Objects that
        only eval mode makes of its outputs are left out.
    """
    numbers = _numbers(shell, evaluating, training)
    partners = _partners(evaluating, training, numbers)
    if partners is None:
        return _difference(evaluating, training, numbers)
    flags: list[Flag] = []
    for node, partner in partners.items():
        differing = _flags(node, partner, partners)
        if differing is None:
            return _maker_of(node)
        flags += differing
    return partners, flags


def _numbers(shell: nn.Module, *graphs: fx.Graph) -> dict[fx.Node, int]:
    """Number nodes so that those of one number do the same to the same inputs, flags aside."""
    number_of: dict[str, int] = {}
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
        return "flag" if isinstance(value, (bool, float)) else _text(value)

    for graph in graphs:
        for node in graph.nodes:
            arguments = map_aggregate((node.args, node.kwargs), token)
            step = repr((node.op, target(node), _path_of(node), arguments))
            numbers[node] = number_of.setdefault(step, len(number_of))
    return numbers


def _partners(
    evaluating: fx.Graph, training: fx.Graph, numbers: dict[fx.Node, int]
) -> dict[fx.Node, fx.Node] | None:
    """Find each node of one graph in the other, in order; None if one is missing.

    The search goes backwards: if only one mode repeats a step (`x.flatten(1)`), its readers tell
    which of the two it is. Objects that only eval mode makes of its outputs are left out.
    """
    partners: dict[fx.Node, fx.Node] = {}
    rest = _steps(training)
    in_training = {numbers[node] for node in rest}
    for node in reversed(_steps(evaluating)):
        if _packs(node) and numbers[node] not in in_training:
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


def _flags(node: fx.Node, partner: fx.Node, partners: dict[fx.Node, fx.Node]) -> list[Flag] | None:
    """Return the arguments of a node that follow the mode; None if others differ, too."""
    args, kwargs = map_arg((node.args, node.kwargs), partners.__getitem__)
    places: list[tuple[int | str, tuple[Any, Any]]] = [*enumerate(zip(args, partner.args))]
    places += [(key, (kwargs[key], partner.kwargs[key])) for key in kwargs]
    differing = [(key, x, y) for key, (x, y) in places if _text(x) != _text(y)]
    if any((x, y) != (False, True) and not _are_rates(x, y) for _, x, y in differing):
        return None
    return [(partner, key, x, y) for key, x, y in differing]


def _are_rates(x: Any, y: Any) -> bool:
    return isinstance(x, float) and isinstance(y, float)


def _difference(evaluating: fx.Graph, training: fx.Graph, numbers: dict[fx.Node, int]) -> str:
    """Return the module around the first step of eval mode that training mode does not take."""
    rest = _steps(training)
    for node in _steps(evaluating):
        place = next((i for i, other in enumerate(rest) if numbers[other] == numbers[node]), None)
        if place is None:
            in_eval = {numbers[n] for n in evaluating.nodes}
            call = (node.op, node.target, _path_of(node))
            same_call = [n for n in rest if (n.op, n.target, _path_of(n)) == call]
            reads = same_call[0].all_input_nodes if same_call else []
            added = [n for n in reads if numbers[n] not in in_eval]
            return _maker_of(added[0] if added else node)  # what training adds says where it is
        del rest[: place + 1]
    return ""


def _text(value: Any) -> str:
    """Write a constant, without the names of nodes that fx puts into messages of assertions."""
    return re.sub(r"Proxy\(\w+\)", "Proxy()", repr(value))


def _steps(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op != "output"]


def _reads(node: fx.Node) -> list[fx.Node]:
    """Return the nodes among a node's arguments, one as often as it is there."""
    nodes: list[fx.Node] = []
    map_arg((node.args, node.kwargs), nodes.append)
    return nodes


def _packs(node: fx.Node) -> bool:
    """Tell whether a node only makes an object (a named tuple) of outputs."""
    makes = node.op == "call_function" and isinstance(node.target, type)
    return makes and all(user.op == "output" or _packs(user) for user in node.users)


# --- where a node comes from ----------------------------------------------------------------------


def _path_of(node: fx.Node) -> str:
    """Return the module that a node was traced in; a call of a module counts as inside it."""
    return _stack(node)[-1]


def _maker_of(node: fx.Node) -> str:
    """Return the module whose forward made a node."""
    return _stack(node)[-2 if node.op == "call_module" else -1]


def _stack(node: fx.Node) -> list[str]:
    """Return the modules around a node; fx marks the second call of one by `@1`."""
    return ["", *(path.split("@")[0] for path in node.meta.get("nn_module_stack") or ())]


def _owner(nodes: list[Any]) -> str:
    """Return the innermost module whose forward can have made all of some nodes."""
    paths = []
    for node in nodes:
        if isinstance(node, fx.Node) and not _packs(node):
            paths.append(_maker_of(node).split("."))
    return ".".join(commonprefix(paths))


# --- what training records ------------------------------------------------------------------------


def _records(
    graph: fx.Graph, extra: list[fx.Node], flagged: list[fx.Node]
) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each step with a flag, what its module records in training before that step."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    records: dict[fx.Node, list[fx.Node]] = {}
    for node in [n for n in extra if not n.users and n.op != "get_attr"]:
        later = [n for n in flagged if _path_of(n) == _path_of(node) and place[n] > place[node]]
        if later:
            records.setdefault(min(later, key=place.__getitem__), []).append(node)
    return records


def _recorders(shell: nn.Module, extra: list[fx.Node], carried: set[fx.Node]) -> set[str]:
    """Return the modules that record something which no flag carries.

    Only small ones, without parameters in their parts: kept whole, they carry their records along.
    """
    recorders = set()
    for node in [n for n in extra if n not in carried and n.op != "call_module"]:
        if not node.users and any(n.op == "get_attr" for n in node.all_input_nodes):
            parts = shell.get_submodule(_path_of(node)).children()
            if not any(True for part in parts for _ in part.parameters()):
                recorders.add(_path_of(node))
    return recorders - {""}


# --- one graph that knows the mode ----------------------------------------------------------------


def _add_mode(shell: nn.Module, path: str, kind: type[Mode]) -> str:
    """Give a module a part that knows the mode, unless it has it; return the part's name."""
    owner, name = shell.get_submodule(path), kind.called
    while hasattr(owner, name) and type(getattr(owner, name)) is not kind:
        name += "_"
    if not hasattr(owner, name):
        setattr(owner, name, kind())
    return f"{path}.{name}" if path else name


def _results(evaluating: fx.Graph, training: fx.Graph, partners: dict[fx.Node, fx.Node]) -> Any:
    """Return what eval mode returns, in nodes of the graph of training mode."""
    with training.inserting_before(training.output_node()):
        for node in [n for n in _steps(evaluating) if n not in partners]:
            partners[node] = training.node_copy(node, partners.__getitem__)
    return map_arg(evaluating.output_node().args[0], partners.__getitem__)


def _branch_off(shell: nn.Module, graph: fx.Graph, extra: list[fx.Node], result: Any) -> None:
    """Let what only training computes read through taps, and choose the output by the mode."""
    output, owner = graph.output_node(), _owner([*extra, *tree_leaves(result)])
    inside = {node for node in extra if node.op != "get_attr"}
    taps: dict[fx.Node, fx.Node] = {}
    for node in [n for n in extra if n in inside and not _packs(n)]:
        for source in [n for n in node.all_input_nodes if n not in inside]:
            if source not in taps:
                taps[source] = _tap(shell, owner, source, node)
            node.replace_input_with(source, taps[source])
    if repr(result) != repr(output.args[0]):
        with graph.inserting_before(output):
            choice = graph.call_module(_add_mode(shell, owner, Choice), (result, output.args[0]))
        output.args = (choice,)


def _tap(shell: nn.Module, owner: str, source: fx.Node, reader: fx.Node) -> fx.Node:
    """Insert a tap before a reader. A parameter needs none: no forward writes to it."""
    if source.op == "get_attr" and isinstance(part_at(shell, str(source.target)), nn.Parameter):
        return source
    with source.graph.inserting_before(reader):
        return source.graph.call_module(_add_mode(shell, owner, Tap), (source,))


def _follow_mode(
    shell: nn.Module, flags: list[Flag], records: dict[fx.Node, list[fx.Node]]
) -> None:
    """Put a `Mode` in the place of each flag, with what was recorded before it."""
    for node, key, evaluating, training in flags:
        with node.graph.inserting_before(node):
            arguments = tuple(records.pop(node, ()))
            kind = Rate if _are_rates(evaluating, training) else Mode
            if kind is Rate:
                arguments = (evaluating, training, *arguments)
            flag = node.graph.call_module(_add_mode(shell, _path_of(node), kind), arguments)
        flag.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack") or {})
        if isinstance(key, int):
            node.update_arg(key, flag)
        else:
            node.update_kwarg(key, flag)
