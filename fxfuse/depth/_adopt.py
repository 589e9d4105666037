"""One graph for all: give a network the graph and the names of another of the same normal form.

Nodes that count correspond (`alignment.normal_form`), and with them their tensors. What the other
graph has besides is made neutral: a norm has no effect, a bias is zero, dropout comes along. A norm
that the other graph does not have is folded into the contraction in front of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..alignment.normal_form import (
    NormalForm,
    correspondence,
    first_difference,
    unread_writers,
    writers_of,
)
from ..calibration.norms import (
    Roles,
    scale_and_shift,
    scaled,
    single_weights,
    tensors_for,
)
from ..errors import PairingError
from ..graph.module import Graph
from ..graph.state import (
    hide,
    is_hidden,
    order_like,
    part_at,
    settle_sizes,
    tensor_at,
    tensors_of,
)
from ..graph.trace import run_once
from ..spaces.network import Network
from ._insert import AbsentLayer, of_form, same_form
from ._literals import copy_literals, fit_sizes


def adopt(
    network: Network, shape: Network, absent: Sequence[AbsentLayer] = ()
) -> tuple[Network, tuple[AbsentLayer, ...]]:
    """Give a network the graph and the names of another network of its normal form.

    Args:
        network: The network; not modified.
        shape: The network whose graph and names it takes; see `with_room_for_biases`.
        absent: Layers that the network has in name only.

    Returns:
        The network under the other graph, and these layers there.

    Raises:
        PairingError: If the structures differ.
    """
    if _spelled(network) == _spelled(shape):
        return network, tuple(absent)
    match = _Match.of(network, shape)
    twins, tensors = _twins(match), _Tensors(match)
    members: dict[str, Any] = {}
    taken: dict[int, Any] = {}  # ours that has a place already -> theirs there
    for node in shape.module.graph.nodes:
        path = str(node.target)
        if node.op in ("call_module", "get_attr") and path not in members:
            own = tensors.own_part(path, twins.get(node))
            place = part_at(shape.module, path)
            if own is not None and taken.setdefault(id(own), place) is not place:
                own = copy.deepcopy(own)  # one constant where they have several
            members[path] = tensors.filled(path) if own is None else own
    graph = copy.deepcopy(shape.module.graph)
    _copy_sizes(match, twins, dict(zip(shape.module.graph.nodes, graph.nodes)))
    module = Graph(members, graph, type(network.module).__name__).eval()
    order_like(module, shape.module)
    for path in members:
        if is_hidden(shape.module, path):
            hide(module, path)
    run_once(module, network.example, f"{network.name} with the graph of {shape.name}")
    adopted = Network.of(network.name, module, network.example)
    for node, other in zip(module.graph.nodes, shape.module.graph.nodes):
        if adopted.form(node) != shape.form(other):
            raise _structures_differ(network, shape, match.nodes.get(other), other)
    return adopted, tuple(_layer_there(match, tensors, layer) for layer in absent)


def _spelled(network: Network) -> list[str]:
    """Return the graph word by word, with the settings of its modules and the names of tensors."""
    words = list(tensors_of(network.module))
    for node in network.module.graph.nodes:
        words += [str(node.format_node()), network.form(node)]
    return words


def with_room_for_biases(shape: Network, networks: Sequence[Network]) -> Network:
    """Return a network with a zero bias wherever others have one, or a norm, and it has neither.

    Args:
        shape: The network whose graph the others will take; not modified.
        networks: The others.

    Raises:
        PairingError: If the structures differ.
    """
    missing: dict[fx.Node, None] = {}
    for network in networks:
        match = _Match.of(network, shape)
        missing |= dict.fromkeys(node for node, _ in match.contractions() if match.no_room(node))
    if not missing:
        return shape
    module = copy.deepcopy(shape.module)
    for node in missing:
        part = part_at(module, str(node.target)) if node.op == "call_module" else None
        slots = [] if part is None or isinstance(part, Tensor) else _empty_slots(part)
        if len(slots) != 1:
            raise PairingError(
                "a layer without a bias, where another network has one",
                where=f"node '{node.name}' of {shape.name}",
                expected="one module with a place for a bias, such as nn.Linear(..., bias=False)",
                do="give this layer a bias of zeros, or list the network that has one first",
            )
        weight = tensor_at(module, shape.weights[node.name][0])
        assert isinstance(part, nn.Module)
        part.register_parameter(slots[0], nn.Parameter(weight.new_zeros(_units(shape, node))))
    return Network.of(shape.name, module, shape.example)


def _empty_slots(part: nn.Module) -> list[str]:
    return [name for name, tensor in part._parameters.items() if tensor is None]


def _units(network: Network, node: fx.Node) -> int:
    """Return how many units a contraction writes."""
    axes, shape = network.features.get(node.name, ()), network.shapes[node.name]
    return shape[axes[0]] if axes else shape[-1]


# --- what corresponds -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Match:
    """Two networks of one normal form.

    Attributes:
        ours: The network that takes the other's graph.
        theirs: The other.
        nodes: A node of theirs that counts, or a norm -> ours.
        norms: Our contractions with a norm that the others' have not -> this norm.
    """

    ours: NormalForm
    theirs: NormalForm
    nodes: dict[fx.Node, fx.Node]
    norms: dict[str, str]

    @classmethod
    def of(cls, network: Network, shape: Network) -> _Match:
        ours, theirs = NormalForm(network), NormalForm(shape)
        nodes = correspondence(ours, theirs)
        if nodes is None:
            raise _structures_differ(network, shape, *first_difference(ours, theirs))
        norms = {contraction: norm for norm, contraction in ours.folded.items()}
        for norm, contraction in theirs.folded.items():
            partner = nodes[shape.nodes[contraction]].name
            if partner in norms:
                nodes[shape.nodes[norm]] = network.nodes[norms.pop(partner)]
        return cls(ours, theirs, nodes, norms)

    @cached_property
    def copies(self) -> frozenset[fx.Node]:
        """Given nodes of theirs that share one of ours with an earlier one."""
        first = {ours: node for node, ours in reversed(self.nodes.items())}
        return frozenset(n for n, ours in self.nodes.items() if first[ours] is not n)

    def contractions(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Yield pairs of nodes, theirs and ours, that contract one weight, with or without bias."""
        for node, ours in self.nodes.items():
            both = ((self.theirs.network, node), (self.ours.network, ours))
            alone = all(len(n.weights.get(x.name, ())) == 1 for n, x in both)
            if alone and all(len(n.tensors[x.name]) <= 2 for n, x in both):
                yield node, ours

    def biases(self, node: fx.Node) -> tuple[str | None, str | None]:
        """Return the names of the biases of a contraction, theirs and ours."""
        found = []
        for form, n in ((self.theirs, node), (self.ours, self.nodes[node])):
            weight = form.network.weights[n.name][0]
            found.append(next((t for t in form.network.tensors[n.name] if t != weight), None))
        return found[0], found[1]

    def no_room(self, node: fx.Node) -> bool:
        """Tell whether we add something behind a contraction, and they have no tensor for it."""
        theirs, ours = self.biases(node)
        wanted = ours is not None or self.nodes[node].name in self.norms
        return wanted and theirs is None and node.name not in self.theirs.folded.values()


def _twins(match: _Match) -> dict[fx.Node, fx.Node]:
    """Return our node for each of theirs that does the same in the same place.

    Beside the nodes that count these are those in between that reshape, and what they all read
    besides data: attributes and sizes.
    """
    twins = dict(match.nodes)
    for node, ours in match.nodes.items():
        for reshaping, other in _chains(match, node, ours):
            if len(reshaping) == len(other):
                twins |= zip(reshaping, other)
    waiting = list(twins.items())
    while waiting:
        leaves = [tree_leaves((n.args, n.kwargs)) for n in waiting.pop()]
        for a, b in zip(*leaves) if len(leaves[0]) == len(leaves[1]) else ():
            if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a not in twins:
                data = (f.network.carries_data(n) for f, n in ((match.theirs, a), (match.ours, b)))
                if a.op == b.op and not any(data):
                    twins[a] = b
                    waiting.append((a, b))
    return twins


def _chains(
    match: _Match, node: fx.Node, ours: fx.Node
) -> Iterator[tuple[list[fx.Node], list[fx.Node]]]:
    """Yield, for each value that a node reads, the nodes that reshaped it, theirs and ours."""
    left = match.ours.network.inputs_of(ours)
    for value in match.theirs.network.inputs_of(node):
        source = match.nodes[match.theirs.source(value)]
        other = next((n for n in left if match.ours.source(n) is source), None)
        if other is not None:
            left.remove(other)
            yield _reshaping(match.theirs, value), _reshaping(match.ours, other)


def _reshaping(form: NormalForm, node: fx.Node) -> list[fx.Node]:
    """Return the nodes between a value and the node that counts before it that change its shape."""
    nodes, shapes = [], form.network.shapes
    while not form.counts(node):
        before = form.network.inputs_of(node)[0]
        if shapes[node.name] != shapes[before.name]:
            nodes.append(node)
        node = before
    return nodes


def _layer_there(match: _Match, tensors: _Tensors, layer: AbsentLayer) -> AbsentLayer:
    """Return a layer that we have in name only as it is in the other graph."""
    form, network = match.theirs, match.theirs.network
    there = {ours.name: node for node, ours in match.nodes.items()}
    counting = [there[n] for n in layer.nodes if n in there]
    carried = (match.ours.network.nodes[n] for n in layer.carriers)
    holding = (match.ours.source(n).name for n in carried if match.ours.network.carries_data(n))
    carrying = {there[n] for n in holding if n in there}
    source = match.ours.source(match.ours.network.nodes[layer.entry])
    inside, carriers = dict.fromkeys([*counting, *_between(form, counting)]), []
    inside |= dict.fromkeys(_reshaped_at_end(match, layer, there))
    inside |= dict.fromkeys(_writing_into(network, list(inside)))
    nodes = [n for n in network.module.graph.nodes if n in inside]
    read = (n for node in nodes for n in network.inputs_of(node) if n not in inside)
    entry = next(n for n in read if match.nodes.get(form.source(n)) is source)
    while not form.counts(entry) and not same_form(network, entry.name, nodes[-1].name):
        nodes.insert(0, entry)  # what gives the entry the form that the layer works on
        entry = network.inputs_of(entry)[0]
    for node in nodes:
        data = network.carries_data(node)
        if node in carrying or data and not form.counts(node) and form.source(node) in carrying:
            carriers.append(node.name)
    return replace(
        layer,
        nodes=tuple(n.name for n in nodes),
        entry=entry.name,
        carriers=tuple(of_form(network, entry.name, carriers)),
        zeroed=tensors.silent(counting, layer.zeroed),
    )


def _writing_into(network: Network, inside: Sequence[fx.Node]) -> set[fx.Node]:
    """Return what writes into some nodes and is read by nothing, and what leads there from them."""
    writers = writers_of(network)
    waiting = [w for n in inside for w in unread_writers(writers, n)]
    if not waiting:
        return set()
    made = set(inside)
    for node in network.module.graph.nodes:
        if not made.isdisjoint(node.all_input_nodes):
            made.add(node)
    made -= {*inside}
    found = set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in made and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _reshaped_at_end(match: _Match, layer: AbsentLayer, there: dict[str, fx.Node]) -> list[fx.Node]:
    """Return what gives the value of a layer, in the other graph, the form that it had in ours."""
    network, form = match.ours.network, match.theirs
    end = network.nodes[layer.carriers[-1]]
    source, shapes = match.ours.source(end), form.network.shapes
    rank = len(network.shapes[end.name])
    if source is end or len(network.shapes[source.name]) == rank:
        return []
    for node in form.network.module.graph.nodes:
        of_it = form.network.carries_data(node) and form.source(node) is there[source.name]
        if of_it and not form.counts(node) and len(shapes[node.name]) == rank:
            return list(_handed_on(form, node))
    return []


def _handed_on(form: NormalForm, node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node that does not count, and those that handed its value on to it."""
    while not form.counts(node):
        yield node
        node = form.network.inputs_of(node)[0]


def _between(form: NormalForm, counting: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """Yield what is made of some nodes that count and read by others of them, and folded norms.

    What is made of the last of them, as its size or a reshape of it, belongs to what comes behind.
    """
    made = set(counting)
    for node in form.network.module.graph.nodes:
        if not form.counts(node) and not made.isdisjoint(node.all_input_nodes):
            made.add(node)
    read = set(counting)
    for node in reversed(form.network.module.graph.nodes):
        folded = node.name in form.folded and node in made
        if node in made and node not in counting and (folded or not read.isdisjoint(node.users)):
            read.add(node)
            yield node


# --- tensors --------------------------------------------------------------------------------------


class _Tensors:
    """What we put in the places of the other network's tensors and modules.

    Args:
        match: The two networks.

    Attributes:
        names: A tensor of theirs -> ours, where it stays as it is.
        computed: A tensor of theirs -> its values, where they are put together.

    Raises:
        PairingError: If one tensor is used where the other network uses two.
    """

    def __init__(self, match: _Match) -> None:
        self.match = match
        self.ours, self.theirs = match.ours.network, match.theirs.network
        self.names: dict[str, str] = {}
        self.computed: dict[str, np.ndarray] = {}
        self._first_names = {id(t): name for name, t in tensors_of(self.theirs.module).items()}
        self._made: dict[str, Tensor] = {}
        self._name_all()
        self._refuse_one_for_several()

    def _name_all(self) -> None:
        contractions = dict(self.match.contractions())
        for node, ours in self.match.nodes.items():
            if node in contractions:
                self._name_contraction(node, ours)
            elif node.name not in self.match.theirs.folded and node not in self.match.copies:
                pair = [n.tensors.get(x.name, []) for n, x in self._both(node, ours)]
                if len(pair[0]) != len(pair[1]):
                    raise _structures_differ(self.ours, self.theirs, ours, node)
                self._name(node, ours, *pair)

    def _refuse_one_for_several(self) -> None:
        """Refuse a parameter of ours where they have several: a copy of each would drift apart.

        Buffers are not learned: a mask that each of their layers has is copied for each.
        """
        place: dict[str, str] = {}
        for theirs, ours in self.names.items():
            if isinstance(tensor_at(self.theirs.module, theirs), nn.Parameter):
                other = place.setdefault(ours, theirs)
                if other != theirs:
                    raise PairingError(
                        f"one parameter where another network has two, '{other}' and '{theirs}'",
                        where=f"'{ours}' of {self.ours.name}, beside {self.theirs.name}",
                        expected="parameters that are shared in both networks, or in neither",
                        do="give each place a parameter of its own, or let the others count in "
                        "targets only (across=True)",
                    )

    def _both(self, node: fx.Node, ours: fx.Node) -> tuple[tuple[Network, fx.Node], ...]:
        return (self.theirs, node), (self.ours, ours)

    def _name(
        self, node: fx.Node, ours: fx.Node, theirs_names: Sequence[str], our_names: Sequence[str]
    ) -> None:
        for a, b in zip(theirs_names, our_names):
            if self.names.setdefault(a, b) != b:
                raise _structures_differ(self.ours, self.theirs, ours, node)

    def _name_contraction(self, node: fx.Node, ours: fx.Node) -> None:
        """Put the weight and bias of a contraction, and the norm behind it, in their places."""
        weights = [n.weights[x.name][:1] for n, x in self._both(node, ours)]
        biases, folded = self.match.biases(node), self.match.norms.get(ours.name)
        norm = next((n for n, c in self.match.theirs.folded.items() if c == node.name), None)
        twin = None if norm is None else self.match.nodes.get(self.theirs.nodes[norm])
        roles = [{}, {}] if norm is None else [dict(self.theirs.norms[norm]), {}]
        if twin is not None:
            roles[1] = dict(self.ours.norms[twin.name])
        if (
            folded is None
            and (biases[0] is None) == (biases[1] is None)
            and roles[0].keys() == roles[1].keys()
        ):
            self._name(node, ours, *weights)
            self._name(node, ours, *([b] if b else [] for b in biases))
            tensors = [[str(r[k]) for k in roles[0] if k != "eps"] for r in roles]
            self._name(node, ours, *tensors)
            if roles[0].get("eps") == roles[1].get("eps"):
                return
        self._compute(node, ours, folded, norm, twin)

    def _compute(
        self,
        node: fx.Node,
        ours: fx.Node,
        folded: str | None,
        norm: str | None,
        twin: fx.Node | None,
    ) -> None:
        """Compute the tensors of a contraction and its norm where both networks differ in form.

        Args:
            node: Their contraction.
            ours: Our contraction.
            folded: Our norm behind it, if they have none.
            norm: Their norm behind it, if they have one.
            twin: Our norm, if both have one.
        """
        their_bias, our_bias = self.match.biases(node)
        units = _units(self.ours, ours)
        bias = np.zeros(units) if our_bias is None else self._array(our_bias)
        weight, own_weight = (n.weights[x.name][0] for n, x in self._both(node, ours))
        if folded is None:
            self._name(node, ours, [weight], [own_weight])
        else:
            scale, shift = scale_and_shift(self.ours.module, self.ours.norms[folded])
            dim = single_weights(self.ours)[ours.name][1]
            self.computed[weight] = scaled(self._array(own_weight), dim, scale)
            bias = bias * scale + shift
        if norm is not None:
            moved = bias if their_bias is None else np.zeros(units)
            self._compute_norm(self.theirs.norms[norm], twin, moved)
        if their_bias is not None:
            self.computed[their_bias] = bias

    def _compute_norm(self, theirs: Roles, twin: fx.Node | None, moved: np.ndarray) -> None:
        """Let their norm compute what ours does, or nothing, of inputs that lack what is added."""
        scale, shift = np.ones_like(moved), np.zeros_like(moved)
        mean, variance = np.zeros_like(moved), np.ones_like(moved)
        if twin is not None:
            ours = self.ours.norms[twin.name]
            scale, shift = scale_and_shift(self.ours.module, ours)
            mean, variance = (self._array(str(ours[r])) for r in ("running_mean", "running_var"))
        values = tensors_for(theirs, scale, scale * (mean + moved) + shift, mean, variance)
        for name, value in values.items():
            self.names.pop(name, None)
            self.computed[name] = np.zeros_like(moved) + value

    def _array(self, name: str) -> np.ndarray:
        array: np.ndarray = tensor_at(self.ours.module, name).detach().double().cpu().numpy()
        return array

    def silent(self, nodes: Sequence[fx.Node], zeroed: frozenset[str]) -> frozenset[str]:
        """Return the tensors of some nodes of theirs that are zero because some of ours are."""
        names = {a for a, b in self.names.items() if b in zeroed}
        for node in nodes:
            ours = self.match.nodes[node].name
            norms = [norm for norm, c in self.match.ours.folded.items() if c == ours]
            if zeroed & {t for n in (ours, *norms) for t in self.ours.tensors.get(n, ())}:
                computed = set(self.theirs.tensors[node.name]) & set(self.computed)
                names |= {name for name in computed if not self.computed[name].any()}
        return frozenset(names)

    def own_part(self, path: str, twin: fx.Node | None) -> nn.Module | Tensor | None:
        """Return our module or tensor that can take a place as it is; None if none can."""
        theirs = part_at(self.theirs.module, path)
        if isinstance(theirs, Tensor):
            name = self.names.get(self._first_names.get(id(theirs), path))
            if name is None and path not in self.computed and twin is not None:
                name = str(twin.target)
            return None if name is None else part_at(self.ours.module, name)
        ours = part_at(self.ours.module, str(twin.target)) if twin is not None else None
        if not isinstance(ours, nn.Module) or type(ours) is not type(theirs) or theirs is None:
            return None
        pair = [{n for n, _ in _named_tensors(part)} for part in (theirs, ours)]
        computed = any(f"{path}.{name}" in self.computed for name in pair[0])
        return None if pair[0] != pair[1] or computed else ours

    def filled(self, path: str) -> nn.Module | Tensor:
        """Return a copy of their module or tensor with our values in it."""
        theirs = part_at(self.theirs.module, path)
        assert theirs is not None, f"nothing is called '{path}'"
        if isinstance(theirs, Tensor):
            return self._given(theirs)
        memo: dict[int, Any] = {id(t): self._given(t) for _, t in _named_tensors(theirs)}
        part = copy.deepcopy(theirs, memo)
        for module, old in zip(part.modules(), theirs.modules()):
            settle_sizes(module)
            pair: tuple[Any, Any] = (module, old)
            if isinstance(old, nn.modules.conv._ConvNd) and 1 < old.groups == len(old.weight):
                pair[0].groups = len(pair[0].weight)  # depthwise
                settle_sizes(module)
        return part

    def _given(self, theirs: Tensor) -> Tensor:
        """Return what takes the place of a tensor of theirs, once for all its places."""
        name = self._first_names.get(id(theirs), "")
        if name not in self._made:
            if name in self.names:
                values = tensor_at(self.ours.module, self.names[name]).detach()
            else:
                values = torch.as_tensor(self.computed.get(name, theirs.detach()))
            new = values.to(theirs).clone()
            is_parameter = isinstance(theirs, nn.Parameter)
            self._made[name] = nn.Parameter(new, theirs.requires_grad) if is_parameter else new
        return self._made[name]


def _named_tensors(part: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = part.named_parameters(remove_duplicate=False)
    return [*parameters, *part.named_buffers(remove_duplicate=False)]


# --- literals -------------------------------------------------------------------------------------


def _copy_sizes(
    match: _Match, twins: dict[fx.Node, fx.Node], copies: dict[fx.Node, fx.Node]
) -> None:
    """Give the copy of each node our literal arguments (sizes, rates)."""

    def fit(node: fx.Node, ours: fx.Node) -> None:
        shapes = match.theirs.network.shapes[node.name], match.ours.network.shapes[ours.name]
        fit_sizes(copies[node], *shapes)

    for node, ours in twins.items():
        if not copy_literals(ours, copies[node]) and not match.theirs.counts(node):
            fit(node, ours)
    for node, ours in match.nodes.items():
        for reshaping, other in _chains(match, node, ours):
            if len(reshaping) != len(other) and reshaping and other:
                fit(reshaping[0], other[0])


def _structures_differ(
    network: Network, shape: Network, node: fx.Node | None, other: fx.Node | None
) -> PairingError:
    def named(n: fx.Node | None, of: Network) -> str:
        if n is None:
            return f"nothing more of {of.name}"
        return (
            f"'{n.name}' of {of.name} ({', '.join(s.word or s.name for s in of.steps(n)) or n.op})"
        )

    return PairingError(
        "structures that differ outside of their aligned layers",
        where=f"{named(node, network)} against {named(other, shape)}",
        expected="the same steps (pooling, attention, tensors used several times) between layers",
        do="give both the same step there, or let the others count in targets only (across=True)",
    )
