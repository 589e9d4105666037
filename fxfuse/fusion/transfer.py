"""Heterogeneous model transfer: put one network's weights into the layers of another.

Along the longest chain of contractions of each network, layer for layer; filters that do not fit
are repeated or left out, kernels of another size are centred.

References:
    Wang et al. (heterogeneous model transfer), as Nguyen et al. (CLAFusion, section 4.1.1) use it.
    Difference: biases and norms of a layer move along unless told otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .._checked import checked
from ..alignment.chain import data_graph
from ..alignment.layers import module_path
from ..alignment.pairing import layers_paired
from ..calibration.data import Calibration, analyse_alike
from ..depth.deepen import check_alignment
from ..graph.calls import ToCall
from ..graph.state import tensors_of
from ..graph.trace import as_given, without_autocast
from ..ir import Alignment
from ..spaces.network import Network


@dataclass(frozen=True)
class Transferred:
    """What `transfer` did, kept in the `meta["fxfuse"]` of its result.

    Attributes:
        pairs: `(layer of the source, layer of the target)` by qualified name, in order.
    """

    pairs: tuple[tuple[str, str], ...]


@checked()
@without_autocast()
def transfer(
    source: nn.Module,
    target: nn.Module,
    data: Any,
    alignment: Alignment | None = None,
    *,
    output: bool = False,
    weights_only: bool = False,
    inputs: ToCall | None = None,
) -> fx.GraphModule:
    """Return a copy of a network with the weights of another in the layers that match.

    The layers are those on the longest chain of contractions; shortcuts beside it keep the
    target's weights, as does everything unmatched. Filter `j` of the target comes from filter
    `j mod c` of the `c` of the source, input `i` likewise.

    Args:
        source: The network whose weights are taken; not modified.
        target: The network whose structure the result has; not modified.
        data: Inputs as for `fuse`, to follow the networks on.
        alignment: Which layers match, made by `align([source, target], data)`; without it the
            layers with weights of one rank (convolutions, linear layers) match in order, the first
            with the first.
        output: Transfer the last layer too, which is usually the classifier.
        weights_only: Leave biases and norms of matched layers as the target has them.
        inputs: As for `fuse`.

    Returns:
        A `GraphModule` like the target, `meta["fxfuse"]` naming the pairs of layers.

    Raises:
        ArgumentError: If the alignment is of other networks.
        TraceError: If a model cannot be traced.
        DataError: If a model refuses the data.

    Example:
        The transfer is the first of two networks of one structure: average it with the pretrained
        target, in place (HMT + naive averaging) or by transport (HMT + OTFusion).

        >>> import fxfuse
        >>> from fxfuse.coupling import InPlace
        >>> from fxfuse.refit import AsMixed
        >>> def net(*widths):
        ...     pairs = zip((4, *widths), widths)
        ...     hidden = [m for i, o in pairs for m in (nn.Linear(i, o), nn.ReLU())]
        ...     return nn.Sequential(*hidden, nn.Linear(widths[-1], 3))
        >>> source, target, data = net(5, 5), net(8, 8, 6), torch.randn(64, 4)
        >>> moved = transfer(source, target, data)
        >>> moved.meta["fxfuse"].pairs
        (('0', '0'), ('2', '2'))
        >>> naive = fxfuse.Method(coupling=InPlace(), refit=AsMixed())
        >>> averaged = fxfuse.fuse([moved, target], data, method=naive)
        >>> fused = fxfuse.fuse([moved, target], data)

        With cross-layer alignment (HMT + CLA):

        >>> alignment = fxfuse.align([source, target], data)
        >>> aligned = transfer(source, target, data, alignment)
        >>> len(aligned.meta["fxfuse"].pairs)
        2
    """
    known = isinstance(data, Calibration)
    samples = data if known else Calibration(data, models=[source, target], to_call=inputs)
    example = samples.as_call(samples.example())
    a, b = analyse_alike([source, target], example, ["the source", "the target"])
    pairs = list(_pairs(a, b, alignment, output))
    moved = copy.deepcopy(b.module)
    given, taken = tensors_of(a.module), tensors_of(moved)
    for here, there in pairs:
        for old, new in _tensors(a, here, b, there, weights_only):
            with torch.no_grad():
                taken[new].copy_(_fitted(given[old].detach(), tuple(taken[new].shape)))
    names = tuple((module_path(x), module_path(y)) for x, y in pairs)
    moved.meta["fxfuse"] = Transferred(names)
    return as_given(target, moved)


def longest_chain(network: Network) -> list[fx.Node]:
    """Return the contractions on the path that passes through most of them."""
    graph = data_graph(network)
    for _, node, edge in graph.edges(data=True):
        edge["weight"] = int(node.name in network.weights)
    path = nx.dag_longest_path(graph, weight="weight")
    return [n for n in path if n != "source" and n.name in network.weights]


def _pairs(
    source: Network, target: Network, alignment: Alignment | None, output: bool
) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Return the contractions that match, in order."""
    networks, chains = (source, target), [longest_chain(n) for n in (source, target)]
    last = [chain[-1:] for chain in chains]
    if alignment is None:
        yield from _in_order(networks, [chain[:-1] for chain in chains])
        yield from zip(*last) if output else ()
        return
    layers = layers_paired(networks, alignment)
    check_alignment(alignment, layers)
    for segment in alignment.segments:
        for names in zip(*segment.slots):
            if None in names:
                continue
            inside = [known[name].nodes for known, name in zip(layers, names)]
            found = [[n for n in c if n.name in here] for c, here in zip(chains, inside)]
            if output or not any(end and end[0] in f for f, end in zip(found, last)):
                yield from _in_order(networks, found)


def _in_order(
    networks: tuple[Network, Network], chains: list[list[fx.Node]]
) -> list[tuple[fx.Node, fx.Node]]:
    """Pair contractions one by one, apart by the rank of their weights, in the target's order."""
    by_rank: list[dict[int, list[fx.Node]]] = []
    for network, chain in zip(networks, chains):
        state = tensors_of(network.module)
        ranks = {n: state[network.weights[n.name][0]].dim() for n in chain}
        by_rank.append({r: [n for n in chain if ranks[n] == r] for r in set(ranks.values())})
    ours, theirs = by_rank
    pairs = [p for rank in theirs for p in zip(ours.get(rank, []), theirs[rank])]
    return sorted(pairs, key=lambda p: chains[1].index(p[1]))


def _tensors(
    source: Network, here: fx.Node, target: Network, there: fx.Node, weights_only: bool
) -> Iterator[tuple[str, str]]:
    """Return the tensors of a pair of contractions that correspond."""
    yield from zip(source.weights[here.name], target.weights[there.name])
    if not weights_only:
        yield from _paired(_biases(source, here), _biases(target, there))
        yield from _paired(_norm(source, here), _norm(target, there))


def _paired(ours: list[str], theirs: list[str]) -> list[tuple[str, str]]:
    return list(zip(ours, theirs)) if len(ours) == len(theirs) else []


def _biases(network: Network, node: fx.Node) -> list[str]:
    weights = network.weights[node.name]
    return [t for t in network.tensors[node.name] if t not in weights]


def _norm(network: Network, node: fx.Node) -> list[str]:
    """Return the tensors of the norm behind a contraction, or of the one in front of it."""
    beside = [*node.users, *network.inputs_of(node)]
    norm = next((n for n in beside if network.is_norm(n)), None)
    return network.tensors.get(norm.name, []) if norm is not None else []


def _fitted(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeat or drop filters and inputs, centre kernels: any tensor as one of a given shape."""
    for d, n in enumerate(shape[:2]):
        rows = torch.arange(n, device=tensor.device) % tensor.shape[d]
        tensor = tensor.index_select(d, rows)
    borders = [(n - old) for old, n in zip(tensor.shape[2:], shape[2:])]
    pad = [side for n in reversed(borders) for side in (n // 2, n - n // 2)]
    return F.pad(tensor, pad)
