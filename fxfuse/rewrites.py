"""Depth rewrites: give a network the layers it lacks without changing its function.

An inserted layer is a copy of the other network's layer at this network's width, made neutral: a
plain layer becomes the identity (centre tap of the kernel, exactly neutral norm; only before an
activation that does nothing twice), a residual block gets a branch that writes zero, and of a block
that joins its output to its input nobody reads that output.

References:
    Chen et al. 2016 (Net2Net); METHODS of CLAFusion, section 3.2 (adding layers). Difference: only
    the last writer of an added branch is zero, so the added block can be trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from .errors import PassError
from .ir import Layer
from .network import Network
from .passes import graph_pass
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
        zeroed: Which of the tensors the node touches were set to zero to silence the layer.
    """

    number: int
    after: str
    carries: bool
    joins: bool
    zeroed: tuple[int, ...] = ()


@graph_pass(keeps_function=True)
def deepen(module: fx.GraphModule, insertions: Sequence[Insertion]) -> None:
    """Insert neutral layers, in the order given; several behind one node follow each other.

    Each inserted node is stamped `inserted` with a `Stamp`.

    Raises:
        PassError: If a layer has no neutral form.
    """
    tail: dict[str, fx.Node] = {}
    room = Room(insertions[0].into) if insertions else None
    for number, insertion in enumerate(insertions):
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
    passed, joins = not layer.branched, _joins(insertion)
    with module.graph.inserting_before(after.next):
        for node in _layer_nodes(insertion.template.module, layer):
            passed = passed or node.name == layer.merge
            known[node] = _copy_node(module, node, known, paths, insertion)
            known[node].meta["origin"] = ("deepen", (after.name,))
            stamp = Stamp(number, after.name, passed, joins)
            known[node].meta["inserted"] = stamp
    exit_node = known[originals[layer.nodes[-1]]]
    for reader in readers:
        reader.replace_input_with(after, exit_node)
    exit_node.meta["neutral_to"] = after.meta.get("neutral_to", after.name)
    for name, places in _neutralise(module, insertion, paths, room).items():
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
                raise _no_neutral_form(layer, "it reads the network's input beside its entry")
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


# --- neutral values -------------------------------------------------------------------------------


def _neutralise(
    module: fx.GraphModule, insertion: Insertion, paths: dict[str, str], room: Room
) -> dict[str, tuple[int, ...]]:
    """Make a layer neutral; return the node that silences it and which of its tensors are zero."""
    layer, template = insertion.layer, insertion.template
    nodes = {n.name: n for n in template.module.graph.nodes}
    tensors, zeroed = _Tensors(module, paths), {}
    if not layer.branched:
        _make_identity(insertion, tensors)
    elif _joins(insertion):
        _leave_unread(module, insertion, room)
    else:
        zeroed = _zero_branch(insertion, nodes, tensors)
    merge = layer.nodes.index(layer.merge)
    for node in (nodes[name] for name in layer.nodes[merge + (1 if layer.branched else 0) :]):
        if template.is_activation(node):
            _require_absorbed(insertion, node)
        elif template.is_norm(node):
            _neutral_norm(insertion, node, tensors)
    return zeroed


class _Tensors:
    """The parameters and buffers of an inserted layer, by the names they have in the template."""

    def __init__(self, module: fx.GraphModule, paths: dict[str, str]) -> None:
        self.all = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.paths = paths

    def __getitem__(self, name: str) -> Tensor:
        path = max((p for p in self.paths if name == p or name.startswith(p + ".")), key=len)
        return self.all[self.paths[path] + name[len(path) :]]

    def fill(self, name: str, value: float | Tensor) -> None:
        tensor = self[name]
        tensor.data.copy_(torch.as_tensor(value).expand_as(tensor))


def _make_identity(insertion: Insertion, tensors: _Tensors) -> None:
    layer, book = insertion.layer, insertion.template.book
    weights = book.weights[layer.merge]
    for name in book.tensors[layer.merge]:
        tensors.fill(name, 0.0)
    weight = tensors[weights[0]].data
    steps = [s for s in insertion.template.steps(layer.merge) if s[0] == "convolution"]
    if len(weights) != 1 or len(steps) > 1:
        raise _no_neutral_form(layer, "several contractions in one step")
    for _, kernel, stride, padding, dilation, _, transposed, _ in steps:
        centred = all(2 * p == d * (k - 1) for k, p, d in zip(kernel, padding, dilation))
        if transposed or set(stride) != {1} or not centred:
            raise _no_neutral_form(layer, "its convolution changes the size or is not centred")
    rows = torch.arange(weight.shape[0])
    if not steps and weight.shape[0] != weight.shape[1]:
        raise _no_neutral_form(layer, "its width changes")
    centre = tuple(k // 2 for k in weight.shape[2:])
    weight[(rows, rows % weight.shape[1], *centre)] = 1.0


def _joins(insertion: Insertion) -> bool:
    """Tell whether a layer ends in a join of its entry with what it computed."""
    layer, template = insertion.layer, insertion.template
    merge = next(n for n in template.module.graph.nodes if n.name == layer.merge)
    parts = template.inputs_of(merge)
    joins = {s[0] for s in template.steps(merge)} == {"cat"} and len(parts) > 1
    return layer.branched and joins and _is_skip(template, parts[0], layer.entry)


def _leave_unread(module: fx.GraphModule, insertion: Insertion, room: Room) -> None:
    layer, shapes = insertion.layer, insertion.template.book.shapes
    sizes = [(a, b) for a, b in zip(shapes[layer.entry], shapes[layer.merge]) if a != b]
    behind = layer.nodes[-1] == layer.merge
    if len(sizes) != 1 or not behind:
        raise _no_neutral_form(layer, "what it joins to its input is changed again behind the join")
    if not room.add(module, insertion.after, sizes[0][1] - sizes[0][0]):
        raise _no_neutral_form(layer, "it adds units to a stream that cannot be widened")


def _zero_branch(
    insertion: Insertion, nodes: dict[str, fx.Node], tensors: _Tensors
) -> dict[str, tuple[int, ...]]:
    """Zero the last parameters of the branch, so that the merge adds nothing to its skip."""
    layer, template = insertion.layer, insertion.template
    merge = nodes[layer.merge]
    adds = {s[1] for s in template.steps(merge) if len(s) > 1} == {"add"}
    branch = [n for n in template.inputs_of(merge) if not _is_skip(template, n, layer.entry)]
    if not adds or len(branch) != 1 or len(template.inputs_of(merge)) != 2:
        raise _no_neutral_form(layer, f"'{merge.name}' is not the sum of a branch and the entry")
    node = branch[0]
    while True:
        own = [x for x in _last_writer(template, node) if _trainable(tensors[x])]
        for name in own:
            tensors.fill(name, 0.0)
        before = template.inputs_of(node)
        if own:
            names = template.book.tensors[node.name]
            return {node.name: tuple(names.index(x) for x in own)}
        if not before or node.name == layer.entry:
            raise _no_neutral_form(layer, "its branch ends in nothing that can be set to zero")
        node = before[0]


def _last_writer(network: Network, node: fx.Node) -> list[str]:
    """Return the tensors of a node's last contraction, or all of a node that contracts nothing."""
    names = network.book.tensors.get(node.name, [])
    before = network.book.weights.get(node.name, [])[:-1]
    return names[names.index(before[-1]) + 1 :] if before else names


def _trainable(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _is_skip(network: Network, node: fx.Node, entry: str) -> bool:
    while node.name != entry and network.is_idle(node) and network.inputs_of(node):
        node = network.inputs_of(node)[0]
    return node.name == entry


def _neutral_norm(insertion: Insertion, node: fx.Node, tensors: _Tensors) -> None:
    roles = insertion.template.book.norms.get(node.name)
    if roles is None:
        raise _no_neutral_form(insertion.layer, f"norm '{node.name}' depends on its input")
    eps, affine = float(roles["eps"]), "weight" in roles
    tensors.fill(str(roles["running_mean"]), 0.0)
    tensors.fill(str(roles["running_var"]), 1.0 if affine else 1.0 - eps)
    if affine:
        tensors.fill(str(roles["weight"]), (1.0 + eps) ** 0.5)
        tensors.fill(str(roles["bias"]), 0.0)


def _require_absorbed(insertion: Insertion, node: fx.Node) -> None:
    """Refuse an activation that would change what the layer before it hands on."""
    into, source = insertion.into, None
    found = next(n for n in into.module.graph.nodes if n.name == insertion.after)
    while found is not None and source is None:
        if into.is_activation(found):
            source = found
        elif into.is_idle(found) or into.rules(found) <= {"spatial", "move"}:
            found = next(iter(into.inputs_of(found)), None)
        else:
            found = None
    device = next(insertion.template.module.parameters()).device
    values = torch.linspace(-12, 12, 6001, device=device).sinh()  # dense near zero, far out too
    if source is not None:
        once = _apply(into, source, values)
        if torch.equal(_apply(insertion.template, node, once), once):
            return
    raise _no_neutral_form(
        insertion.layer, f"activation '{node.name}' changes the values behind '{insertion.after}'"
    )


def _apply(network: Network, node: fx.Node, values: Tensor) -> Tensor:
    args = tuple(values if isinstance(a, fx.Node) else a for a in node.args)
    if node.op == "call_module":
        return network.module.get_submodule(str(node.target))(values.clone())
    if node.op == "call_method":
        return getattr(values.clone(), str(node.target))(*args[1:], **node.kwargs)
    return node.target(values.clone(), *args[1:], **node.kwargs)


def _no_neutral_form(layer: Layer, why: str) -> PassError:
    return PassError(
        f"a layer that has no neutral form: {why}",
        where=f"layer '{layer.name}'",
        expected="an identity layer before an absorbing activation, or a block around a skip",
        do="give an alignment in which this layer is matched, or fuse networks of equal depth here",
    )
