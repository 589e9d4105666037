"""Which nodes of a model's graph in eval mode are which of its graph in training mode.

Nodes are numbered by what they do to what, so that equal numbers mean equal expressions but for
flags. Partners are then found backwards from the outputs, each node's arguments with it: the nodes
of eval mode are a subsequence of those of training mode, or the two do not match.

One graph for both modes of a model: live flags, and heads that exist in training only.

A model is traced in eval mode and in training mode. Where the nodes of the first graph are found
one by one, in order, in the second, the second serves both modes: flags follow the mode, and what
only training computes ends in a live choice at the output. Eval mode computes it too, so that it is
analysed and fused like the rest, but on copies, so that nothing it writes reaches the outputs.
"""

from __future__ import annotations

import copy
import re
from os.path import commonprefix
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_leaves, tree_map

from .state import part_at


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


class Mode(nn.Module):
    """A training flag that stays live in a graph."""

    called = "training_mode"

    def forward(self, *records: Any) -> bool:
        """Return whether the module is in training mode.

        Args:
            records: What training has recorded before; given, so that passes that copy a step and
                its flag copy the record too.
        """
        return self.training


class Choice(Mode):
    """A choice between two values that stays live in a graph."""

    called = "training_output"

    def forward(self, evaluating: Any, training: Any) -> Any:
        """Return the value of the module's mode."""
        return training if self.training else evaluating


class Tap(Mode):
    """Where a branch for training leaves: in eval mode it may not write to what it reads."""

    called = "training_input"

    def forward(self, value: Any) -> Any:
        """Return the value, in eval mode a copy of it."""
        if self.training:
            return value
        return tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, value)


def merge(shell: nn.Module, evaluating: fx.Graph, training: fx.Graph) -> fx.Graph | set[str]:
    """Make the graph of training mode serve eval mode as well.

    Args:
        shell: The module that both were traced from; it gets what keeps the graph live.
        evaluating: Its graph in eval mode.
        training: Its graph in training mode; edited in place.

    Returns:
        The graph, or the names of modules that have to be kept whole.
    """
    found = match(shell, evaluating, training)
    if isinstance(found, str):
        return {found}
    partners, flags = found
    shared = {*partners.values()}
    extra = [node for node in steps(training) if node not in shared]
    flags += [(node, "training") for node in extra if node.kwargs.get("training") is True]
    records = _records(training, extra, [node for node, _ in flags])
    whole = _recorders(shell, extra, {n for nodes in records.values() for n in nodes})
    if whole:
        return whole
    _branch_off(shell, training, extra, _results(evaluating, training, partners))
    _follow_mode(shell, flags, records)
    return training


def _records(
    graph: fx.Graph, extra: list[fx.Node], flagged: list[fx.Node]
) -> dict[fx.Node, list[fx.Node]]:
    """Return, per step with a flag, what its module records of training before that step."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in [n for n in extra if not n.users and n.op != "get_attr"]:
        own = [n for n in flagged if path_of(n) == path_of(node) and place[n] > place[node]]
        if own:
            found.setdefault(min(own, key=place.__getitem__), []).append(node)
    return found


def _recorders(shell: nn.Module, extra: list[fx.Node], carried: set[fx.Node]) -> set[str]:
    """Return the small modules with records that no flag carries: a call takes them along."""
    found = set()
    for node in [n for n in extra if n not in carried and n.op != "call_module"]:
        if not node.users and any(n.op == "get_attr" for n in node.all_input_nodes):
            parts = shell.get_submodule(path_of(node)).children()
            if not any(True for part in parts for _ in part.parameters()):
                found.add(path_of(node))
    return found - {""}


# --- keeping a graph live -------------------------------------------------------------------------


def _live(shell: nn.Module, path: str, kind: type[Mode]) -> str:
    """Give a module a part that follows its mode, and return the part's name."""
    owner, name = shell.get_submodule(path), kind.called
    while hasattr(owner, name) and type(getattr(owner, name)) is not kind:
        name += "_"
    if not hasattr(owner, name):
        setattr(owner, name, kind())
    return f"{path}.{name}" if path else name


def _results(evaluating: fx.Graph, training: fx.Graph, partners: dict[fx.Node, fx.Node]) -> Any:
    """Return what eval mode returns, in terms of the graph of training mode."""
    with training.inserting_before(training.output_node()):
        for node in [n for n in steps(evaluating) if n not in partners]:
            partners[node] = training.node_copy(node, partners.__getitem__)
    return map_arg(evaluating.output_node().args[0], partners.__getitem__)


def _branch_off(shell: nn.Module, graph: fx.Graph, extra: list[fx.Node], result: Any) -> None:
    """Let what only training computes read through taps, and choose the output by the mode."""
    output, owner = graph.output_node(), _owner([*extra, *tree_leaves(result)])
    inside = {node for node in extra if node.op != "get_attr"}
    taps: dict[fx.Node, fx.Node] = {}
    for node in [n for n in extra if n in inside and not packs(n)]:
        for source in [n for n in node.all_input_nodes if n not in inside]:
            if source not in taps:
                taps[source] = _tap(shell, owner, source, node)
            node.replace_input_with(source, taps[source])
    if repr(result) != repr(output.args[0]):
        with graph.inserting_before(output):
            choice = graph.call_module(_live(shell, owner, Choice), (result, output.args[0]))
        output.args = (choice,)


def _tap(shell: nn.Module, owner: str, source: fx.Node, reader: fx.Node) -> fx.Node:
    """Insert a tap before a reader; parameters need none, no forward writes to them."""
    if source.op == "get_attr" and isinstance(part_at(shell, str(source.target)), nn.Parameter):
        return source
    with source.graph.inserting_before(reader):
        return source.graph.call_module(_live(shell, owner, Tap), (source,))


def _owner(nodes: list[Any]) -> str:
    """Return the innermost module whose forward can have made all of some nodes."""
    paths = []
    for node in nodes:
        if isinstance(node, fx.Node) and not packs(node):
            paths.append(maker_of(node).split("."))
    return ".".join(commonprefix(paths))


def _follow_mode(
    shell: nn.Module,
    flags: list[tuple[fx.Node, str | int]],
    records: dict[fx.Node, list[fx.Node]],
) -> None:
    for node, key in flags:
        with node.graph.inserting_before(node):
            done = tuple(records.pop(node, ()))
            flag = node.graph.call_module(_live(shell, path_of(node), Mode), done)
        flag.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack") or {})
        if isinstance(key, int):
            node.update_arg(key, flag)
        else:
            node.update_kwarg(key, flag)


# --- doing without what only training computes ----------------------------------------------------


def only_in_training(module: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that eval mode has no use for: read off the taps and the choice.

    Nothing is remembered beside the graph, so that a network that was emitted, saved or traced
    again still has its heads.
    """
    nodes = list(module.graph.nodes)
    behind_taps: set[fx.Node] = set()
    for node in nodes:
        kind = _mode_of(module, node)
        if kind is Tap or kind is None and behind_taps.intersection(node.all_input_nodes):
            behind_taps.add(node)
    needed: set[fx.Node] = set()
    for node in reversed(nodes):
        unread = not node.users and node not in behind_taps
        if node.op == "output":
            needed.update(
                n for n in tree_leaves(_evaluated(module, node)) if isinstance(n, fx.Node)
            )
        elif node in needed or unread:
            needed.update([node, *node.all_input_nodes])
    return {node for node in nodes if node.op != "output"} - needed


def evaluating_part(module: fx.GraphModule) -> fx.GraphModule | None:
    """Return a network without what only training computes, None if it has nothing of the kind.

    Args:
        module: Network that was traced; the result shares its tensors.
    """
    extra = {node.name for node in only_in_training(module)}
    graph = copy.deepcopy(module.graph)
    graph.output_node().args = (_evaluated(module, graph.output_node()),)
    for node in reversed(graph.nodes):
        if node.name in extra:
            graph.erase_node(node)
    return fx.GraphModule(module, graph, type(module).__name__) if extra else None


def _evaluated(module: fx.GraphModule, output: fx.Node) -> Any:
    """Return what a graph returns in eval mode."""
    result = output.args[0]
    if isinstance(result, fx.Node) and is_choice(module, result):
        return result.args[0]
    return result


def _mode_of(module: fx.GraphModule, node: fx.Node) -> type[Mode] | None:
    """Return what a node keeps live, if anything."""
    part = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return type(part) if isinstance(part, Mode) else None


def is_choice(module: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node chooses between the outputs of the two modes."""
    return _mode_of(module, node) is Choice


def cut_to(module: fx.GraphModule, part: fx.GraphModule) -> None:
    """Cut a network down, in place, to a part of it that shares its tensors."""
    module.graph = part.graph
    module.delete_all_unused_submodules()
    kept = {id(t) for t in [*part.parameters(), *part.buffers()]}
    for owner in module.modules():
        for held in (owner._parameters, owner._buffers):
            for name in [n for n, t in held.items() if t is not None and id(t) not in kept]:
                del held[name]
