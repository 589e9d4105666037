"""What counts when the structures of two networks are compared: each in one normal form.

Left out are nodes that do nothing in eval mode (dropout, identity), reshaping, norms that can be
folded into the contraction in front of them, and biases. What is left is known by its operators, so
functions and modules are the same, whether modules without tensors are shared or not. Nothing is
edited: a normal form says which node stands for which, and `depth` gives one network the graph of
another by it.
"""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property

from torch import fx

from ..calibration.norms import foldable_norms
from ..spaces.network import Network


class NormalForm:
    """A network without what does not count.

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
        """The nodes that count, in graph order."""
        return [node for node in self.network.module.graph.nodes if self.counts(node)]

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
        if node.target is operator.getitem and not self.network.steps(node):
            return f"item {node.args[1]}"
        return self.network.form(node)

    def hash_of(self, node: fx.Node, inputs: Iterable[str]) -> str:
        """Return the hash of a node, from those of what it reads."""
        inputs = list(inputs)
        if self.network.commutes(node):
            inputs.sort()
        return _hash(f"{self.text(node)}({','.join(inputs)})")

    @cached_property
    def hashes(self) -> dict[fx.Node, str]:
        """What each node that counts computes from the network's inputs."""
        hashes: dict[fx.Node, str] = {}
        for i, node in enumerate(self.steps):
            inputs = [hashes[n] for n in self.inputs_of(node)]
            hashes[node] = self.hash_of(node, inputs or [str(i)] * (node.op == "placeholder"))
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


def correspondence(ours: NormalForm, theirs: NormalForm) -> dict[fx.Node, fx.Node] | None:
    """Return our node for each of their nodes that count; None if the structures differ.

    Of nodes in the same place, as equal branches of a block, the first is the first's.
    """
    by_place: dict[str, list[fx.Node]] = {}
    for node in ours.steps:
        by_place.setdefault(ours.places[node], []).append(node)
    if Counter(ours.places.values()) != Counter(theirs.places.values()):
        return None
    return {node: by_place[theirs.places[node]].pop(0) for node in theirs.steps}


def first_difference(ours: NormalForm, theirs: NormalForm) -> tuple[fx.Node | None, fx.Node | None]:
    """Return the first node that counts of each network for which the other has none."""
    return _first_without(ours.hashes, theirs.hashes), _first_without(theirs.hashes, ours.hashes)


def _first_without(ours: Mapping[fx.Node, str], theirs: Mapping[fx.Node, str]) -> fx.Node | None:
    left = Counter(theirs.values())
    for node, value in ours.items():
        left[value] -= 1
        if left[value] < 0:
            return node
    return None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
