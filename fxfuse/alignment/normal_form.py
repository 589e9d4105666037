"""What counts when the structures of two networks are compared: each in one normal form.

Left out are nodes that do nothing in eval mode (dropout, identity), reshaping, norms that can be
folded into the contraction in front of them, biases, and what nothing reads. The other nodes are
compared by their operators, so a function counts as much as a module, and a module without tensors
may be called once or often. Values that no parameter takes part in (masks, positions) are given:
they may be computed once or for each layer. Nothing is edited here: a normal form says which nodes
of two networks correspond, and `depth` uses it to give one the graph of the other.
"""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from ..calibration.norms import foldable_norms
from ..graph.state import part_at
from ..graph.writes import writes
from ..spaces.network import Network


class NormalForm:
    """A network reduced to the nodes that count.

    Args:
        network: The network; not modified.

    Attributes:
        folded: The norms that do not count -> the contraction in front of each.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.folded = foldable_norms(network, through_idle=True)

    @cached_property
    def steps(self) -> list[fx.Node]:
        """The nodes that count and that the output depends on, in graph order."""
        read: set[fx.Node] = set()
        for node in reversed(self.network.module.graph.nodes):
            if node.op in ("placeholder", "output") or node in read:
                read |= {node, *node.all_input_nodes}
        nodes = self.network.module.graph.nodes
        return [node for node in nodes if node in read and self.counts(node)]

    @cached_property
    def given(self) -> frozenset[fx.Node]:
        """The given nodes, see `given_nodes`."""
        return given_nodes(self.network)

    @cached_property
    def beside(self) -> frozenset[fx.Node]:
        """Given values, and what is made of them and of values that no input reaches.

        An example is the sum of a mask and a table of biases, rows of which are picked by position.
        """
        network, fed, written = self.network, fed_values(self.network), writers_of(self.network)
        beside = set(self.given)
        for node in network.module.graph.nodes:
            sources = [n for n in network.inputs_of(node) if n in fed]
            read = [node, *(n for n in node.all_input_nodes if n.op == "get_attr")]
            own = node in written or any(has_parameters(network, n) for n in read)
            made = network.carries_data(node) and node.op != "output"
            if made and sources and not own and beside.issuperset(sources):
                beside.add(node)
        return frozenset(beside)

    def hash_given(self, node: fx.Node) -> str:
        """Return the hash of a given value, and "outside" for any other."""
        source = self.source(node)
        return self.hashes.get(source, "given") if source in self.given else "outside"

    @property
    def streams(self) -> list[fx.Node]:
        """The nodes that count and are not given."""
        return [node for node in self.steps if node not in self.given]

    @cached_property
    def values(self) -> dict[fx.Node, str]:
        """A hash of each given node, and of what it reads: equal hashes mean equal values."""
        values: dict[fx.Node, str] = {}
        for i, node in enumerate(self.network.module.graph.nodes):
            if node in self.given:
                placed = node.op == "placeholder"
                values[node] = f"input {i}" if placed else self._value(node, values)
        return values

    @cached_property
    def by_value(self) -> dict[str, fx.Node]:
        """The first given node with each value."""
        return {value: node for node, value in reversed(self.values.items())}

    def _value(self, node: fx.Node, values: dict[fx.Node, str]) -> str:
        """Return the hash of a given node. Of the others that it reads, only the size counts."""
        if node in values:
            return values[node]
        if node.op in ("call_module", "get_attr"):
            word = _state(part_at(self.network.module, str(node.target)))
        else:
            word = str(node.target)
        read = fx.node.map_aggregate(
            (node.args, node.kwargs),
            lambda n: self._read(n, values) if isinstance(n, fx.Node) else n,
        )
        return _hash(f"{word}{read}")

    def _read(self, node: fx.Node, values: dict[fx.Node, str]) -> str:
        if node in values or not self.network.carries_data(node):
            return self._value(node, values)
        return f"of size {self.network.shapes[node.name]}"

    def counts(self, node: fx.Node) -> bool:
        """Tell whether a node counts; one that does not hands on its first input."""
        network = self.network
        if node.op in ("placeholder", "output"):
            return True
        if not network.carries_data(node) or node.name in self.folded:
            return False
        if network.steps(node):
            return True
        inputs = network.inputs_of(node)
        return len(inputs) != 1 or network.shapes.get(inputs[0].name) == ()

    def source(self, node: fx.Node) -> fx.Node:
        """Return the node that counts and whose values a node hands on."""
        while not self.counts(node):
            node = self.network.inputs_of(node)[0]
        return node

    def inputs_of(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that count and that a node reads."""
        return [self.source(n) for n in self.network.inputs_of(node)]

    def text(self, node: fx.Node) -> str:
        """Return what a node does, whatever its widths and its spelling."""
        if node.op in ("placeholder", "output"):
            return node.op
        if self.network.steps(node):
            return self.network.form(node)
        if not self.network.inputs_of(node):
            return f"constant {node.target}"
        return f"item {node.args[1]}" if node.target is operator.getitem else "[]"

    def hash_of(self, node: fx.Node, inputs: Iterable[str]) -> str:
        """Return the hash of a node, from those of what it reads."""
        inputs = list(inputs)
        if self.network.commutes(node):
            inputs.sort()
        return _hash(f"{self.text(node)}({','.join(inputs)})")

    @cached_property
    def hashes(self) -> dict[fx.Node, str]:
        """What each node that counts computes from the network's inputs."""
        return self.hashes_past({})

    def hashes_past(self, past: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, str]:
        """Return what each node computes if some layers are passed by.

        Args:
            past: The last node of each of these layers -> the node that the layer reads.
        """
        hashes: dict[fx.Node, str] = {}
        network_inputs = [n for n in self.steps if n.op == "placeholder"]
        for node in self.steps:
            inputs = [hashes[n] for n in self.inputs_of(node)]
            if node.op == "placeholder":
                inputs = [str(network_inputs.index(node))]
            hashes[node] = self.hash_of(node, inputs)
            if node in past:
                hashes[node] = hashes[self.source(past[node])]
        return hashes

    @cached_property
    def places(self) -> dict[fx.Node, str]:
        """What each node that counts computes, and what is made of it."""
        read: dict[fx.Node, list[str]] = {node: [] for node in self.steps}
        places: dict[fx.Node, str] = {}
        for node in reversed(self.steps):
            places[node] = _hash(self.hashes[node] + ",".join(sorted(read[node])))
            alike = self.network.commutes(node)
            for i, n in enumerate(self.inputs_of(node)):
                read[n].append(f"{0 if alike else i} {places[node]}")
        return places


def given_nodes(network: Network) -> frozenset[fx.Node]:
    """Return the nodes whose values no parameter takes part in: inputs, masks, positions.

    Layers may read them besides what the layer before them hands on.
    """
    given: set[fx.Node] = set()
    written = writers_of(network)
    for node in network.module.graph.nodes:
        if network.carries_data(node) and given.issuperset(network.inputs_of(node)):
            read = [node, *(n for n in node.all_input_nodes if n.op == "get_attr")]
            if node not in written and not any(has_parameters(network, n) for n in read):
                given.add(node)
    return frozenset(given)


def fed_values(network: Network) -> set[fx.Node]:
    """Return the nodes that values of the inputs reach, not only their sizes."""
    reached = set(network.module.graph.find_nodes(op="placeholder"))
    for node in network.module.graph.nodes:
        if not reached.isdisjoint(network.inputs_of(node)):
            reached.add(node)
    return reached


def writers_of(network: Network) -> dict[fx.Node, list[fx.Node]]:
    """Return the nodes whose values, or views of them, are written to, and what writes to each."""
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(network.module.graph.nodes):
        own = [node] if writes(node) else []
        if node in writers and (own or network.may_be_view(node)):
            own += writers[node]  # what writes in place hands on what it wrote to
        if own and node.all_input_nodes:
            writers.setdefault(node.all_input_nodes[0], []).extend(own)
    return writers


def unread_writers(writers: Mapping[fx.Node, list[fx.Node]], node: fx.Node) -> list[fx.Node]:
    """Return what writes to a node's value and is read by nothing, as an assignment to a part."""
    return [w for w in writers.get(node, ()) if not w.users]


def has_parameters(network: Network, node: fx.Node) -> bool:
    """Tell whether a node calls a module with parameters, or is one."""
    if node.op not in ("call_module", "get_attr"):
        return False
    part = part_at(network.module, str(node.target))
    if isinstance(part, nn.Module):
        return next(part.parameters(), None) is not None
    return isinstance(part, nn.Parameter)


def correspondence(ours: NormalForm, theirs: NormalForm) -> dict[fx.Node, fx.Node] | None:
    """Return our node for each of their nodes that count; None if the structures differ.

    Nodes in the same place, such as equal branches of a block, are paired in order. One given node
    of ours may stand for several of theirs.
    """
    places = [Counter(form.places[node] for node in form.streams) for form in (ours, theirs)]
    if places[0] != places[1]:
        return None
    by_place: dict[str, list[fx.Node]] = {}
    for node in ours.steps:
        by_place.setdefault(ours.places[node], []).append(node)
    pairs: dict[fx.Node, fx.Node] = {}
    for node in theirs.steps:
        alike = by_place.get(theirs.places[node], [])
        if node not in theirs.given:
            pairs[node] = alike.pop(0)
            continue
        partner = alike.pop(0) if alike else given_partner(node, theirs, ours)
        if partner is None:
            return None
        pairs[node] = partner
    return pairs


def given_partner(node: fx.Node, theirs: NormalForm, ours: NormalForm) -> fx.Node | None:
    """Return our given node that has the value of one of theirs, or the only one of its kind."""
    equal = ours.by_value.get(theirs.values[node])
    if equal is not None or not theirs.counts(node):
        return equal
    alike = {ours.values[n]: n for n in ours.steps if ours.hashes[n] == theirs.hashes[node]}
    return next(iter(alike.values())) if len(alike) == 1 else None


def first_difference(ours: NormalForm, theirs: NormalForm) -> tuple[fx.Node | None, fx.Node | None]:
    """Return the first node that counts of each network for which the other has none."""
    left, right = ({n: form.hashes[n] for n in form.streams} for form in (ours, theirs))
    return _first_without(left, right), _first_without(right, left)


def _first_without(ours: Mapping[fx.Node, str], theirs: Mapping[fx.Node, str]) -> fx.Node | None:
    left = Counter(theirs.values())
    for node, value in ours.items():
        left[value] -= 1
        if left[value] < 0:
            return node
    return None


def _state(part: nn.Module | Tensor | None) -> str:
    """Return what tells a buffer or a module from others; of a parameter, only its shape does."""
    if isinstance(part, nn.Parameter):
        return str(tuple(part.shape))
    tensors = [part] if isinstance(part, Tensor) else list(part.buffers()) if part else []
    flat = (t.detach().cpu().contiguous().reshape(-1) for t in tensors)
    states = (_hash_of(t.view(torch.uint8).numpy().tobytes()) for t in flat)
    return f"{'' if isinstance(part, Tensor) else part} {', '.join(states)}"


def _hash(text: str) -> str:
    return _hash_of(text.encode())


def _hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
