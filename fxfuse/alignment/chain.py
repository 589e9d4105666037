"""The chain of a network: the nodes that every path from its input to its output passes through.

Between two neighbours on the chain lies either nothing or a region with parallel paths. Inside a
region there are chains again, one for each of its parallel paths. If many of its nodes read one
value, such as the output of an encoder, there is a chain up to this value and one past it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import networkx as nx
from torch import fx
from torch.utils._pytree import tree_leaves

from ..errors import ModelError
from ..graph.modes import is_choice, only_in_training
from ..spaces.network import Network
from .normal_form import NormalForm

SOURCE: Literal["source"] = "source"  # what stands in front of all inputs

End = fx.Node | Literal["source"]


@dataclass(frozen=True, eq=False)
class Step:
    """A step of a chain: from one node to the next, and the nodes between them.

    Attributes:
        entry: The node whose value it reads; `SOURCE` in front of the first node of all paths.
        region: The nodes between, in graph order.
        exit: The next node.
    """

    entry: End
    region: list[fx.Node]
    exit: fx.Node


Chain = list[Step]


def data_graph(network: Network) -> nx.DiGraph:
    """Return the nodes that carry data and their edges, from one source to the output.

    Heads that exist in training mode only are left out, as no path of eval mode ends in them.
    """
    graph, training_only = nx.DiGraph(), only_in_training(network.module)
    for node in network.module.graph.nodes:
        if node in training_only:
            continue
        if node.op == "placeholder":
            graph.add_edge(SOURCE, node)
        elif node.op == "output" or network.carries_data(node):
            sources = [n for n in _evaluated(network, node) if n not in training_only]
            graph.add_edges_from((n, node) for n in sources)
    output = next(n for n in network.module.graph.nodes if n.op == "output")
    if output not in graph or SOURCE not in nx.ancestors(graph, output):
        raise ModelError(
            "an output that does not depend on the input",
            where=network.name,
            expected="a network that computes what it returns from what it is given",
            do="check what the forward returns, and with which options the model was built",
        )
    on_paths = nx.descendants(graph, SOURCE) & (nx.ancestors(graph, output) | {output})
    return graph.subgraph(on_paths | {SOURCE}).copy()


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
    """Return the data graph without what nodes read beside others: masks, positions, see `beside`.

    The exception is what the first parameters read: it stays wherever it is read again.
    """
    graph, given = data_graph(form.network), form.beside
    streams = set(graph) - {SOURCE} - given
    first = {n for n in streams if given.issuperset(_nodes_before(graph, n))}
    read_first = {source for n in first for source in nx.ancestors(graph, n)}
    for node in streams - first:
        sources = _nodes_before(graph, node)
        beside = [(n, node) for n in sources if n in given and form.source(n) not in read_first]
        graph.remove_edges_from(beside)
    output = form.network.module.graph.output_node()
    return graph.subgraph(nx.ancestors(graph, output) | {output}).copy()


def _nodes_before(graph: nx.DiGraph, node: fx.Node) -> list[fx.Node]:
    return [n for n in graph.predecessors(node) if n != SOURCE]


def chain_steps(form: NormalForm) -> Chain:
    """Return the steps of a network's chain, the one from its inputs to its first node included."""
    output = form.network.module.graph.output_node()
    return _steps(form, _stream_graph(form), SOURCE, output)


def chain_between(form: NormalForm, entry: fx.Node, nodes: Collection[fx.Node]) -> Chain:
    """Return the steps of the chain from a node to the last of some nodes behind it."""
    end = [n for n in form.network.module.graph.nodes if n in nodes and n.users][-1]
    return _steps(form, _stream_graph(form).subgraph([entry, *nodes]), entry, end)


def chains_inside(form: NormalForm, step: Step) -> Iterator[list[Chain]]:
    """Yield the chains inside a step, in each way to take it apart; the most layers first."""
    graph = _stream_graph(form).subgraph([step.entry, *step.region, step.exit]).copy()
    if graph.has_edge(step.entry, step.exit):
        graph.remove_edge(step.entry, step.exit)
    places = {node: i for i, node in enumerate(form.network.module.graph.nodes)}
    inner = graph.subgraph(step.region)
    paths = sorted(nx.weakly_connected_components(inner), key=lambda c: min(places[n] for n in c))
    chains: list[Chain] = []
    for path in paths:
        part = graph.subgraph([step.entry, *path, step.exit])
        if nx.has_path(part, step.entry, step.exit):
            chains.append(_steps(form, part, step.entry, step.exit))
    if any(len(chain) > 1 for chain in chains) or len(chains) > 1:
        yield chains
    elif chains:
        yield from _past_a_value(form, graph, step)


def _past_a_value(form: NormalForm, graph: nx.DiGraph, step: Step) -> Iterator[list[Chain]]:
    """Yield the chain up to a value of a region and the chain past it, for each such value."""
    ways: list[tuple[int, list[Chain]]] = []
    for value in step.region:
        past = graph.copy()
        past.remove_edges_from(list(graph.out_edges(value)))
        if step.exit not in nx.descendants(past, step.entry):
            continue
        main = _steps(form, past, step.entry, step.exit)
        if len(main) > 1 and any(_contracts(form, s) for s in main):
            main = _with_branches(form, graph, value, main)
            inside = {node for s in main for node in (*s.region, s.exit)}
            side = [s for s in _steps(form, graph, step.entry, value) if s.exit not in inside]
            if all(inside.isdisjoint(s.region) for s in side):
                way = [side, main]
                ways.append((sum(_contracts(form, s) for chain in way for s in chain), way))
    for _, way in sorted(ways, key=lambda pair: -pair[0]):
        yield way


def _with_branches(form: NormalForm, graph: nx.DiGraph, value: fx.Node, main: Chain) -> Chain:
    """Put what is made of a value into the steps that read it.

    Steps that read one of these nodes are joined, if no more than one of them contracts parameters.
    """
    owners = {node: i for i, step in enumerate(main) for node in (*step.region, step.exit)}
    contracts = [_contracts(form, step) for step in main]
    behind = nx.descendants(graph, value) - owners.keys()
    for node in reversed(form.network.module.graph.nodes):
        if node not in behind:
            continue
        readers = [owners[n] for n in graph.successors(node) if n in owners]
        if not 0 < len(readers) == graph.out_degree(node):
            continue
        first, last = min(readers), max(readers)
        if sum(contracts[first : last + 1]) > 1:
            continue
        owners |= {n: last for n, i in owners.items() if first <= i <= last}
        owners[node] = last
        contracts[first : last + 1] = [False] * (last - first) + [
            any(contracts[first : last + 1]) or node.name in form.network.weights
        ]
    nodes: dict[int, list[fx.Node]] = {}
    for node in form.network.module.graph.nodes:
        if node in owners:
            nodes.setdefault(owners[node], []).append(node)
    ends = [main[i].exit for i in sorted(nodes)]
    regions = [[n for n in nodes[i] if n is not main[i].exit] for i in sorted(nodes)]
    return [Step(*parts) for parts in zip([main[0].entry, *ends], regions, ends)]


def _contracts(form: NormalForm, step: Step) -> bool:
    return any(n.name in form.network.weights for n in (*step.region, step.exit))


def _steps(form: NormalForm, graph: nx.DiGraph, start: End, end: fx.Node) -> Chain:
    """Return the steps of the chain between two nodes of a graph."""
    behind = nx.descendants(graph, start) | {start}
    graph = graph.subgraph(behind & (nx.ancestors(graph, end) | {end}))
    dominator = nx.immediate_dominators(graph, start)
    chain: list[End] = [end]
    while chain[-1] != start:
        chain.append(dominator[chain[-1]])
    chain.reverse()
    regions: dict[End, list[fx.Node]] = {n: [] for n in chain}
    for node in form.network.module.graph.nodes:
        if node in graph and node not in regions:
            entry = dominator[node]
            while entry not in regions:
                entry = dominator[entry]
            regions[entry].append(node)
    pairs = zip(chain, chain[1:])
    return [Step(a, regions[a], b) for a, b in pairs if isinstance(b, fx.Node)]
