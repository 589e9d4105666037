"""Give networks of one structure one graph: node for node and name for name.

Depth rewrites: give a network the layers it lacks without changing its function.

An inserted layer is a copy of the other network's layer at this network's width, made neutral
(`neutral`), or of a layer of this network's own.

Bring networks to one structure: deepen each where it lacks layers, then name all nodes alike.

A balancing is a function of networks, their alignment and the data. `deepen` is exact and looks at
no data; the other one, which removes layers, is `shortening.Shorten`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .._progress import counted, part
from ..alignment.layers import describe, partition
from ..calibration.data import Calibration
from ..calibration.run import relative_error_on
from ..errors import ArgumentError, PairingError
from ..graph._modes import Mode
from ..graph.passes import graph_pass
from ..graph.state import add_part, hide, is_hidden, part_at, tensors_of
from ..graph.trace import run_once
from ..graph.verify import require_equal
from ..ir import Alignment, Layer
from ..spaces.network import Network
from ._neutral import Insertion, Room, absorbed, joins, neutralise, no_neutral_form, resized_copy


def adopt(network: Network, module: fx.GraphModule, shape: Network) -> Network:
    """Give a network the graph and names of another of the same structure.

    Raises:
        PairingError: If the structures differ.
    """
    nodes, wanted = list(module.graph.nodes), list(shape.module.graph.nodes)
    root: dict[str, object] = {}
    origin: dict[str, str] = {}
    serves: dict[str, str] = {}
    for i, (own, other) in enumerate(zip(nodes, wanted)):
        if other.op not in ("call_module", "get_attr"):
            continue
        target = str(other.target)
        if own.op == other.op:
            root[target] = part_at(module, str(own.target))
            alike = origin.setdefault(target, str(own.target)) == str(own.target)
            alike &= serves.setdefault(str(own.target), target) == target
            if not alike and not isinstance(root[target], Mode):
                raise _differs(network, shape, i, own, other)
        else:  # the same step spelled as a function: a module without weights serves as well
            root[target] = copy.deepcopy(part_at(shape.module, target))
    if len(nodes) != len(wanted):
        i = next((i for i, (a, b) in enumerate(zip(nodes, wanted)) if a.op != b.op), 0)
        raise _differs(network, shape, i, nodes[i], wanted[i])
    graph = copy.deepcopy(shape.module.graph)
    for own, node in zip(nodes, graph.nodes):
        _take_settings(own, node)
    module = fx.GraphModule(root, graph, type(module).__name__).eval()
    for target in root:
        if is_hidden(shape.module, target):
            hide(module, target)
    run_once(module, network.example, f"{network.name} with the graph of {shape.name}")
    adopted = Network.of(network.name, module, network.example)
    for i, (own, other) in enumerate(zip(module.graph.nodes, wanted)):
        if describe(adopted, own) != describe(shape, other):
            raise _differs(network, shape, i, nodes[i], other)
    return adopted


def _take_settings(own: fx.Node, node: fx.Node) -> None:
    """Give a node the literal arguments (sizes, rates) of the node it stands for."""
    if (own.op, len(own.args), [*own.kwargs]) == (node.op, len(node.args), [*node.kwargs]):
        alike = own.op == "call_module" or own.target == node.target
        pair = [
            tree_flatten((n.args, n.kwargs), lambda x: isinstance(x, fx.Node)) for n in (own, node)
        ]
        (mine, layout), (theirs, other) = pair
        if alike and layout == other:
            leaves = [_setting(a, b) for a, b in zip(mine, theirs)]
            node.args, node.kwargs = tree_unflatten(leaves, other)


def _setting(own: Any, known: Any) -> Any:
    """Return an argument with the literals of one and the nodes of another, also in slices."""
    if isinstance(own, slice) and isinstance(known, slice):
        ends = zip((own.start, own.stop, own.step), (known.start, known.stop, known.step))
        return slice(*(_setting(a, b) for a, b in ends))
    return known if isinstance(own, fx.Node) or isinstance(known, fx.Node) else own


def _differs(
    network: Network, shape: Network, at: int, own: fx.Node, other: fx.Node
) -> PairingError:
    return PairingError(
        "structures that differ beside their aligned layers",
        where=f"node {at}: '{own.name}' of {network.name} against '{other.name}' of {shape.name}",
        expected="the same steps (pooling, flattening, dropout, shared modules) around the layers",
        do="fuse networks of one family, written in the same way",
    )


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
def insert_layers(module: fx.GraphModule, insertions: Sequence[Insertion]) -> None:
    """Insert neutral layers, in the order given; several behind one node follow each other.

    Each inserted node is stamped `inserted` with a `Stamp`.

    Raises:
        PassError: If a layer has no neutral form.
    """
    _insert_all(module, insertions)


@graph_pass(keeps_function=False)
def insert_roughly(module: fx.GraphModule, insertions: Sequence[Insertion]) -> None:
    """Insert layers as `deepen` does, some of which change what they hand on.

    Raises:
        PassError: If a layer has no neutral form for any other reason.
    """
    _insert_all(module, insertions)


def _insert_all(module: fx.GraphModule, insertions: Sequence[Insertion]) -> None:
    tail: dict[str, fx.Node] = {}
    if not insertions:
        return
    room = Room(insertions[0].into)
    for number, insertion in enumerate(counted(insertions)):
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
            add_part(module, paths[path], resized_copy(insertion, path))
        copied.target = paths[path]
    return copied


def _free_path(module: fx.GraphModule, path: str) -> str:
    taken = {*dict(module.named_modules()), *tensors_of(module)}
    called = tuple(f"{n.target}." for n in module.graph.nodes if n.op == "call_module")
    free, n = path, 1
    while free in taken or free.startswith(called):
        free, n = f"{path.replace('.', '_')}_inserted{n}", n + 1
    return free


@dataclass(frozen=True)
class Absent:
    """A layer that a balanced network has only as a neutral one.

    Attributes:
        nodes: Its nodes.
        entry: The node whose value it hands on.
        carriers: The nodes among them that hold this value.
        joins: Whether it adds units beside this value, which nobody reads.
        whole: Whether it is a run of layers that hands on its input only as a whole.
        zeroed: The tensors that were set to zero to silence it: unlike the others, which are of
            no meaning, these say that the network adds nothing here.
    """

    nodes: tuple[str, ...]
    entry: str
    carriers: tuple[str, ...]
    joins: bool = False
    whole: bool = False
    zeroed: frozenset[str] = frozenset()

    @property
    def inner(self) -> frozenset[str]:
        """Nodes whose values mean nothing: of a branch that writes nothing, or inside a run."""
        return frozenset(self.nodes) - frozenset(self.carriers)

    @property
    def foreign(self) -> frozenset[str]:
        """Nodes whose parameters mean nothing."""
        return frozenset(self.nodes) if self.whole else self.inner


@dataclass(frozen=True, eq=False)
class Balanced:
    """Networks of one structure, node for node and name for name.

    Attributes:
        networks: The balanced networks.
        absent: Per network, the layers it has only as neutral ones.
        errors: Per network, the root mean square error of its outputs on the data, relative to
            its model's; zero where nothing was approximated.
        removed: Per network, the layers that it lost; empty if none did.
    """

    networks: tuple[Network, ...]
    absent: tuple[tuple[Absent, ...], ...]
    errors: tuple[float, ...]
    removed: tuple[frozenset[str], ...] = ()


Balancing = Callable[[Sequence[Network], Alignment, Calibration], Balanced]


@dataclass(frozen=True)
class Deepen:
    """Inserts the layers that networks lack as neutral ones: no function changes.

    Attributes:
        approximate: Insert a layer also where its activation changes what it hands on, as the
            published codes do (an identity and a ReLU in front of the first layer clip the inputs);
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
            networks: The networks.
            alignment: Which of their layers correspond.
            data: What the error of an approximation is measured on.

        Raises:
            ArgumentError: If the alignment is of other networks.
            PassError: If a layer has no neutral form.
            PairingError: If the structures differ beside their layers.
            NotEquivalent: If a network's function changed.
        """
        counts = [sum(len(s.layers) for s in partition(n)) for n in networks]
        deepest = counts.index(max(counts))
        balanced = unify(networks, alignment, deepest, self.approximate)
        if not self.approximate or data is None:
            return balanced
        pairs = zip(networks, balanced.networks)
        return replace(balanced, errors=tuple(relative_error_on(data, a, b) for a, b in pairs))


deepen = Deepen()


def unify(
    networks: Sequence[Network],
    alignment: Alignment,
    skeleton: int,
    approximate: bool = False,
) -> Balanced:
    """Insert neutral layers as an alignment says and give all networks one structure.

    Args:
        networks: The networks.
        alignment: Which of their layers correspond.
        skeleton: Index of the network whose names and graph all take.
        approximate: Whether inserted layers may change what they hand on.

    Raises:
        ArgumentError: If the alignment is of other networks.
        PassError: If a layer has no neutral form.
        PairingError: If the structures differ beside their layers.
        NotEquivalent: If a network's function changed.
    """
    layers = [{x.name: x for s in partition(n) for x in s.layers} for n in networks]
    check_alignment(alignment, layers)
    deepened = []
    with part(0.0, 0.4):
        for k, network in counted(list(enumerate(networks))):
            wanted = _insertions(k, networks, layers, alignment)
            module = network.module
            if wanted:
                insert = insert_roughly if approximate else insert_layers
                wanted = [replace(w, approximate=approximate) for w in wanted]
                module = insert(module, network.example, wanted)
            deepened.append(module)
    own = networks[skeleton]
    with part(0.4, 0.5):
        shape = Network.of(own.name, deepened[skeleton], own.example)
    balanced, absent = [], []
    with part(0.5, 1.0):
        for network, module in counted(list(zip(networks, deepened))):
            adopted = shape if module is shape.module else adopt(network, module, shape)
            if not approximate:
                label = f"balancing {network.name}"
                require_equal(network.module, adopted.module, network.example, label)
            balanced.append(adopted)
            gone = _absent(module, adopted)
            absent.append(tuple(a for a in gone if a.inner) if approximate else gone)
    return Balanced(tuple(balanced), tuple(absent), (0.0,) * len(networks))


def check_alignment(alignment: Alignment, layers: Sequence[dict[str, Layer]]) -> None:
    """Refuse an alignment that does not name every layer of every network once, in order.

    Raises:
        ArgumentError: Saying which network's layers do not agree.
    """
    count = len(layers)
    for k, known in enumerate(layers):
        rows = [s.slots[k] for s in alignment.segments if len(s.slots) == count]
        named = [x for row in rows for x in row if x is not None]
        if len(alignment.names) != count or named != list(known):
            raise ArgumentError(
                f"an alignment of the layers {', '.join(map(str, named)) or 'of no network'}",
                where=f"the argument `alignment`, network {k}",
                expected=f"each layer once, in order: {', '.join(known)}",
                do="make it with fxfuse.align on these very models, in this order",
            )
    for segment in alignment.segments:
        for row in zip(*segment.slots):
            _require_one_kind(row, layers)


def _require_one_kind(row: Sequence[str | None], layers: Sequence[dict[str, Layer]]) -> None:
    """Refuse a slot whose layers are not alike."""
    kinds = {x: known[x].kind for x, known in zip(row, layers) if x is not None}
    if len(set(kinds.values())) > 1:
        raise ArgumentError(
            f"layers of different kinds in one slot: {', '.join(map(str, row))}",
            where="the argument `alignment`",
            expected="layers of one kind, not " + " and ".join(dict.fromkeys(kinds.values())),
            do="start from what fxfuse.align finds, and move layers to slots of their kind",
        )


def _insertions(
    k: int, networks: Sequence[Network], layers: Sequence[dict[str, Layer]], alignment: Alignment
) -> list[Insertion]:
    found = []
    for segment in alignment.segments:
        own, deep = segment.slots[k], networks[segment.reference]
        slots = segment.slots[segment.reference]
        wanted = [layers[segment.reference][str(n)] for n in slots]
        i = 0
        while i < len(own):
            if own[i] is not None:
                i += 1
                continue
            before = [layers[k][n] for n in reversed(own[:i]) if n is not None]
            behind = [layers[k][n] for n in own[i:] if n is not None]
            after = before[0].nodes[-1] if before else behind[0].entry
            known = [*before, *behind]
            template, layer = _template(networks[k], known, deep, wanted[i], after)
            insertion = Insertion(template, layer, networks[k], after)
            run = wanted[i : next((j for j in range(i, len(own)) if own[j]), len(own))]
            parts = _carrying(Insertion(deep, run[0], networks[k], after), run)
            if parts:
                insertion = Insertion(deep, _joined(parts), networks[k], after, parts)
            found.append(insertion)
            i += len(parts) or 1
    return found


def _carrying(insertion: Insertion, run: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return the first layers of a run that are neutral only together, if they can be.

    A layer whose activation changes what it gets is neutral in a run that ends in a layer without
    an activation (as the widest part of an inverted bottleneck does).
    """
    nodes = [n for n in insertion.template.module.graph.nodes if n.name in run[0].nodes]
    acts = [n for n in nodes if insertion.template.is_activation(n)]
    if run[0].branched or all(absorbed(insertion, n) for n in acts):
        return ()
    ends = (i for i, x in enumerate(run) if x.linear)
    return tuple(run[: next(ends, -1) + 1])


def _joined(layers: Sequence[Layer]) -> Layer:
    """Return several layers as one step."""
    return replace(
        layers[-1],
        name=f"{layers[0].name}..{layers[-1].name}",
        kind="; ".join(x.kind for x in layers),
        nodes=tuple(n for x in layers for n in x.nodes),
        entry=layers[0].entry,
        producers=tuple(n for x in layers for n in x.producers),
    )


def _template(
    network: Network, known: Sequence[Layer], deep: Network, wanted: Layer, after: str
) -> tuple[Network, Layer]:
    """Return a layer of the wanted kind and its network, at best one of the network's own.

    A layer of its own needs no resizing; the one whose settings are most like the wanted one's is
    taken, then the nearest.
    """
    shape = network.book.shapes[after]
    fits = [
        layer
        for layer in known
        if layer.kind == wanted.kind
        and network.book.shapes[layer.entry] == network.book.shapes[layer.nodes[-1]] == shape
    ]
    if not fits:
        return deep, wanted
    settings = _settings(deep, wanted)
    differing = [sum(a != b for a, b in zip(_settings(network, x), settings)) for x in fits]
    return network, fits[differing.index(min(differing))]


def _settings(network: Network, layer: Layer) -> list[object]:
    """Return the literal arguments of a layer's steps."""
    nodes = [n for n in network.module.graph.nodes if n.name in layer.nodes]
    found = []
    for node in nodes:
        found += [x for x in tree_leaves((node.args, node.kwargs)) if not isinstance(x, fx.Node)]
    return found


def _absent(module: fx.GraphModule, adopted: Network) -> tuple[Absent, ...]:
    """Read the stamps of a deepened graph, in the names of the graph it was given."""
    names = {a.name: b.name for a, b in zip(module.graph.nodes, adopted.module.graph.nodes)}
    stamps = {n.name: n.meta["inserted"] for n in module.graph.nodes if "inserted" in n.meta}
    found = []
    for number in sorted({s.number for s in stamps.values()}):
        here = {names[n]: s for n, s in stamps.items() if s.number == number}
        first = next(iter(here.values()))
        zeroed = {adopted.book.tensors[n][i] for n, s in here.items() for i in s.zeroed}
        carriers = tuple(n for n, s in here.items() if s.carries)
        found.append(
            Absent(
                tuple(here),
                names[first.after],
                carriers,
                first.joins,
                first.whole,
                frozenset(zeroed),
            )
        )
    return tuple(found)
