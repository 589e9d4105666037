"""Cut a network into its chain, layers and segments, from the graph alone.

The nodes that every path from input to output passes through form the chain. Between two
neighbours on the chain lies either nothing or a region with parallel paths (a block). A layer is a
step of the chain that contracts parameters, with the norm and activation behind it. A segment is a
maximal run of layers on one kind of tensor at one output resolution. The layer that writes the
output is a segment of its own.
"""

from __future__ import annotations

import operator
from itertools import groupby, takewhile
from typing import NamedTuple

import networkx as nx
from torch import fx
from torch.utils._pytree import tree_leaves

from ..errors import ModelError
from ..graph.modes import is_choice, only_in_training
from ..ir import Layer, Segment
from ..spaces.network import Network
from .normal_form import NormalForm


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
    steps = _chain(NormalForm(network))
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


def _stream_graph(form: NormalForm) -> nx.DiGraph:
    """Return the data graph, but for given values (masks, positions) beside those of other nodes.

    What the first parameters read belongs to it wherever it is read again.
    """
    graph, given = data_graph(form.network), form.given
    streams = set(graph) - {"source"} - given
    first = {n for n in streams if given.issuperset(_nodes_before(graph, n))}
    read_first = {source for n in first for source in nx.ancestors(graph, n)}
    for node in streams - first:
        sources = _nodes_before(graph, node)
        beside = [(n, node) for n in sources if n in given and form.source(n) not in read_first]
        graph.remove_edges_from(beside)
    output = form.network.module.graph.output_node()
    return graph.subgraph(nx.ancestors(graph, output) | {output}).copy()


def _nodes_before(graph: nx.DiGraph, node: fx.Node) -> list[fx.Node]:
    return [n for n in graph.predecessors(node) if n != "source"]


def _chain(form: NormalForm) -> list[_Step]:
    graph = _stream_graph(form)
    dominator = nx.immediate_dominators(graph, "source")
    output = next(n for n in graph if n != "source" and n.op == "output")
    chain = [output]
    while dominator[chain[-1]] != "source" and dominator[chain[-1]] is not None:
        chain.append(dominator[chain[-1]])
    chain.reverse()
    on_chain = set(chain)
    regions: dict[fx.Node, list[fx.Node]] = {n: [] for n in chain}
    for node in form.network.module.graph.nodes:
        if node in graph and node not in on_chain:
            entry = dominator[node]
            while entry not in on_chain and entry != "source":
                entry = dominator[entry]
            if entry != "source":
                regions[entry].append(node)
    return [_Step(a, regions[a], b) for a, b in zip(chain, chain[1:])]


def _layers(network: Network) -> list[Layer]:
    form, taken = NormalForm(network), set[str]()
    layers: list[Layer] = []
    for part in _without_norms_of_their_own(form, _parts(form)):
        layers.append(_layer(form, part, taken))
        taken.add(layers[-1].name)
    return layers


class _Part(NamedTuple):
    """The nodes of a layer: its step of the chain, and what follows it there."""

    step: _Step
    nodes: list[fx.Node]
    tail: list[fx.Node]


def _parts(form: NormalForm) -> list[_Part]:
    """Return the steps that contract parameters, each with the norms and activations behind it."""
    network, steps, i = form.network, _chain(form), 0
    parts = []
    while i < len(steps):
        step = steps[i]
        i += 1
        if not any(n.name in network.weights for n in [*step.region, step.exit]):
            continue
        part = _Part(step, [*step.region, step.exit], [])
        while i < len(steps) and _picks_output(network, steps[i]):
            part.nodes.append(steps[i].exit)
            i += 1
        while i < len(steps) and _follows_layer(network, steps[i]):
            part.tail.append(steps[i].exit)
            i += 1
        parts.append(part)
    return parts


def _without_norms_of_their_own(form: NormalForm, parts: list[_Part]) -> list[_Part]:
    """Cut off the norm behind a layer that is a step of its own, as behind the last of some blocks.

    It is one if layers that are the same but for it have none, or if the block has a norm in front.
    """
    ends = [_second_norm(form.network, part) for part in parts]
    plain = {
        _kind(form, part.step.entry, [*part.nodes, *part.tail])
        for part, end in zip(parts, ends)
        if end is None
    }
    cut = []
    for part, end in zip(parts, ends):
        bare = part._replace(tail=part.tail[:end])
        own = _kind(form, part.step.entry, [*part.nodes, *bare.tail]) in plain
        cut.append(bare if own or _norm_in_front(form, part.step) else part)
    return cut


def _second_norm(network: Network, part: _Part) -> int | None:
    """Return where in the tail there is a norm behind a block's join or behind an activation."""
    for i, node in enumerate(part.tail):
        behind = part.step.region or any(map(network.is_activation, part.tail[:i]))
        if behind and network.is_norm(node):
            return i
    return None


def _norm_in_front(form: NormalForm, step: _Step) -> bool:
    """Tell whether all that a block's branches read of the entry goes through norms."""
    entry, network = form.source(step.entry), form.network
    readers = [n for n in step.region if form.counts(n) and entry in form.inputs_of(n)]
    return bool(readers) and all(map(network.is_norm, readers))


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


def _layer(form: NormalForm, part: _Part, taken: set[str]) -> Layer:
    network, step, nodes = form.network, part.step, [*part.nodes, *part.tail]
    firsts = takewhile(lambda n: not network.is_activation(n), part.tail)
    pre_activation = [part.nodes[-1], *firsts][-1]
    shape = network.shapes.get(nodes[-1].name, ())
    dim = _feature_axis(network, nodes[-1], len(shape))
    samples = [axis for axis in network.samples_axes(nodes[-1]) if axis != dim] or [0]
    return Layer(
        name=_name(network, nodes, taken),
        kind=_kind(form, step.entry, nodes),
        nodes=tuple(n.name for n in nodes),
        entry=step.entry.name,
        merge=step.exit.name,
        pre_activation=pre_activation.name,
        producers=tuple(n.name for n in nodes if n.name in network.weights),
        branched=bool(step.region),
        resolution=tuple(n for d, n in enumerate(shape) if d not in (samples[0], dim)),
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


def _kind(form: NormalForm, entry: fx.Node, nodes: list[fx.Node]) -> str:
    """Hash what a layer computes from its entry, so that equal structures have equal kinds."""
    hashes = {entry: "entry"}
    for node in nodes:
        inputs = [hashes.get(n) or form.hash_given(n) for n in form.network.inputs_of(node)]
        hashes[node] = form.hash_of(node, inputs) if form.counts(node) else inputs[0]
    return f"{', '.join(_summary(form, nodes[-1], hashes))} [{hashes[nodes[-1]][:8]}]"


def _summary(form: NormalForm, last: fx.Node, hashes: dict[fx.Node, str]) -> list[str]:
    """Name the operators up to a node, as "conv3x3, relu", branch by branch in a fixed order."""
    words: list[str] = []
    waiting, seen = [last], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen or node not in hashes or hashes[node] == "entry":
            continue
        seen.add(node)
        waiting += sorted(form.network.inputs_of(node), key=lambda n: hashes.get(n, ""))
        if form.counts(node):
            words += [step.word for step in reversed(form.network.steps(node)) if step.word]
    return words[::-1]
