"""Bring networks to one structure: insert the layers that each lacks, then name all nodes alike.

A balancing is a function of networks, their alignment and the data. `deepen` is exact and needs no
data; the other one, which removes layers, is `Shorten`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .._progress import counted, part
from ..alignment.layers import describe, partition
from ..calibration.data import Calibration
from ..calibration.distance import relative_error_on
from ..errors import ArgumentError, PairingError
from ..graph.modes import Mode
from ..graph.state import hide, is_hidden, order_like, part_at
from ..graph.trace import run_once
from ..graph.verify import require_equal
from ..ir import Alignment, Layer, SegmentAlignment
from ..spaces.network import Network
from ._insert import AbsentLayer, insert_layers
from ._neutral import Insertion, changes_nothing


@dataclass(frozen=True, eq=False)
class Balanced:
    """Networks of one structure, node for node and name for name.

    Attributes:
        networks: The balanced networks.
        absent: Per network, the layers it lacks, which it has only as neutral ones.
        errors: Per network, the root mean square error of its outputs on the data, relative to
            its model's; zero where nothing was approximated.
        removed: Per network, the layers that it lost; empty if none did.
    """

    networks: tuple[Network, ...]
    absent: tuple[tuple[AbsentLayer, ...], ...]
    errors: tuple[float, ...]
    removed: tuple[frozenset[str], ...] = ()


Balancing = Callable[[Sequence[Network], Alignment, Calibration], Balanced]


@dataclass(frozen=True)
class Deepen:
    """Inserts the layers that networks lack as neutral ones, so that no function changes.

    Attributes:
        approximate: Insert a layer also where its activation changes what it passes on, as the
            published codes do (an identity and a ReLU in front of the first layer clip the inputs).
            `Balanced.errors` says by how much.
    """

    approximate: bool = False

    def __call__(
        self,
        networks: Sequence[Network],
        alignment: Alignment,
        data: Calibration | None = None,
    ) -> Balanced:
        """Balance networks.

        Args:
            networks: The networks; not modified.
            alignment: Which of their layers correspond.
            data: What the error of an approximation is measured on.

        Raises:
            ArgumentError: If the alignment is of other networks.
            PassError: If a layer has no neutral form.
            PairingError: If the structures differ outside of their layers.
            NotEquivalent: If a network's function changed.
        """
        depths = [sum(len(s.layers) for s in partition(n)) for n in networks]
        deepest = depths.index(max(depths))
        balanced = insert_missing_layers(networks, alignment, deepest, self.approximate)
        if not self.approximate or data is None:
            return balanced
        pairs = zip(networks, balanced.networks)
        return replace(balanced, errors=tuple(relative_error_on(data, a, b) for a, b in pairs))


deepen = Deepen()


def insert_missing_layers(
    networks: Sequence[Network],
    alignment: Alignment,
    skeleton: int,
    approximate: bool = False,
) -> Balanced:
    """Insert the layers that each network lacks, and give all networks one graph.

    Args:
        networks: The networks; not modified.
        alignment: Which of their layers correspond.
        skeleton: Index of the network whose graph and names all take.
        approximate: Whether inserted layers may change what they pass on.

    Raises:
        ArgumentError: If the alignment is of other networks.
        PassError: If a layer has no neutral form.
        PairingError: If the structures differ outside of their layers.
        NotEquivalent: If a network's function changed.
    """
    layers = [{x.name: x for s in partition(n) for x in s.layers} for n in networks]
    check_alignment(alignment, layers)
    deepened: list[tuple[fx.GraphModule, tuple[AbsentLayer, ...]]] = []
    with part(0.0, 0.4):
        for k, network in counted(list(enumerate(networks))):
            insertions = _insertions(k, networks, layers, alignment)
            deepened.append(insert_layers(network, insertions, approximate))
    base = networks[skeleton]
    with part(0.4, 0.5):
        shape = Network.of(base.name, deepened[skeleton][0], base.example)
    balanced, absent = [], []
    with part(0.5, 1.0):
        for network, (module, inserted) in counted(list(zip(networks, deepened))):
            adopted = shape if module is shape.module else adopt(network, module, shape)
            if not approximate:
                label = f"balancing {network.name}"
                require_equal(network.module, adopted.module, network.example, label)
            balanced.append(adopted)
            absent.append(_renamed(inserted, module, adopted.module))
    if approximate:  # as in the published codes, an identity layer is a layer like others
        absent = [tuple(x for x in inserted if x.inner) for inserted in absent]
    return Balanced(tuple(balanced), tuple(absent), (0.0,) * len(networks))


def _renamed(
    layers: Sequence[AbsentLayer], module: fx.GraphModule, adopted: fx.GraphModule
) -> tuple[AbsentLayer, ...]:
    """Return inserted layers by the names of the graph that the network has adopted."""
    pairs = list(zip(module.graph.nodes, adopted.graph.nodes))
    names = {old.name: new.name for old, new in pairs}
    used = [(old, new) for old, new in pairs if old.op in ("call_module", "get_attr")]
    paths = {str(old.target): str(new.target) for old, new in used if old.op == new.op}
    return tuple(layer.renamed(names, paths) for layer in layers)


# --- which layers go where --------------------------------------------------------------------


def check_alignment(alignment: Alignment, layers: Sequence[dict[str, Layer]]) -> None:
    """Refuse an alignment that does not name every layer of every network once, in order.

    Args:
        alignment: The alignment.
        layers: Per network, its layers by name, in order.

    Raises:
        ArgumentError: Saying which network's layers do not agree.
    """
    count = len(layers)
    for k, by_name in enumerate(layers):
        rows = [s.slots[k] for s in alignment.segments if len(s.slots) == count]
        aligned = [name for row in rows for name in row if name is not None]
        if len(alignment.names) != count or aligned != list(by_name):
            raise ArgumentError(
                f"an alignment of the layers {', '.join(map(str, aligned)) or 'of no network'}",
                where=f"the argument `alignment`, network {k}",
                expected=f"each layer once, in order: {', '.join(by_name)}",
                do="make it with fxfuse.align on these very models, in this order",
            )
    for segment in alignment.segments:
        for slot in zip(*segment.slots):
            _require_one_kind(slot, layers)


def _require_one_kind(slot: Sequence[str | None], layers: Sequence[dict[str, Layer]]) -> None:
    """Refuse a slot whose layers are of different kinds."""
    pairs = zip(slot, layers)
    kinds = dict.fromkeys(by_name[x].kind for x, by_name in pairs if x is not None)
    if len(kinds) > 1:
        raise ArgumentError(
            f"layers of different kinds in one slot: {', '.join(map(str, slot))}",
            where="the argument `alignment`",
            expected="layers of one kind, not " + " and ".join(kinds),
            do="start from what fxfuse.align finds, and move layers to slots of their kind",
        )


def _insertions(
    k: int, networks: Sequence[Network], layers: Sequence[dict[str, Layer]], alignment: Alignment
) -> list[Insertion]:
    """Return what network `k` lacks, segment by segment."""
    return [
        insertion
        for segment in alignment.segments
        for insertion in _insertions_in(segment, k, networks, layers)
    ]


def _insertions_in(
    segment: SegmentAlignment,
    k: int,
    networks: Sequence[Network],
    layers: Sequence[dict[str, Layer]],
) -> Iterator[Insertion]:
    """Yield what network `k` lacks in one segment, for each empty slot or run of them."""
    into, deep, row = networks[k], networks[segment.reference], segment.slots[k]
    wanted = [layers[segment.reference][str(x)] for x in segment.slots[segment.reference]]
    i = 0
    while i < len(row):
        if row[i] is not None:
            i += 1
            continue
        before = [layers[k][x] for x in reversed(row[:i]) if x is not None]
        behind = [layers[k][x] for x in row[i:] if x is not None]
        after = before[0].nodes[-1] if before else behind[0].entry
        end = next((j for j in range(i, len(row)) if row[j] is not None), len(row))
        run = _neutral_run(Insertion(deep, wanted[i], into, after), wanted[i:end])
        if run:
            yield Insertion(deep, _as_one_layer(run), into, after, run)
        else:
            template, layer = _template(into, [*before, *behind], deep, wanted[i], after)
            yield Insertion(template, layer, into, after)
        i += len(run) or 1


def _neutral_run(insertion: Insertion, missing: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return the first missing layers, if they can only be neutral together, else none.

    A layer whose activation would change its inputs is neutral only in a run that ends in a layer
    without an activation. An example is the widest layer of an inverted bottleneck.
    """
    nodes = [insertion.template.nodes[name] for name in missing[0].nodes]
    activations = [n for n in nodes if insertion.template.is_activation(n)]
    if missing[0].branched or all(changes_nothing(insertion, n) for n in activations):
        return ()
    ends = (i for i, layer in enumerate(missing) if layer.linear)
    return tuple(missing[: next(ends, -1) + 1])


def _as_one_layer(layers: Sequence[Layer]) -> Layer:
    return replace(
        layers[-1],
        name=f"{layers[0].name}..{layers[-1].name}",
        kind="; ".join(x.kind for x in layers),
        nodes=tuple(n for x in layers for n in x.nodes),
        entry=layers[0].entry,
        producers=tuple(n for x in layers for n in x.producers),
    )


def _template(
    network: Network, layers: Sequence[Layer], deep: Network, wanted: Layer, after: str
) -> tuple[Network, Layer]:
    """Return the layer to copy, and its network.

    A layer of the network itself needs no resizing, so one of the wanted kind is taken if there is
    any. Of several, that with the settings (dilation, rates) most like the wanted one's is taken,
    and of these the nearest.

    Args:
        network: The network that lacks the layer.
        layers: Its layers in this segment, the nearest first.
        deep: The network that has the layer.
        wanted: The layer there.
        after: Node of the first network behind which the layer goes.
    """
    shapes = network.shapes
    candidates = [
        layer
        for layer in layers
        if layer.kind == wanted.kind
        and shapes[layer.entry] == shapes[layer.nodes[-1]] == shapes[after]
    ]
    if not candidates:
        return deep, wanted
    settings = _settings(deep, wanted)
    differing = [sum(a != b for a, b in zip(_settings(network, x), settings)) for x in candidates]
    return network, candidates[differing.index(min(differing))]


def _settings(network: Network, layer: Layer) -> list[object]:
    """Return the literal arguments of a layer's nodes."""
    nodes = [n for n in network.module.graph.nodes if n.name in layer.nodes]
    arguments = [x for node in nodes for x in tree_leaves((node.args, node.kwargs))]
    return [x for x in arguments if not isinstance(x, fx.Node)]


# --- one graph for all ------------------------------------------------------------------------


def adopt(network: Network, module: fx.GraphModule, shape: Network) -> Network:
    """Give a network the graph and the names of another network of its structure.

    Args:
        network: The network; not modified.
        module: Its graph module as it is now.
        shape: The network whose graph and names it takes.

    Raises:
        PairingError: If the structures differ.
    """
    nodes, wanted = list(module.graph.nodes), list(shape.module.graph.nodes)
    members: dict[str, object] = {}  # modules and tensors by their new paths
    new_to_old: dict[str, str] = {}
    old_to_new: dict[str, str] = {}
    for i, (node, other) in enumerate(zip(nodes, wanted)):
        if other.op not in ("call_module", "get_attr"):
            continue
        new, old = str(other.target), str(node.target)
        if node.op != other.op:  # spelled as a function here: a module without weights will do
            members[new] = copy.deepcopy(part_at(shape.module, new))
            continue
        members[new] = part_at(module, old)
        used_alike = new_to_old.setdefault(new, old) == old
        used_alike &= old_to_new.setdefault(old, new) == new
        if not used_alike and not isinstance(members[new], Mode):
            raise _structures_differ(network, shape, i, node, other)
    if len(nodes) != len(wanted):
        i = next((i for i, (a, b) in enumerate(zip(nodes, wanted)) if a.op != b.op), 0)
        raise _structures_differ(network, shape, i, nodes[i], wanted[i])
    graph = copy.deepcopy(shape.module.graph)
    for node, copied in zip(nodes, graph.nodes):
        _copy_literals(node, copied)
    module = fx.GraphModule(members, graph, type(module).__name__).eval()
    order_like(module, shape.module)
    for path in members:
        if is_hidden(shape.module, path):
            hide(module, path)
    run_once(module, network.example, f"{network.name} with the graph of {shape.name}")
    adopted = Network.of(network.name, module, network.example)
    for i, (node, other) in enumerate(zip(module.graph.nodes, wanted)):
        if describe(adopted, node) != describe(shape, other):
            raise _structures_differ(network, shape, i, nodes[i], other)
    return adopted


def _copy_literals(node: fx.Node, into: fx.Node) -> None:
    """Copy the literal arguments of a node (sizes, rates), if both do the same."""
    if (node.op, len(node.args), [*node.kwargs]) != (into.op, len(into.args), [*into.kwargs]):
        return
    (leaves, layout), (other_leaves, other_layout) = (
        tree_flatten((n.args, n.kwargs), lambda x: isinstance(x, fx.Node)) for n in (node, into)
    )
    if (node.op == "call_module" or node.target == into.target) and layout == other_layout:
        mixed = [_literal(a, b) for a, b in zip(leaves, other_leaves)]
        into.args, into.kwargs = tree_unflatten(mixed, other_layout)


def _literal(argument: Any, other: Any) -> Any:
    """Return an argument if it and the other are literals, the other if not; also in slices."""
    if isinstance(argument, slice) and isinstance(other, slice):
        ends = (argument.start, argument.stop, argument.step), (other.start, other.stop, other.step)
        return slice(*(_literal(a, b) for a, b in zip(*ends)))
    return other if isinstance(argument, fx.Node) or isinstance(other, fx.Node) else argument


def _structures_differ(
    network: Network, shape: Network, at: int, node: fx.Node, other: fx.Node
) -> PairingError:
    return PairingError(
        "structures that differ outside of their aligned layers",
        where=f"node {at}: '{node.name}' of {network.name} against '{other.name}' of {shape.name}",
        expected="the same steps (pooling, flattening, dropout, shared modules) around the layers",
        do="fuse networks of one family, written in the same way",
    )
