"""Find, for a value of one network, the value of another that is computed in the same way.

A layer may read more than the layer before it gives: masks and positions, or the output of another
part of the network, such as an encoder. A copy of the layer in another network then has to read the
same value there. "The same way" leaves out layers that not all networks have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from ..alignment.layers import entries_of
from ..alignment.normal_form import NormalForm, fed_values, given_partner, has_parameters
from ..ir import Alignment, Layer
from ..spaces.network import Network
from ._neutral import no_neutral_form


class SharedValues:
    """Values that networks have in common.

    Args:
        networks: The networks.
        layers: Per network, its layers by name.
        alignment: Which of them correspond.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        layers: Sequence[Mapping[str, Layer]],
        alignment: Alignment,
    ) -> None:
        self.forms = [NormalForm(n) for n in networks]
        self._layers, self._alignment = layers, alignment
        self._hashes: list[dict[fx.Node, str]] = []
        for k, form in enumerate(self.forms):
            slots = [
                (s.slots[k][i], slot)
                for s in alignment.segments
                for i, slot in enumerate(zip(*s.slots))
            ]
            absent = [layers[k][name] for name, slot in slots if name is not None and None in slot]
            self._hashes.append(form.hashes_past(entries_of(form, absent)))
        self._last = [{h: node for node, h in hashes.items()} for hashes in self._hashes]

    def partner(self, node: fx.Node, of: int, into: int) -> fx.Node | None:
        """Return the last node of a network that computes what a node of another does."""
        if of == into:
            return node
        form = self.forms[of]
        if node.op == "placeholder":
            graphs = (self.forms[k].network.module.graph for k in (of, into))
            theirs, ours = (list(graph.find_nodes(op="placeholder")) for graph in graphs)
            partner: fx.Node = ours[theirs.index(node)]
            return partner
        if node in form.given:
            return given_partner(node, form, self.forms[into])
        return self._last[into].get(self._hashes[of][node]) if form.counts(node) else None

    def beside(self, layer: Layer, of: int, into: int) -> dict[str, str]:
        """Return what a layer reads besides its entry, and the nodes with these values elsewhere.

        Args:
            layer: The layer.
            of: The network that has it.
            into: The network that gets a copy.

        Raises:
            PassError: If there is no such value.
        """
        form, partners = self.forms[of], dict[str, str]()
        for node in self._outside(layer, form, partners):
            partner = self.partner(node, of, into)
            if partner is not None:
                partners[node.name] = partner.name
            elif node not in form.given and form.counts(node):
                raise no_neutral_form(layer.name, f"it reads '{node.name}' besides its entry")
        return partners

    def shared(self, layer: Layer, of: int, into: int) -> dict[str, str]:
        """Return the modules and tensors that a layer shares, and what they are elsewhere.

        Left out are those of layers that the other network has not.
        """
        paths, pairs = shared_paths(self.forms[of].network, layer), dict[str, str]()
        if of == into or not paths:
            return pairs
        for segment in self._alignment.segments:
            for ours, theirs in zip(segment.slots[into], segment.slots[of]):
                if ours is not None and theirs is not None:
                    named = (self._layers[of][theirs], of), (self._layers[into][ours], into)
                    both = [_paths(self.forms[k].network, x) for x, k in named]
                    if len(both[0]) == len(both[1]):
                        pairs |= {a: b for a, b in zip(*both) if a in paths}
        return pairs

    def _outside(
        self, layer: Layer, form: NormalForm, partners: Mapping[str, str]
    ) -> Iterator[fx.Node]:
        """Yield values from outside that a layer reads, and those behind them without a partner.

        What is made for this layer alone, of parameters and given values, is its own, and so
        is what has a size of the layer's values: it cannot be there before.
        """
        network, nodes = form.network, form.network.nodes
        fed = fed_values(network)
        inside = {nodes[name] for name in layer.nodes}
        seen = {*inside, nodes[layer.entry]}
        for node in reversed(network.module.graph.nodes):
            free = node not in fed or node in form.beside
            if free and node not in seen and node.users and inside >= {*node.users}:
                inside.add(node)
        inside -= form.given - _made_of(network, layer, inside)
        waiting = list(inside)
        while waiting:
            for node in waiting.pop().all_input_nodes:
                if node in seen or node in inside:
                    continue
                seen.add(node)
                if network.carries_data(node):
                    yield node
                if node.name not in partners:
                    waiting.append(node)


def _made_of(network: Network, layer: Layer, alone: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes made of a layer's values, or of their sizes, that are made for it alone."""
    made = {network.nodes[name] for name in layer.nodes}
    for node in network.module.graph.nodes:
        free = node in alone or not network.carries_data(node)
        if free and not made.isdisjoint(node.all_input_nodes):
            made.add(node)
    return made


def shared_paths(network: Network, layer: Layer) -> set[str]:
    """Return the modules with parameters, and the parameters, that a layer has with others."""
    nodes = [n for n in network.module.graph.nodes if n.name not in layer.nodes]
    inside = set(_paths(network, layer))
    all_nodes = network.nodes
    readers = {all_nodes[name] for name in layer.nodes}
    others = {str(n.target) for n in nodes if n.op == "call_module"}
    others |= {
        str(n.target) for n in nodes if n.op == "get_attr" and not readers.issuperset(n.users)
    }
    return inside & others


def reads_a_table(network: Network, layer: Layer) -> bool:
    """Tell whether a layer computes with rows of a table that was looked up in front of it."""
    own, nodes = _paths(network, layer), network.nodes
    read = {n.name for name in layer.nodes for n in network.inputs_of(nodes[name])}
    tensors = {t for n in {*layer.nodes, *read - {layer.entry}} for t in network.tensors.get(n, ())}
    return any(not any(t == p or t.startswith(f"{p}.") for p in own) for t in tensors)


def _paths(network: Network, layer: Layer) -> list[str]:
    """Return the modules and attributes of a layer that hold parameters, in order."""
    nodes, paths = network.nodes, dict[str, None]()
    for name in layer.nodes:
        read = [n for n in nodes[name].all_input_nodes if n.op == "get_attr"]
        for node in (*read, nodes[name]):
            if has_parameters(network, node):
                paths[str(node.target)] = None
    return list(paths)
