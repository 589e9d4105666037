"""Cut networks in two at layers that correspond: trunks to be fused, and heads behind them.

A network is cut at a node that every path from input to output passes through, so that one value
crosses the cut. The units of that value are free in the trunk.

References:
    Stoica et al. 2024 (ZipIt), partial zip. Difference: the networks need not have the same
    structure, neither before the cut (their layers are aligned) nor behind it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from ..alignment.layers import partition
from ..depth.deepen import check_alignment
from ..errors import ArgumentError, PairingError
from ..graph.module import Graph
from ..ir import Alignment, Layer, Segment
from ..spaces.network import OPEN, Network

AUTO = "auto"  # in place of a layer to cut behind: the cut is to be chosen


@dataclass(frozen=True, eq=False)
class Head:
    """What a network does behind the value at which it is cut.

    Attributes:
        name: How the network is called.
        module: Takes that value, and then some of the network's inputs.
        inputs: The indices of these inputs; it reads them for their sizes only.
        dim: The axis of the units that it returns, None if it does not return one tensor of units.
    """

    name: str
    module: fx.GraphModule
    inputs: tuple[int, ...]
    dim: int | None


def trunk_segments(
    networks: Sequence[Network], anchor: int, after: str | None
) -> list[tuple[Segment, ...]]:
    """Return the segments of each network in front of a cut, with the one that is cut.

    Args:
        networks: The whole networks.
        anchor: The network whose layer `after` is.
        after: The layer behind which to cut, or a module whose last layer is meant; the last but
            one of each network if not given, or if it is to be chosen.

    Raises:
        ArgumentError: If the anchor has no such layer, or a network has a single layer.
    """
    parts = [partition(n) for n in networks]
    layers = [[x for s in segments for x in s.layers] for segments in parts]
    last = None if after == AUTO else _last_layer(networks, layers, anchor, after)
    if last is None:
        return [segments[:-1] for segments in parts]
    end = next(i for i, s in enumerate(parts[anchor]) if last in [x.name for x in s.layers]) + 1
    return [segments[:end] for segments in parts]


def cut_networks(
    networks: Sequence[Network], alignment: Alignment, anchor: int, after: str | None
) -> tuple[list[Network], Alignment, list[Head]]:
    """Cut networks behind layers that an alignment says correspond.

    Args:
        networks: The whole networks; not modified.
        alignment: Of their layers, at least of those in front of the cut.
        anchor: The network whose layer `after` is.
        after: The layer behind which to cut, or a module whose last layer is meant; if not given,
            each network is cut just before its last layer.

    Returns:
        The trunks, the alignment of their layers, and the heads.

    Raises:
        ArgumentError: If the anchor has no such layer, a network has none that corresponds, or a
            single layer; or if the alignment is of other networks.
        PairingError: If more than one value crosses the cut in a network.
    """
    layers = [[x for s in partition(n) for x in s.layers] for n in networks]
    last = _last_layer(networks, layers, anchor, after)
    if last is None:
        kept = [chain[:-1] for chain in layers]
        cuts = [chain[-1].entry for chain in layers]
    else:
        names = _counterparts(networks, layers, alignment, anchor, last)
        ends = [[x.name for x in chain].index(n) + 1 for chain, n in zip(layers, names)]
        kept = [chain[:end] for chain, end in zip(layers, ends)]
        cuts = [chain[-1].nodes[-1] for chain in kept]
    heads = [_head(n, at) for n, at in zip(networks, cuts)]
    trunks = [Network.of(n.name, _trunk(n.module, at), n.example) for n, at in zip(networks, cuts)]
    return trunks, _in_front(alignment, kept), heads


def _last_layer(
    networks: Sequence[Network], layers: Sequence[Sequence[Layer]], anchor: int, after: str | None
) -> str | None:
    """Return the last layer of the anchor in front of the cut; None if it is the last but one."""
    for network, chain in zip(networks, layers):
        if len(chain) < 2:
            raise ArgumentError(
                "a network of fewer than two layers",
                where=f"the argument `heads`, {network.name}",
                expected="a layer to fuse in front of the last one",
                do="leave `heads` out, or cut networks of more layers",
            )
    if after is None:
        return None
    names = [x.name for x in layers[anchor]]
    inside = [n for n in names if n == after or n.startswith(f"{after}.")]
    if not inside or inside[-1] == names[-1]:
        raise ArgumentError(
            f"a cut behind {after!r}, which is {'the last' if inside else 'not a'} layer",
            where=f"the argument `heads`, {networks[anchor].name}, whose widths the result takes",
            expected="a layer that another one follows: " + ", ".join(names[:-1]),
            do="name one of these, or leave `after` out to cut just before the last layer",
        )
    return inside[-1]


def _counterparts(
    networks: Sequence[Network],
    layers: Sequence[Sequence[Layer]],
    alignment: Alignment,
    anchor: int,
    last: str,
) -> list[str]:
    """Return the layer of each network that is aligned with one of the anchor's."""
    rows = [names for s in alignment.segments if len(s.slots) > anchor for names in zip(*s.slots)]
    row = next((r for r in rows if r[anchor] == last), ())
    exist = [n is None or n in {x.name for x in chain} for n, chain in zip(row, layers)]
    if len(row) != len(networks) or not all(exist):
        check_alignment(alignment, [{x.name: x for x in chain} for chain in layers])
    if None in row:
        common = [r[anchor] for r in rows if None not in r and r[anchor] != layers[anchor][-1].name]
        lacks = networks[row.index(None)].name
        raise ArgumentError(
            f"a cut behind '{last}', a layer that {lacks} does not have",
            where=f"the argument `heads`; the alignment pairs it with no layer of {lacks}",
            expected=f"a layer that all networks have: {', '.join(common) or 'there is none'}",
            do="cut behind one of these, or give an alignment that pairs this layer",
        )
    return list(row)


def _in_front(alignment: Alignment, kept: Sequence[Sequence[Layer]]) -> Alignment:
    """Return the part of an alignment that is about the layers in front of the cut."""
    names = [{x.name for x in chain} for chain in kept]
    segments = []
    for s in alignment.segments:
        rows = [i for i, row in enumerate(zip(*s.slots)) if any(x in n for x, n in zip(row, names))]
        if not rows:
            continue
        end = rows[-1] + 1
        slots = tuple(row[:end] for row in s.slots)
        counts = [sum(x is not None for x in row) for row in slots]
        costs = [
            None if c is None else tuple(row[:n] for row in c[:end])
            for c, n in zip(s.costs, counts)
        ]
        segments.append(replace(s, slots=slots, costs=tuple(costs)))
    return replace(alignment, segments=tuple(segments))


# --- the two parts of a graph ---------------------------------------------------------------------


def _trunk(module: fx.GraphModule, at: str) -> fx.GraphModule:
    """Return the part of a graph up to a node, whose value it returns with its units free."""
    graph = copy.deepcopy(module.graph)
    nodes, output = list(graph.nodes), graph.output_node()
    cut = next(n for n in nodes if n.name == at)
    read = {n for n in nodes if n.users}
    output.args, output.meta = (cut,), {OPEN: True}
    for node in reversed(nodes[nodes.index(cut) + 1 :]):
        if node is not output:
            graph.erase_node(node)
    for node in reversed(nodes[: nodes.index(cut)]):
        if node in read and not node.users and node.op != "placeholder":
            graph.erase_node(node)  # a weight, a size or a flag that only the head reads
    return Graph(module, graph, type(module).__name__)


def _head(network: Network, at: str) -> Head:
    """Return the part of a graph behind a node, with what it needs of weights, sizes and flags."""
    if not network.shapes[at]:
        raise _crossing(network, at, at, "several tensors at once")
    graph = copy.deepcopy(network.module.graph)
    nodes, fed = list(graph.nodes), network.fed()
    placeholders = [n for n in nodes if n.op == "placeholder"]
    cut = next(n for n in nodes if n.name == at)
    front = nodes[: nodes.index(cut) + 1]
    with graph.inserting_before(nodes[0]):
        value = graph.placeholder("features")
    cut.replace_all_uses_with(value)
    read = []
    for node in reversed(front):
        if node.users:
            read.append(node)
        else:
            graph.erase_node(node)
    for node in read:
        if node.name in fed and node.op != "placeholder" and network.carries_data(node):
            raise _crossing(network, at, node.name, "a second value (at least its size)")
    inputs = tuple(i for i, node in enumerate(placeholders) if node in read)
    return Head(network.name, Graph(network.module, graph, "Head"), inputs, output_axis(network))


def output_axis(network: Network) -> int | None:
    """Return the axis of the units that a network returns, None if it is not one such tensor."""
    returned = network.module.graph.output_node().args[0]
    return network.feature_axis(returned) if isinstance(returned, fx.Node) else None


def _crossing(network: Network, at: str, node: str, what: str) -> PairingError:
    return PairingError(
        f"{what} read behind the cut: '{node}'",
        where=f"{network.name}, cut at '{at}'",
        expected="one tensor that crosses the cut",
        do="cut behind another layer",
    )
