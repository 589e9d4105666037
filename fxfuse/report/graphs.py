"""Alignments as graphs: for networkx, as DOT and as GraphML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checked import checked
from .._files import write_atomically, write_text
from ..ir import Alignment
from ._shared import ALIKE, LAYER, clean, facts_of

if TYPE_CHECKING:
    import networkx as nx


def graph_of(alignment: Alignment) -> nx.DiGraph:
    """Return an alignment as a directed graph.

    A node is a layer, called `network index:layer name`, or `network index:+layer name` for a
    neutral layer to be inserted beside that layer of the reference. Attributes: `network` (its
    name), `index` (of the network), `segment` (its number), `label` (of the segment), `slot`,
    `layer`, `inserted`, and where they are known `width`, `kind` and `parameters`.

    An edge with `relation="chain"` leads from a layer to the next one of its network; one with
    `relation="aligned"` from a layer of the reference to the matched one of another network, with
    `cost` if it was measured.
    """
    import networkx as nx

    graph = nx.DiGraph(networks=list(alignment.names))
    previous: list[str | None] = [None] * len(alignment.names)
    for number, segment in enumerate(alignment.segments):
        for slot in range(len(segment.slots[0])):
            nodes = _nodes_of(alignment, number, slot)
            for k, node in enumerate(nodes):
                graph.add_node(node, **_attributes(alignment, number, k, slot))
                if previous[k] is not None:
                    graph.add_edge(previous[k], node, relation="chain")
                previous[k] = node
            for k, row in enumerate(segment.slots):
                matched = None not in (row[slot], segment.slots[segment.reference][slot])
                if k != segment.reference and matched:
                    cost = segment.cost_of(k, slot)
                    measured = {} if cost is None else {"cost": float(cost)}
                    ends = nodes[segment.reference], nodes[k]
                    graph.add_edge(*ends, relation="aligned", **measured)
    return graph


def _nodes_of(alignment: Alignment, number: int, slot: int) -> list[str]:
    """Return the names of the nodes in a slot of the segment with a number, one per network."""
    segment = alignment.segments[number]
    layers = [row[slot] for row in segment.slots]
    present = [name for name in layers if name is not None]
    beside = layers[segment.reference] or (present[0] if present else f"{number}.{slot}")
    return [f"{k}:+{beside}" if name is None else f"{k}:{name}" for k, name in enumerate(layers)]


def _attributes(alignment: Alignment, number: int, k: int, slot: int) -> dict[str, Any]:
    segment = alignment.segments[number]
    layer = segment.slots[k][slot]
    attributes = {"network": alignment.names[k], "index": k}
    attributes |= {"segment": number, "label": segment.label, "slot": slot}
    attributes |= {"layer": layer or "", "inserted": layer is None}
    facts = facts_of(alignment, k, layer)
    if facts is not None:
        attributes |= {"width": facts.width, "kind": facts.kind, "parameters": facts.parameters}
    return attributes


def dot_of(alignment: Alignment) -> str:
    """Return an alignment in the DOT language, segments as clusters; Graphviz can lay it out."""
    graph = graph_of(alignment)
    lines = ["digraph alignment {", "  rankdir=TB; node [shape=box, style=filled];"]
    for number, segment in enumerate(alignment.segments):
        lines.append(f"  subgraph cluster_{number} {{")
        lines.append(f"    label={_quoted(segment.label)};")
        for slot in range(len(segment.slots[0])):
            nodes = _nodes_of(alignment, number, slot)
            lines += [f"    {_quoted(n)} {_dot_node(graph.nodes[n])};" for n in nodes]
            lines.append("    { rank=same; " + "; ".join(map(_quoted, nodes)) + "; }")
        lines.append("  }")
    for a, b, attributes in graph.edges(data=True):
        lines.append(f"  {_quoted(a)} -> {_quoted(b)}{_dot_edge(attributes)};")
    return "\n".join([*lines, "}", ""])


def _dot_node(node: dict[str, Any]) -> str:
    if node["inserted"]:
        return '[label="inserted", style=dashed]'
    width = f", {node['width']}" if "width" in node else ""
    return f'[label={_quoted(node["layer"] + width)}, fillcolor="{LAYER}"]'


def _dot_edge(edge: dict[str, Any]) -> str:
    if edge["relation"] == "chain":
        return ""
    label = f', label="{edge["cost"]:.3f}"' if "cost" in edge else ""
    return f' [dir=none, constraint=false, color="{ALIKE}"{label}]'


def _quoted(text: str) -> str:
    return '"' + clean(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


@checked()
def save_dot(alignment: Alignment, path: str | os.PathLike[str]) -> None:
    """Write an alignment in the DOT language, in one step."""
    write_text(path, dot_of(alignment))


@checked()
def save_graphml(alignment: Alignment, path: str | os.PathLike[str]) -> None:
    """Write an alignment as GraphML by networkx, in one step."""
    import networkx as nx

    graph = nx.relabel_nodes(graph_of(alignment), clean)
    graph.graph["networks"] = ", ".join(clean(name) for name in alignment.names)
    for _, node in graph.nodes(data=True):
        node.update({key: clean(text) for key, text in node.items() if isinstance(text, str)})
    write_atomically(Path(path), lambda temporary: nx.write_graphml(graph, str(temporary)))
