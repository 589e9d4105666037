"""Alignments as graphs."""

import re
import shutil
import subprocess

import networkx as nx
import pytest
from hypothesis import given

from tests.support.alignments import EXAMPLE, alignments, layers_of


@given(alignments())
def test_a_graph_holds_every_layer_once_and_one_chain_per_network(alignment):
    graph = alignment.to_networkx()
    nodes = dict(graph.nodes(data=True))
    layers = sorted((n["index"], n["layer"]) for n in nodes.values() if not n["inserted"])
    assert layers == sorted(layers_of(alignment))
    slots = sum(len(s.slots[0]) for s in alignment.segments)
    assert len(nodes) == slots * len(alignment.names)
    chain = nx.DiGraph((a, b) for a, b, e in graph.edges(data=True) if e["relation"] == "chain")
    for k in range(len(alignment.names)):
        path = [n for n in graph if nodes[n]["index"] == k]
        assert len(path) == 1 or nx.is_path(chain, path)
        slots_in_order = [(nodes[n]["segment"], nodes[n]["slot"]) for n in path]
        assert slots_in_order == sorted(slots_in_order)


@given(alignments())
def test_aligned_pairs_have_the_costs_of_the_alignment(alignment):
    graph = alignment.to_networkx()
    drawn = {
        (graph.nodes[a]["layer"], graph.nodes[b]["layer"]): e.get("cost")
        for a, b, e in graph.edges(data=True)
        if e["relation"] == "aligned"
    }
    expected = {}
    for s in alignment.segments:
        for k, row in enumerate(s.slots):
            for i, name in enumerate(row):
                other = s.slots[s.reference][i]
                if k != s.reference and None not in (name, other):
                    expected[other, name] = s.cost_of(k, i)
    assert drawn == expected


@given(alignments())
def test_graphml_reads_back(tmp_path_factory, alignment):
    path = tmp_path_factory.mktemp("graph") / "a.graphml"
    alignment.save_graphml(path)
    back, graph = nx.read_graphml(path), alignment.to_networkx()
    assert (len(back), back.number_of_edges()) == (len(graph), graph.number_of_edges())
    assert [n["inserted"] for _, n in back.nodes(data=True)] == [
        n["inserted"] for _, n in graph.nodes(data=True)
    ]


def test_nodes_have_the_facts_of_their_layers():
    nodes = EXAMPLE.to_networkx().nodes
    assert nodes["0:a2"]["width"] == 20 and nodes["0:a2"]["parameters"] == 2000
    assert nodes["1:+a2"] == {
        "network": "shallow",
        "index": 1,
        "segment": 0,
        "label": "8x8 positions",
        "slot": 1,
        "layer": "",
        "inserted": True,
    }


@given(alignments())
def test_dot_is_well_formed(alignment):
    text = alignment.to_dot()
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "q", text)
    assert '"' not in bare
    assert bare.count("{") == bare.count("}") and bare.count("[") == bare.count("]")
    assert text.count("subgraph cluster_") == len(alignment.segments)
    assert bare.count("->") == alignment.to_networkx().number_of_edges()


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_reads_it(tmp_path):
    EXAMPLE.save_dot(tmp_path / "a.dot")
    done = subprocess.run(["dot", "-Tsvg", tmp_path / "a.dot"], capture_output=True, timeout=60)
    assert done.returncode == 0 and b"a3" in done.stdout


def test_a_dot_file_is_written_into_a_new_folder(tmp_path):
    EXAMPLE.save_dot(tmp_path / "new" / "a.dot")
    assert (tmp_path / "new" / "a.dot").read_text() == EXAMPLE.to_dot()
