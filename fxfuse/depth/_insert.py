"""Insert neutral layers into a network: copies of another network's layers, or of its own.

A copy has the width of the stream it is inserted on, and values that make it neutral (`_neutral`).
A block that joins new units to its input (a dense block) keeps its values instead: the stream
behind it gets more units, and nothing reads those.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .._progress import counted
from ..alignment.normal_form import given_nodes, unread_writers, writers_of
from ..errors import PassError
from ..graph.compare import same_chance
from ..graph.passes import graph_pass
from ..graph.state import (
    add_part,
    hide,
    is_hidden,
    part_at,
    replace_tensor,
    settle_sizes,
    tensor_at,
    tensors_of,
)
from ..spaces.network import OPEN, Network
from ._beside import shared_paths
from ._neutral import (
    Insertion,
    LayerCopy,
    NoNeutralForm,
    is_skip,
    make_neutral,
    no_neutral_form,
)

STAMP = "inserted"  # key of the meta of inserted nodes, until the pass has returned


@dataclass(frozen=True)
class AbsentLayer:
    """A layer that a network lacks and has only as a neutral one, which passes on what it reads.

    Attributes:
        nodes: Its nodes.
        entry: The node whose value it passes on.
        carriers: Those of its nodes that hold this value.
        joins: Whether it joins new units to the value, which nothing reads.
        whole: Whether it is a run of layers, of which only the last hands the value on.
        zeroed: Tensors that were set to zero so that a branch adds nothing. These values have a
            meaning, that the network adds nothing here; others in a neutral block have none.
        name: What it is called where it was copied from.
        passed: Why it is not neutral; empty if it is. A layer that is not neutral has to be passed
            by: its values mean nothing, and the network does not count there.
    """

    nodes: tuple[str, ...]
    entry: str
    carriers: tuple[str, ...]
    joins: bool = False
    whole: bool = False
    zeroed: frozenset[str] = frozenset()
    name: str = ""
    passed: str = ""

    @property
    def inner(self) -> frozenset[str]:
        """Nodes whose values have no meaning: in a branch that adds nothing, or inside a run."""
        return frozenset(self.nodes) - frozenset(self.carriers)

    @property
    def foreign(self) -> frozenset[str]:
        """Nodes whose parameters have no meaning."""
        return frozenset(self.nodes) if self.whole or self.passed else self.inner

    @property
    def mute(self) -> frozenset[str]:
        """Nodes at which the network does not count in the target of a contraction."""
        return frozenset(self.nodes) if self.passed else self.inner


def bypass_of(absent: Sequence[AbsentLayer]) -> dict[str, tuple[str, bool]]:
    """Return the nodes that need not run because their layers are absent, see `calibration.run`."""
    silent = [a for a in absent if not a.joins]  # what nobody reads must still have a shape
    return {n: (a.entry, n in a.carriers) for a in silent for n in a.nodes}


def insert_layers(
    network: Network,
    insertions: Sequence[Insertion],
    approximate: bool = False,
    pass_by: bool = False,
) -> tuple[fx.GraphModule, tuple[AbsentLayer, ...]]:
    """Insert neutral layers into a copy of a network.

    Args:
        network: The network; not modified.
        insertions: What to insert, in this order; several behind one node follow each other.
        approximate: Whether activations of the layers may change what they pass on.
        pass_by: Whether to insert layers that have no neutral form too, to be passed by.

    Returns:
        The copy, or the network's own module if there is nothing to insert; and the new layers.

    Raises:
        PassError: If a layer has no neutral form.
    """
    if not insertions:
        return network.module, ()
    insert = graph_pass(keeps_function=not (approximate or pass_by))(insert_neutral_layers)
    module = insert(network.module, network.example, network, insertions, approximate, pass_by)
    inserted: dict[AbsentLayer, None] = {}
    for node in module.graph.nodes:
        node.meta.pop("neutral_to", None)
        if STAMP in node.meta:
            inserted[node.meta.pop(STAMP)] = None
    return module, tuple(inserted)


def insert_neutral_layers(
    module: fx.GraphModule,
    network: Network,
    insertions: Sequence[Insertion],
    approximate: bool,
    pass_by: bool,
) -> None:
    """Insert layers and stamp each of their nodes with its `AbsentLayer`; the body of the pass."""
    last: dict[str, fx.Node] = {}  # by node: the end of what was inserted behind it
    copied: dict[str, dict[str, str]] = {}  # by template: where what its layers share has gone
    streams = Streams(network)
    for insertion in counted(insertions):
        template, layer = insertion.template, insertion.layer
        known = copied.setdefault(template.name, {})
        paths = {**known, **insertion.shared} if template is not network else {}
        choices = streams, approximate, pass_by
        last[insertion.after] = _insert(module, insertion, last, paths, *choices)
        known |= {path: paths[path] for path in shared_paths(template, layer) if path in paths}


def _insert(
    module: fx.GraphModule,
    insertion: Insertion,
    last: Mapping[str, fx.Node],
    paths: dict[str, str],
    streams: Streams,
    approximate: bool,
    pass_by: bool,
) -> fx.Node:
    """Insert one layer behind a node and what was inserted there; return its last node."""
    after, layer = _latest(module, last, insertion.after), insertion.layer
    copies = {insertion.template.nodes[layer.entry]: after}
    for read, value in insertion.beside.items():
        copies[insertion.template.nodes[read]] = _latest(module, last, value)
    width, templates = streams.width(insertion.after), _layer_nodes(insertion, copies)
    _compute_early(insertion, copies, after)
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    place = max(copies.values(), key=order.__getitem__)
    readers = [n for n in after.users if order[n] > order[place]]
    with module.graph.inserting_before(place.next):
        for node in templates:
            copies[node] = _copy_node(module, node, copies, paths, insertion, width)
            copies[node].meta["origin"] = ("deepen", (after.name,))
    end = copies[insertion.template.nodes[layer.nodes[-1]]]
    for reader in readers:
        reader.replace_input_with(after, end)
    end.meta["neutral_to"] = after.meta.get("neutral_to", after.name)
    joins, zeroed, why = _joins_units(insertion), frozenset[str](), ""
    if joins:
        _leave_unread(module, insertion, streams)
    else:
        try:
            zeroed = make_neutral(LayerCopy(insertion, width, module, paths), approximate)
        except NoNeutralForm as error:
            if not pass_by or not _may_be_passed_by(insertion):
                raise
            why = error.why
    given = given_nodes(insertion.template)
    templates = [node for node in templates if node not in given]
    names = [copies[node].name for node in templates]
    first = 0  # index of the first node that holds the value
    if why:
        first = names.index(end.name)
    elif layer.branched or insertion.parts:
        first = names.index(copies[insertion.template.nodes[layer.merge]].name)
    carriers = [n.name for n in templates[first:] if copies[n].users]
    carriers = of_form(insertion.template, layer.entry, carriers)
    stamp = AbsentLayer(
        nodes=tuple(names),
        entry=after.name,
        carriers=tuple(copies[insertion.template.nodes[name]].name for name in carriers),
        joins=joins,
        whole=bool(insertion.parts),
        zeroed=zeroed,
        name=layer.name,
        passed=why,
    )
    for node in templates:
        copies[node].meta[STAMP] = stamp
    return end


def of_form(network: Network, node: str, others: list[str]) -> list[str]:
    """Return those of some nodes that can hold a node's value as it is; all if none can.

    A layer may work on another form of what it reads, as on all positions of a batch as samples.
    """
    return [n for n in others if same_form(network, node, n)] or others


def same_form(network: Network, first: str, second: str) -> bool:
    """Tell whether two values have shapes that differ along one axis at most."""
    a, b = network.shapes[first], network.shapes.get(second, ())
    return len(a) == len(b) and sum(x != y for x, y in zip(a, b)) <= 1


def _compute_early(insertion: Insertion, copies: Mapping[fx.Node, fx.Node], after: fx.Node) -> None:
    """Move given values that a layer reads in front of everything that reads its entry."""
    given = given_nodes(insertion.template)
    needed = {value for node, value in copies.items() if node in given}
    waiting = list(needed)
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                waiting.append(node)
    at, behind = after, False
    for node in list(after.graph.nodes):
        if behind and node in needed and node.op != "placeholder":
            at.append(node)
            at = node
        behind = behind or node is after


def _latest(module: fx.GraphModule, last: Mapping[str, fx.Node], name: str) -> fx.Node:
    """Return a node of a network, or the end of what was inserted behind it."""
    node = last.get(name)
    return next(n for n in module.graph.nodes if n.name == name) if node is None else node


def _may_be_passed_by(insertion: Insertion) -> bool:
    """Tell whether a layer hands on a value of the form that it reads."""
    layer, shapes = insertion.layer, insertion.template.shapes
    return len(shapes[layer.entry]) == len(shapes[layer.nodes[-1]])


def _layer_nodes(insertion: Insertion, known: Collection[fx.Node]) -> list[fx.Node]:
    """Return a layer's nodes and what they read, parameters and sizes too, in graph order.

    Args:
        insertion: What is inserted where.
        known: Nodes of the template whose values the other network has.
    """
    layer, writers = insertion.layer, writers_of(insertion.template)
    needed = {insertion.template.nodes[name] for name in layer.nodes}
    waiting = list(needed)
    while waiting:
        node = waiting.pop()
        for other in (*node.all_input_nodes, *unread_writers(writers, node)):
            if other in needed or other in known:
                continue
            if other.op == "placeholder":
                raise no_neutral_form(layer.name, "it reads the network's input besides its entry")
            needed.add(other)
            waiting.append(other)
    return [n for n in insertion.template.nodes.values() if n in needed]


def _copy_node(
    module: fx.GraphModule,
    node: fx.Node,
    copies: Mapping[fx.Node, fx.Node],
    paths: dict[str, str],
    insertion: Insertion,
    width: int,
) -> fx.Node:
    """Copy a node of the template and the module or tensor it uses, once for all its nodes."""
    copied = module.graph.node_copy(node, lambda n: copies[n])
    if node.op in ("call_module", "get_attr"):
        path = str(node.target)
        if path not in paths:
            paths[path] = _free_path(module, path)
            add_part(module, paths[path], resized_copy(insertion, path, width))
            if is_hidden(insertion.template.module, path):
                hide(module, paths[path])
        copied.target = paths[path]
    return copied


def _free_path(module: fx.GraphModule, path: str) -> str:
    """Return a path like the given one that is not taken and lies inside no module of a node."""
    taken = {*dict(module.named_modules()), *tensors_of(module)}
    called = tuple(f"{n.target}." for n in module.graph.nodes if n.op == "call_module")
    free, n = path, 1
    while free in taken or free.startswith(called):
        free, n = f"{path.replace('.', '_')}_inserted{n}", n + 1
    return free


# --- copies at another width ------------------------------------------------------------------


def resized_copy(insertion: Insertion, path: str, width: int) -> nn.Module | Tensor:
    """Copy a module or tensor of the template at the target's width, freshly initialised.

    Axes of the stream that the layer reads and writes take the target's width; axes inside a block
    keep the template's, but for attention in one module, which has one width. Initial values
    neither depend on the global random state nor change it.

    Args:
        insertion: What is inserted where.
        path: Of the module or tensor in the template.
        width: Number of units of the stream in the target.
    """
    original = part_at(insertion.template.module, path)
    if isinstance(original, Tensor):
        return _resized(original, _shape(insertion, path, original, width))
    assert original is not None, f"nothing is called '{path}'"
    part = copy.deepcopy(original)
    conv = part if isinstance(part, nn.modules.conv._ConvNd) else None
    depthwise = conv is not None and conv.groups == conv.in_channels > 1
    one_width = isinstance(part, nn.MultiheadAttention)
    for name, tensor in tensors_of(part).items():
        shape = _shape(insertion, f"{path}.{name}", tensor, width, one_width)
        if shape != tuple(tensor.shape):
            replace_tensor(part, name, _resized(tensor, shape))
    if conv is not None and depthwise:
        conv.groups = conv.weight.shape[0]
    for module in part.modules():
        settle_sizes(module)
        if hasattr(module, "reset_parameters"):
            reset: Any = module.reset_parameters
            with same_chance():
                reset()
    return part


def _resized(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a copy of a tensor; one of another shape is filled with its mean."""
    data = tensor.detach()
    if shape != tuple(data.shape):
        data = data.double().mean().to(data.dtype).expand(shape)
    copied = data.clone()
    return nn.Parameter(copied) if isinstance(tensor, nn.Parameter) else copied


def _shape(
    insertion: Insertion, name: str, tensor: Tensor, width: int, one_width: bool = False
) -> tuple[int, ...]:
    """Return the shape of a template's tensor where the stream has another width.

    With `one_width`, axes inside the module that has it change as the stream does.
    """
    spaces, layer = insertion.template.spaces, insertion.layer
    ends = [layer.entry] if layer.branched else [layer.entry, layer.nodes[-1]]
    shape = list(tensor.shape)
    for space, axis in spaces.on(name):
        end = next((e for e in ends if any(f.tensor == e for f in space.features)), None)
        if end is None and one_width and not space.features:
            end = layer.entry
        if end is None:
            continue
        size, old = spaces.sizes[name, axis.dim], _width(insertion.template, end)
        if axis.groups == 1:
            shape[axis.dim] = size * width // old
        elif size != axis.groups and width != old:  # a depthwise one keeps one input per row
            raise PassError(
                f"a grouped convolution on a stream of {old} units, to be rebuilt for {width}",
                where=f"'{name}' of layer '{layer.name}'",
                expected="equal widths where a grouped convolution works on the stream itself",
                do="fuse networks of equal width at this stage",
            )
    return tuple(shape)


def _width(network: Network, node: str) -> int:
    """Return the number of units of a value; of one without units, the size of the usual axis."""
    shape, axes = network.shapes[node], network.features.get(node)
    return shape[axes[0]] if axes else _usual_width(shape)


def _usual_width(shape: tuple[int, ...]) -> int:
    """Return the size of the axis along which values of a rank usually have their units."""
    return shape[1 if len(shape) in (2, 4, 5) else -1]


# --- streams that get more units --------------------------------------------------------------

Place = tuple[str, int]  # a tensor or a node, and an axis of it


class Streams:
    """The streams of a network that is being edited, and how many units they have gained.

    Args:
        network: The network as it was analysed, before any edit.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._units = _units_by_place(network)
        self._added: dict[Place, list[tuple[int, int]]] = {}  # position before any edit, count

    def width(self, node: str) -> int:
        """Return how many units the stream behind a node has now."""
        place = self._stream(node)
        if place is None:
            return _usual_width(self.network.shapes[node])
        return len(self._units[place]) + sum(count for _, count in self._added.get(place, ()))

    def widen(self, module: fx.GraphModule, node: str, count: int) -> bool:
        """Add units to a node's stream, in all tensors behind the node; False if it cannot be.

        Contractions read the new units with zeros. Norms treat them like an average unit.

        Args:
            module: The network under edit.
            node: The node whose value gets more units, behind those it has.
            count: How many.
        """
        place = self._stream(node)
        if place is None or (self._units[place] < 0).any():
            return False
        stream = self._units[place]
        if self._is_returned(node, stream):
            return False
        self._added.setdefault(place, []).append((len(stream), count))
        for name in self._behind(node):
            for other in (p for p in self._units if p[0] == name):
                start = _start_of(stream, self._units[other])
                if start is None:
                    continue
                end, added = start + len(stream), self._added.setdefault(other, [])
                position = end + sum(n for p, n in added if p <= end)
                added.append((end, count))
                if name in self.network.features:
                    continue
                reads = any(axis.reads for _, axis in self.network.spaces.places[other])
                _widen(module, other, position, count, reads)
        return True

    def _is_returned(self, node: str, stream: np.ndarray) -> bool:
        """Tell whether the network is cut at a value that holds the stream."""
        output = self.network.module.graph.output_node()
        returned = {n.name for n in output.all_input_nodes} & {node, *self._behind(node)}
        units = [units for place, units in self._units.items() if place[0] in returned]
        return OPEN in output.meta and any(_start_of(stream, u) is not None for u in units)

    def _stream(self, node: str) -> Place | None:
        return next((p for p in self._units if p[0] == node), None)

    def _behind(self, node: str) -> list[str]:
        """Return the nodes behind a node, and the parameters and buffers they use."""
        names: dict[str, None] = {}
        waiting = [self.network.nodes[node]]
        while waiting:
            for user in waiting.pop().users:
                if user.name not in names:
                    names[user.name] = None
                    names |= dict.fromkeys(self.network.tensors.get(user.name, ()))
                    waiting.append(user)
        return list(names)


def _units_by_place(network: Network) -> dict[Place, np.ndarray]:
    """Return, per axis, the number of the unit at each position; -1 where none can move."""
    sizes = dict(network.spaces.sizes)
    units: dict[Place, np.ndarray] = {}
    start = 0
    for space in network.spaces:
        for axis in (*space.features, *space.axes):
            place = axis.tensor, axis.dim
            if axis.groups == 1:
                size = sizes.get(place) or network.shapes[axis.tensor][axis.dim]
                numbers = np.repeat(start + np.arange(space.size), axis.index.shape[1])
                units.setdefault(place, np.full(size, -1))[axis.index.reshape(-1)] = numbers
        start += space.size
    return units


def _start_of(run: np.ndarray, units: np.ndarray) -> int | None:
    """Return where a run of units first begins."""
    for start in np.flatnonzero(units[: len(units) - len(run) + 1] == run[0]):
        if np.array_equal(units[start : start + len(run)], run):
            return int(start)
    return None


def _widen(module: fx.GraphModule, place: Place, at: int, count: int, reads: bool) -> None:
    """Insert positions into an axis of a tensor: zeros if they are read, else the mean."""
    name, dim = place
    data = tensor_at(module, name).detach()
    head, tail = data.narrow(dim, 0, at), data.narrow(dim, at, data.shape[dim] - at)
    shape = [count if d == dim else n for d, n in enumerate(data.shape)]
    new = torch.zeros(shape, dtype=data.dtype, device=data.device)
    if not reads:
        new += data.mean(dim, keepdim=True)
    replace_tensor(module, name, torch.cat([head, new, tail], dim))


def _joins_units(insertion: Insertion) -> bool:
    """Tell whether a layer ends by joining new units to its input."""
    layer, template = insertion.layer, insertion.template
    if insertion.parts or not layer.branched:
        return False
    merge = insertion.template.nodes[layer.merge]
    parts, joins = template.inputs_of(merge), template.joins(merge)
    return joins and len(parts) > 1 and is_skip(template, parts[0], layer.entry)


def _leave_unread(module: fx.GraphModule, insertion: Insertion, streams: Streams) -> None:
    """Widen the stream behind a layer that joins new units to it, so that nothing reads them."""
    layer, shapes = insertion.layer, insertion.template.shapes
    sizes = [(a, b) for a, b in zip(shapes[layer.entry], shapes[layer.merge]) if a != b]
    if len(sizes) != 1 or layer.nodes[-1] != layer.merge:
        raise no_neutral_form(layer.name, "it changes its units again behind the join")
    if not streams.widen(module, insertion.after, sizes[0][1] - sizes[0][0]):
        raise no_neutral_form(layer.name, "it adds units to a stream that cannot be widened")
