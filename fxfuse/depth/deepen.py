"""Bring networks to one structure: insert the layers that each lacks, then name all nodes alike.

A balancing is a function of networks, their alignment and the data. `deepen` is exact and needs no
data; the other one, which removes layers, is `Shorten`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import fx
from torch.utils._pytree import tree_leaves

from .._progress import counted, part
from ..alignment.pairing import layers_paired
from ..calibration.data import Calibration
from ..calibration.distance import relative_error_on
from ..calibration.run import run_past, working_batch
from ..errors import ArgumentError, FuseError, NotEquivalent, PassError
from ..graph.compare import TOLERANCE, relative_error
from ..graph.trace import run_once
from ..graph.verify import require_equal
from ..ir import Alignment, Layer, SegmentAlignment
from ..spaces.network import Network
from ._adopt import adopt, with_room_for_biases
from ._beside import SharedValues, reads_a_table, shared_paths
from ._insert import AbsentLayer, bypass_of, insert_layers
from ._nearly_neutral import make_nearly_neutral
from ._neutral import Insertion, NoNeutralForm, changes_nothing, no_neutral_form


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

    A layer that has no neutral form is inserted all the same, and is passed by when its network
    runs: only the others count there. `made_neutral` makes it nearly neutral.

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
            PassError: If a layer can be neither neutral nor passed by.
            PairingError: If the structures differ outside of their layers.
            NotEquivalent: If a network's function changed.
        """
        rows = [s.slots for s in alignment.segments if len(s.slots) == len(networks)]
        depths = [
            sum(name is not None for slots in rows for name in slots[k])
            for k in range(len(networks))
        ]
        deepest = depths.index(max(depths))
        balanced = insert_missing_layers(networks, alignment, deepest, self.approximate)
        if not self.approximate or data is None:
            return balanced
        errors = []
        for network, other, absent in zip(networks, balanced.networks, balanced.absent):
            passed = bypass_of([x for x in absent if x.passed])
            errors.append(relative_error_on(data, network, other, passed))
        return replace(balanced, errors=tuple(errors))


deepen = Deepen()


def made_neutral(balanced: Balanced, data: Calibration | None = None) -> Balanced:
    """Return networks whose layers that were to be passed by compute next to nothing instead.

    Args:
        balanced: Networks of one structure; not modified.
        data: Inputs on which they have to; if not given, those that they were analysed on.

    Raises:
        PassError: If a layer has no form that is near enough.
    """
    try:
        pairs = zip(balanced.networks, balanced.absent)
        networks = [_made_neutral(network, absent, data) for network, absent in pairs]
    except NoNeutralForm as error:
        raise error.for_balancing_only() from error
    all_absent = (tuple(replace(x, passed="") for x in of_one) for of_one in balanced.absent)
    return replace(balanced, networks=tuple(networks), absent=tuple(all_absent))


def made_whole(balanced: Balanced, k: int, data: Calibration) -> Balanced:
    """Return networks of which one has the layers that it was to pass by, as neutral ones.

    Where it has all the weight, nobody else has a say about the layers that it lacks.

    Args:
        balanced: Networks of one structure; not modified. Returned as they are if the network
            passes by none, or one that has no form that is near enough.
        k: Index of the network.
        data: Inputs on which the layers have to be neutral.
    """
    networks, absent = [*balanced.networks], [*balanced.absent]
    if not any(layer.passed for layer in absent[k]):
        return balanced
    try:
        networks[k], absent[k] = _made_neutral(networks[k], absent[k], data), ()
    except PassError:
        return balanced
    return replace(balanced, networks=tuple(networks), absent=tuple(absent))


def _made_neutral(
    network: Network, absent: tuple[AbsentLayer, ...], data: Calibration | None
) -> Network:
    neutral = make_nearly_neutral(network, absent)
    passed = [x for x in absent if x.passed]
    examples = [network.example] if data is None else data.chunks(working_batch([network]))
    for batch in examples if passed else ():
        wanted = run_past(network, batch, bypass_of(passed))
        if relative_error(wanted, run_past(neutral, batch, {})) > TOLERANCE:
            raise no_neutral_form(passed[0].name, passed[0].passed)
    return neutral


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
    layers = layers_paired(networks, alignment)
    check_alignment(alignment, layers)
    values = SharedValues(networks, layers, alignment)
    deepened: list[tuple[fx.GraphModule, tuple[AbsentLayer, ...]]] = []
    with part(0.0, 0.4):
        for k, network in counted(list(enumerate(networks))):
            insertions = _insertions(k, networks, layers, alignment, values)
            deepened.append(insert_layers(network, insertions, approximate, pass_by=True))
    with part(0.4, 0.6):
        whole = [
            n if m is n.module else _analysed(n, m)
            for n, (m, _) in counted(list(zip(networks, deepened)))
        ]
        others = [n for n in whole if n is not whole[skeleton]]
        shape = with_room_for_biases(whole[skeleton], others)
    balanced, absent = [], []
    with part(0.6, 1.0):
        jobs = list(zip(networks, whole, deepened))
        for network, given, (_, inserted) in counted(jobs):
            adopted, layers_there = shape, inserted
            if given is not whole[skeleton]:
                adopted, layers_there = adopt(given, shape, inserted)
            if not approximate:
                _require_equal(network, adopted, layers_there)
            balanced.append(adopted)
            absent.append(layers_there)
    if approximate:  # as in the published codes, an identity layer is a layer like others
        absent = [tuple(x for x in there if x.inner or x.passed) for there in absent]
    return Balanced(tuple(balanced), tuple(absent), (0.0,) * len(networks))


def _analysed(network: Network, deepened: fx.GraphModule) -> Network:
    """Return a network that layers were inserted into, which has to run."""
    try:
        return Network.of(network.name, deepened, network.example)
    except FuseError:
        raise
    except Exception as error:
        raise PassError(
            f"layers that do not run where they are missing: {str(error).splitlines()[0]}",
            where=network.name,
            expected="layers that hand on a value of the form that they read",
            do="let the other networks count in targets only: fuse(..., across=True)",
        ) from error


def _require_equal(network: Network, adopted: Network, absent: Sequence[AbsentLayer]) -> None:
    """Compare a network with what it has become, where layers that do something are passed by."""
    passed = [layer for layer in absent if layer.passed]
    for layer in passed:
        if adopted.shapes[layer.entry] != adopted.shapes[layer.carriers[-1]]:
            raise no_neutral_form(layer.name, "what it hands on is of another shape")
    label = f"balancing {network.name}"
    if not passed:
        require_equal(network.module, adopted.module, network.example, label)
        return
    outputs = run_past(adopted, network.example, bypass_of(passed))
    error = relative_error(run_once(network.module, network.example, label), outputs)
    if error > TOLERANCE:
        raise NotEquivalent(
            f"outputs that differ by {error:.2e} relative",
            where=f"{label}; passing by {', '.join(x.name for x in passed)}",
            expected=f"at most {TOLERANCE:.0e}",
            do="report it with the two networks; your models were not changed",
        )


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
    k: int,
    networks: Sequence[Network],
    layers: Sequence[dict[str, Layer]],
    alignment: Alignment,
    values: SharedValues,
) -> list[Insertion]:
    """Return what network `k` lacks, segment by segment."""
    return [
        insertion
        for segment in alignment.segments
        for insertion in _insertions_in(segment, k, networks, layers, values)
    ]


def _insertions_in(
    segment: SegmentAlignment,
    k: int,
    networks: Sequence[Network],
    layers: Sequence[dict[str, Layer]],
    values: SharedValues,
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
        if before:
            above = next(j for j in reversed(range(i)) if row[j] is not None)
            after = _behind_alike(deep, wanted[above : i + 1], into, after)
        end = next((j for j in range(i, len(row)) if row[j] is not None), len(row))
        run = _neutral_run(Insertion(deep, wanted[i], into, after), wanted[i:end])
        if run:
            joined = _as_one_layer(run)
            beside = values.beside(joined, segment.reference, k)
            yield Insertion(deep, joined, into, after, run, beside)
        else:
            template, layer = _template(into, [*before, *behind], deep, wanted[i], after)
            of = segment.reference if template is deep else k
            facts = values.beside(layer, of, k), values.shared(layer, of, k)
            yield Insertion(template, layer, into, after, (), *facts)
        i += len(run) or 1


def _behind_alike(deep: Network, layers: Sequence[Layer], into: Network, end: str) -> str:
    """Return the node behind which a missing layer goes, past steps that belong to no layer.

    Args:
        deep: The network that has the layer.
        layers: There, the last layer that both have, those missing behind it, and the layer.
        into: The network that lacks it.
        end: The end of the last layer that both have.
    """
    node = into.nodes[end]
    for above, below in pairwise(layers):
        for step in _steps_between(deep, above.nodes[-1], below.entry):
            alike = [n for n in _readers(into, node) if into.form(n) == deep.form(step)]
            if len(alike) != 1:
                return end
            node = alike[0]
    return node.name


def _steps_between(network: Network, first: str, last: str) -> list[fx.Node]:
    """Return the nodes that do something on the way from a node, left out, to another."""
    made = {network.nodes[first]}
    for node in network.module.graph.nodes:
        if not made.isdisjoint(node.all_input_nodes):
            made.add(node)
    read, waiting = set[fx.Node](), [network.nodes[last]]
    while waiting:
        node = waiting.pop()
        if node.name != first and node in made:
            read.add(node)
            waiting += network.inputs_of(node)
    return [n for n in network.module.graph.nodes if n in read and not network.is_idle(n)]


def _readers(network: Network, node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that read a node's value, as it is or through nodes that do nothing."""
    for reader in node.users:
        if network.is_idle(reader):
            yield from _readers(network, reader)
        elif network.carries_data(reader):
            yield reader


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
        and not reads_a_table(network, layer)
    ]
    if not candidates or shared_paths(deep, wanted):
        return deep, wanted
    settings = _settings(deep, wanted)
    differing = [sum(a != b for a, b in zip(_settings(network, x), settings)) for x in candidates]
    return network, candidates[differing.index(min(differing))]


def _settings(network: Network, layer: Layer) -> list[object]:
    """Return the literal arguments of a layer's nodes."""
    nodes = [n for n in network.module.graph.nodes if n.name in layer.nodes]
    arguments = [x for node in nodes for x in tree_leaves((node.args, node.kwargs))]
    return [x for x in arguments if not isinstance(x, fx.Node)]
