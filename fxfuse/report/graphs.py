"""Alignments as graphs: for networkx, as DOT and as GraphML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_atomically, write_text
from ..ir import Alignment
from ._shared import clean

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
    last: list[str | None] = [None] * len(alignment.names)
    for at, segment in enumerate(alignment.segments):
        for i in range(len(segment.slots[0])):
            here = [_node_name(alignment, at, k, i) for k in range(len(segment.slots))]
            for k, name in enumerate(here):
                graph.add_node(name, **_attributes(alignment, at, k, i))
                if last[k] is not None:
                    graph.add_edge(last[k], name, relation="chain")
                last[k] = name
            for k, row in enumerate(segment.slots):
                matched = None not in (row[i], segment.slots[segment.reference][i])
                if k != segment.reference and matched:
                    cost = segment.cost_of(k, i)
                    facts = {} if cost is None else {"cost": float(cost)}
                    graph.add_edge(here[segment.reference], here[k], relation="aligned", **facts)
    return graph


def _node_name(alignment: Alignment, at: int, k: int, slot: int) -> str:
    segment = alignment.segments[at]
    name = segment.slots[k][slot]
    if name is not None:
        return f"{k}:{name}"
    present = [row[slot] for row in segment.slots if row[slot] is not None]
    beside = segment.slots[segment.reference][slot] or (present[0] if present else f"{at}.{slot}")
    return f"{k}:+{beside}"


def _attributes(alignment: Alignment, at: int, k: int, slot: int) -> dict[str, Any]:
    segment = alignment.segments[at]
    name = segment.slots[k][slot]
    known = alignment.facts[k].get(name) if alignment.facts and name is not None else None
    found = {"network": alignment.names[k], "index": k, "segment": at, "label": segment.label}
    found |= {"slot": slot, "layer": name or "", "inserted": name is None}
    if known is not None:
        found |= {"width": known.width, "kind": known.kind, "parameters": known.parameters}
    return found


def dot_of(alignment: Alignment) -> str:
    """Return an alignment in the DOT language, segments as clusters; Graphviz can lay it out."""
    graph = graph_of(alignment)
    lines = ["digraph alignment {", "  rankdir=TB; node [shape=box, style=filled];"]
    for at, segment in enumerate(alignment.segments):
        lines.append(f"  subgraph cluster_{at} {{")
        lines.append(f"    label={_quoted(segment.label)};")
        for i in range(len(segment.slots[0])):
            names = [_node_name(alignment, at, k, i) for k in range(len(segment.slots))]
            lines += [f"    {_quoted(n)} {_style(graph.nodes[n])};" for n in names]
            lines.append("    { rank=same; " + "; ".join(map(_quoted, names)) + "; }")
        lines.append("  }")
    for a, b, facts in graph.edges(data=True):
        lines.append(f"  {_quoted(a)} -> {_quoted(b)}{_edge_style(facts)};")
    return "\n".join([*lines, "}", ""])


def _style(node: dict[str, Any]) -> str:
    if node["inserted"]:
        return '[label="inserted", style=dashed]'
    width = f", {node['width']}" if "width" in node else ""
    return f'[label={_quoted(node["layer"] + width)}, fillcolor="#dce9f5"]'


def _edge_style(facts: dict[str, Any]) -> str:
    if facts["relation"] == "chain":
        return ""
    label = f', label="{facts["cost"]:.3f}"' if "cost" in facts else ""
    return f' [dir=none, constraint=false, color="#2668ac"{label}]'


def _quoted(text: str) -> str:
    return '"' + clean(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def save_dot(alignment: Alignment, path: str | os.PathLike[str]) -> None:
    """Write an alignment in the DOT language, in one step."""
    write_text(path, dot_of(alignment))


def save_graphml(alignment: Alignment, path: str | os.PathLike[str]) -> None:
    """Write an alignment as GraphML by networkx, in one step."""
    import networkx as nx

    graph = nx.relabel_nodes(graph_of(alignment), clean)
    graph.graph["networks"] = ", ".join(clean(n) for n in alignment.names)
    for _, facts in graph.nodes(data=True):
        facts.update({k: clean(v) for k, v in facts.items() if isinstance(v, str)})
    write_atomically(Path(path), lambda temporary: nx.write_graphml(graph, str(temporary)))
