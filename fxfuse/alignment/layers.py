"""Cut a network into its chain, layers and segments, from the graph alone.

The nodes that every path from input to output passes through form the chain. Between two
neighbours on the chain lies either nothing or a region with parallel paths (a block). A layer is a
step of the chain that contracts parameters, with the norm and activation behind it. A segment is a
maximal run of layers on one kind of tensor at one output resolution. The layer that writes the
output is a segment of its own.
"""

from __future__ import annotations

import hashlib
import operator
from itertools import groupby
from typing import NamedTuple

import networkx as nx
from torch import fx
from torch.utils._pytree import tree_leaves

from ..errors import ModelError
from ..graph.modes import is_choice, only_in_training
from ..ir import Layer, Segment
from ..spaces.network import Network


class _Step(NamedTuple):
    """A step of the chain: from one node to the next, and the nodes between them."""

    entry: fx.Node
    region: list[fx.Node]
    exit: fx.Node


def partition(network: Network) -> tuple[Segment, ...]:
    """Return the segments of a network in the order of its chain."""
    layers = _layers(network)
    if not layers:
        return ()
    runs = [list(g) for _, g in groupby(layers[:-1], key=lambda x: (x.layout, x.resolution))]
    return tuple(Segment(tuple(run)) for run in [*runs, [layers[-1]]])


def chain_of(network: Network) -> tuple[str, ...]:
    """Return the nodes that every path from input to output passes through, in order."""
    steps = _chain(network)
    return tuple(n.name for n in [*(s.entry for s in steps[:1]), *(s.exit for s in steps)])


def data_graph(network: Network) -> nx.DiGraph:
    """Return the nodes that carry data and their edges, from one source to the output.

    Heads that exist in training mode only are left out, as no path of eval mode ends in them.
    """
    graph, training_only = nx.DiGraph(), only_in_training(network.module)
    for node in network.module.graph.nodes:
        if node in training_only:
            continue
        if node.op == "placeholder":
            graph.add_edge("source", node)
        elif node.op == "output" or network.carries_data(node):
            sources = [n for n in _evaluated(network, node) if n not in training_only]
            graph.add_edges_from((n, node) for n in sources)
    output = next(n for n in network.module.graph.nodes if n.op == "output")
    if output not in graph or "source" not in nx.ancestors(graph, output):
        raise ModelError(
            "an output that does not depend on the input",
            where=network.name,
            expected="a network that computes what it returns from what it is given",
            do="check what the forward returns, and with which options the model was built",
        )
    on_paths = nx.descendants(graph, "source") & (nx.ancestors(graph, output) | {output})
    return graph.subgraph(on_paths | {"source"}).copy()


def _evaluated(network: Network, node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose data a node reads in eval mode."""
    sources = []
    for source in network.inputs_of(node):
        if is_choice(network.module, source):
            sources += [n for n in tree_leaves(source.args[0]) if isinstance(n, fx.Node)]
        else:
            sources.append(source)
    return sources


def _chain(network: Network) -> list[_Step]:
    graph = data_graph(network)
    dominator = nx.immediate_dominators(graph, "source")
    output = next(n for n in graph if n != "source" and n.op == "output")
    chain = [output]
    while dominator[chain[-1]] != "source" and dominator[chain[-1]] is not None:
        chain.append(dominator[chain[-1]])
    chain.reverse()
    on_chain = set(chain)
    regions: dict[fx.Node, list[fx.Node]] = {n: [] for n in chain}
    for node in network.module.graph.nodes:
        if node in graph and node not in on_chain:
            entry = dominator[node]
            while entry not in on_chain and entry != "source":
                entry = dominator[entry]
            if entry != "source":
                regions[entry].append(node)
    return [_Step(a, regions[a], b) for a, b in zip(chain, chain[1:])]


def _layers(network: Network) -> list[Layer]:
    steps, i = _chain(network), 0
    layers: list[Layer] = []
    while i < len(steps):
        step = steps[i]
        i += 1
        if not any(n.name in network.weights for n in [*step.region, step.exit]):
            continue
        nodes = [*step.region, step.exit]
        while i < len(steps) and _picks_output(network, steps[i]):
            nodes.append(steps[i].exit)
            i += 1
        pre_activation = nodes[-1]
        while i < len(steps) and _follows_layer(network, steps[i]):
            node = steps[i].exit
            if pre_activation is nodes[-1] and not network.is_activation(node):
                pre_activation = node
            nodes.append(node)
            i += 1
        taken = {x.name for x in layers}
        layers.append(_layer(network, step, nodes, pre_activation, taken))
    return layers


def _picks_output(network: Network, step: _Step) -> bool:
    """Tell whether a step picks one of several tensors that a module returns, as of an LSTM."""
    returns_several = network.shapes.get(step.entry.name) == ()
    return returns_several and not step.region and step.exit.target is operator.getitem


def _follows_layer(network: Network, step: _Step) -> bool:
    """Tell whether a step is the norm, activation or dropout behind a layer."""
    if step.region or step.exit.op == "output":
        return False
    node, shapes = step.exit, network.shapes
    belongs = network.is_norm(node) or network.is_activation(node) or network.is_idle(node)
    return belongs and shapes.get(node.name) == shapes.get(step.entry.name)


def _layer(
    network: Network, step: _Step, nodes: list[fx.Node], pre_activation: fx.Node, taken: set[str]
) -> Layer:
    shape = network.shapes.get(nodes[-1].name, ())
    dim = _feature_axis(network, nodes[-1], len(shape))
    return Layer(
        name=_name(network, nodes, taken),
        kind=_kind(network, step.entry, nodes),
        nodes=tuple(n.name for n in nodes),
        entry=step.entry.name,
        merge=step.exit.name,
        pre_activation=pre_activation.name,
        producers=tuple(n.name for n in nodes if n.name in network.weights),
        branched=bool(step.region),
        resolution=tuple(n for d, n in enumerate(shape) if d not in (0, dim)),
        layout=(len(shape), dim),
        width=shape[dim] if shape else 0,
    )


def _feature_axis(network: Network, node: fx.Node, rank: int) -> int:
    axis = network.feature_axis(node)
    if axis is not None:
        return axis
    return 1 if rank in (2, 4, 5) else rank - 1


def _name(network: Network, nodes: list[fx.Node], taken: set[str]) -> str:
    """Name a layer by the module that holds its contractions, in a way that no other layer has."""
    paths = [module_path(n) for n in nodes if n.name in network.weights]
    common = paths[0].split(".")
    for path in paths[1:]:
        parts = path.split(".")
        same = [a == b for a, b in zip(common, parts)]
        common = common[: same.index(False) if False in same else len(same)]
    name = ".".join(common)
    if name and name not in taken:
        return name
    joined = f"{paths[0]}..{paths[-1]}" if len(paths) > 1 else paths[0]
    return joined if joined and joined not in taken else f"{joined}@{nodes[0].name}"


def module_path(node: fx.Node) -> str:
    """Return the qualified name of the module that a node belongs to."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack), "").split("@")[0] or node.name


def describe(network: Network, node: fx.Node) -> str:
    """Return which operators a node runs, without widths; the same however the code spells it."""
    return repr(network.steps(node))


def _kind(network: Network, entry: fx.Node, nodes: list[fx.Node]) -> str:
    """Hash what a layer computes from its entry, so that equal structures have equal kinds."""
    hashes = {entry: "entry"}
    for node in nodes:
        inputs = [hashes.get(n, "outside") for n in network.inputs_of(node)]
        if network.commutes(node):
            inputs.sort()
        text = f"{describe(network, node)}({','.join(inputs)})"
        hashes[node] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{_summary(network, nodes)} [{hashes[nodes[-1]][:8]}]"


def _summary(network: Network, nodes: list[fx.Node]) -> str:
    """Name the operators of nodes, as "conv3x3, batch_norm, relu"."""
    return ", ".join(step.word for n in nodes for step in network.steps(n) if step.word)
