"""Depth rewrites: give a network the layers it lacks without changing its function.

An inserted layer is a copy of the other network's layer at this network's width, made neutral
(`neutral`), or of a layer of this network's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from .ir import Layer
from .neutral import joins, neutralise, no_neutral_form
from .passes import graph_pass
from .progress import Tick, counted, silent
from .sizing import Insertion, resized_copy
from .widening import Room


@dataclass(frozen=True)
class Stamp:
    """What an inserted node is there for.

    Attributes:
        number: Of its insertion.
        after: The node whose value the layer hands on.
        carries: Whether this node holds that value.
        joins: Whether the layer adds units beside that value.
        whole: Whether the layer is a run of layers that hands on its input as a whole.
        zeroed: Which of the tensors the node touches were set to zero to silence the layer.
    """

    number: int
    after: str
    carries: bool
    joins: bool
    whole: bool = False
    zeroed: tuple[int, ...] = ()


@graph_pass(keeps_function=True)
def deepen(module: fx.GraphModule, insertions: Sequence[Insertion], tick: Tick = silent) -> None:
    """Insert neutral layers, in the order given; several behind one node follow each other.

    Each inserted node is stamped `inserted` with a `Stamp`.

    Raises:
        PassError: If a layer has no neutral form.
    """
    _insert_all(module, insertions, tick)


@graph_pass(keeps_function=False)
def deepen_roughly(
    module: fx.GraphModule, insertions: Sequence[Insertion], tick: Tick = silent
) -> None:
    """Insert layers as `deepen` does, some of which change what they hand on.

    Raises:
        PassError: If a layer has no neutral form for any other reason.
    """
    _insert_all(module, insertions, tick)


def _insert_all(module: fx.GraphModule, insertions: Sequence[Insertion], tick: Tick) -> None:
    tail: dict[str, fx.Node] = {}
    if not insertions:
        return
    room = Room(insertions[0].into)
    for number, insertion in enumerate(counted(insertions, tick)):
        after = tail.get(insertion.after)
        if after is None:
            after = next(n for n in module.graph.nodes if n.name == insertion.after)
        insertion = replace(insertion, width=room.width(insertion.after))
        tail[insertion.after] = _insert(module, insertion, after, number, room)


def _insert(
    module: fx.GraphModule, insertion: Insertion, after: fx.Node, number: int, room: Room
) -> fx.Node:
    layer = insertion.layer
    originals = {n.name: n for n in insertion.template.module.graph.nodes}
    known: dict[fx.Node, fx.Node] = {originals[layer.entry]: after}
    paths: dict[str, str] = {}
    readers = list(after.users)
    passed, beside = not (layer.branched or insertion.parts), joins(insertion)
    with module.graph.inserting_before(after.next):
        for node in _layer_nodes(insertion.template.module, layer):
            passed = passed or node.name == layer.merge
            known[node] = _copy_node(module, node, known, paths, insertion)
            known[node].meta["origin"] = ("deepen", (after.name,))
            stamp = Stamp(number, after.name, passed, beside, bool(insertion.parts))
            known[node].meta["inserted"] = stamp
    exit_node = known[originals[layer.nodes[-1]]]
    for reader in readers:
        reader.replace_input_with(after, exit_node)
    exit_node.meta["neutral_to"] = after.meta.get("neutral_to", after.name)
    for name, places in neutralise(module, insertion, paths, room).items():
        writer = known[originals[name]]
        writer.meta["inserted"] = replace(writer.meta["inserted"], zeroed=places)
    return exit_node


def _layer_nodes(module: fx.GraphModule, layer: Layer) -> list[fx.Node]:
    """Return a layer's nodes and the parameters and sizes they read, in graph order."""
    needed = {n for n in module.graph.nodes if n.name in layer.nodes}
    waiting = list(needed)
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node in needed or node.name == layer.entry:
                continue
            if node.op == "placeholder":
                raise no_neutral_form(layer, "it reads the network's input beside its entry")
            needed.add(node)
            waiting.append(node)
    return [n for n in module.graph.nodes if n in needed]


def _copy_node(
    module: fx.GraphModule,
    node: fx.Node,
    known: dict[fx.Node, fx.Node],
    paths: dict[str, str],
    insertion: Insertion,
) -> fx.Node:
    copied = module.graph.node_copy(node, lambda n: known[n])
    if node.op in ("call_module", "get_attr"):
        path = str(node.target)
        if path not in paths:
            paths[path] = _free_path(module, path)
            _attach(module, paths[path], resized_copy(insertion, path))
        copied.target = paths[path]
    return copied


def _free_path(module: fx.GraphModule, path: str) -> str:
    taken = {p for p, _ in [*module.named_modules(), *module.named_parameters()]}
    taken |= {p for p, _ in module.named_buffers()}
    called = tuple(f"{n.target}." for n in module.graph.nodes if n.op == "call_module")
    free, n = path, 1
    while free in taken or free.startswith(called):
        free, n = f"{path.replace('.', '_')}_inserted{n}", n + 1
    return free


def _attach(module: fx.GraphModule, path: str, part: nn.Module | Tensor) -> None:
    if isinstance(part, nn.Module):
        module.add_submodule(path, part)
        return
    head, _, leaf = path.rpartition(".")
    if head and head not in dict(module.named_modules()):
        module.add_submodule(head, nn.Module())
    owner = module.get_submodule(head)
    if isinstance(part, nn.Parameter):
        owner.register_parameter(leaf, part)
    else:
        owner.register_buffer(leaf, part)
