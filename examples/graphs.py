"""Graph networks fused: node classification on graphs that packages ship.

*digits*: scikit-learn's images are nodes, each linked to the eight most like it; networks are
trained on five labelled nodes of each class, others for each network, in a graph of 1,200 images,
fused on that graph without labels, and tested on another graph, of the other 597 images. *depth*:
the same with networks of 3 and 2 layers and 32 and 24 units. *karate*: the karate club of networkx,
34 members of two parties, of whom three of each are labelled; the rest is tested.

    python examples/graphs.py [FOLDER] [--seeds 0 1 2] [--situations digits depth karate]

Nothing is chosen on the nodes that are tested.

References:
    Ormaniec et al. 2024, fusion of graph networks.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from records import write_record
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn

import fxfuse
from fxfuse.calibration.distance import divergence
from fxfuse.cli.demo import TEST, digits, percent_right
from fxfuse.errors import FuseError, FusionWarning

NEIGHBOURS, LABELLED, STEPS = 8, 5, 100
PRESETS = ("average", "git_rebasin", "repair", "fedma", "best")


class Messages(nn.Module):
    """Each node adds what it makes of itself to the mean of what its neighbours send."""

    def __init__(self, features: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        widths = [features, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        count = torch.zeros(x.shape[0]).index_add(0, target, torch.ones(target.shape[0]))
        for layer in self.layers:
            h = layer(x)
            received = torch.zeros_like(h).index_add(0, target, h[source])
            x = F.relu(h + received / count.clamp(min=1)[:, None])
        return self.out(x)


@dataclass(frozen=True)
class Graph:
    """Features of nodes, edges `(2, edges)` and the labels of nodes."""

    x: Tensor
    edges: Tensor
    y: Tensor


def of_images(images: Tensor, labels: Tensor) -> Graph:
    """Link each image to those most like it."""
    flat = images.flatten(1)
    near = kneighbors_graph(flat.numpy(), NEIGHBOURS).tocoo()
    edges = torch.stack([torch.as_tensor(i).long() for i in (near.col, near.row)])
    return Graph(flat, edges, labels)


def karate_club() -> Graph:
    club = nx.karate_club_graph()
    edges = torch.tensor([*club.edges, *((b, a) for a, b in club.edges)]).T
    parties = [int(club.nodes[n]["club"] == "Officer") for n in club]
    return Graph(torch.eye(len(parties)), edges, torch.tensor(parties))


def trained(net: nn.Module, graph: Graph, nodes: Tensor) -> nn.Module:
    """Train on some nodes, with the whole graph at hand."""
    optimiser = torch.optim.Adam(net.parameters(), 0.01, weight_decay=5e-4)
    for _ in range(STEPS):
        optimiser.zero_grad()
        scores = net(F.dropout(graph.x, 0.5), graph.edges)[nodes]
        F.cross_entropy(scores, graph.y[nodes]).backward()
        optimiser.step()
    return net.eval()


def labelled(graph: Graph, count: int, seed: int) -> Tensor:
    """Draw as many nodes of each class."""
    order = torch.randperm(len(graph.y), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[graph.y[order] == c][:count] for c in graph.y.unique()])


Situation = tuple[list[nn.Module], Graph, Graph, Tensor]  # to fuse on, to test on, nodes to test


def on_digits(seed: int, shapes: list[tuple[int, int]]) -> Situation:
    images, labels = digits(seed)
    given, test = (of_images(images[s], labels[s]) for s in (slice(TEST, None), slice(TEST)))
    nets = []
    for k, (width, depth) in enumerate(shapes):
        torch.manual_seed(10 * seed + k)
        nodes = labelled(given, LABELLED, 10 * seed + k)
        nets.append(trained(Messages(64, width, depth, 10), given, nodes))
    return nets, given, test, torch.arange(TEST)


def on_karate(seed: int) -> Situation:
    graph = karate_club()
    nodes = labelled(graph, 3, seed)
    nets = []
    for k in range(2):
        torch.manual_seed(10 * seed + k)
        nets.append(trained(Messages(34, 16, 2, 2), graph, nodes))
    rest = torch.ones(len(graph.y), dtype=torch.bool)
    rest[nodes] = False
    return nets, graph, graph, rest.nonzero().flatten()


SITUATIONS: dict[str, Callable[[int], Situation]] = {
    "digits": lambda seed: on_digits(seed, [(32, 2), (32, 2)]),
    "depth": lambda seed: on_digits(seed, [(32, 3), (24, 2)]),
    "karate": on_karate,
}


def rows(situation: Situation) -> list[dict[str, Any]]:
    """Return what the parents, their ensemble and their fusions reach."""
    nets, given, test, nodes = situation

    def scores(net: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = net(test.x, test.edges)[nodes]
        return found

    y, outputs = test.y[nodes], [scores(net) for net in nets]
    wanted = torch.stack(outputs).mean(0)

    def row(name: str, logits: Tensor) -> dict[str, Any]:
        apart = divergence(wanted.double(), logits.double()) / len(y)
        accuracy = round(percent_right(logits, y), 2)
        return {"name": name, "accuracy": accuracy, "divergence": round(apart, 4)}

    found = [row(f"parent {k + 1}", out) for k, out in enumerate(outputs)]
    found.append(row("ensemble", wanted))
    for name in PRESETS:
        start = time.perf_counter()
        try:
            fused = fxfuse.fuse(nets, (given.x, given.edges), method=name)
        except FuseError as error:
            found.append({"name": name, "refused": str(error).split("\n")[0]})
            continue
        seconds = round(time.perf_counter() - start, 2)
        found.append({**row(name, scores(fused)), "seconds": seconds})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("folder", type=Path, nargs="?", default=results)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--situations", nargs="+", default=[*SITUATIONS])
    args = parser.parse_args()
    warnings.simplefilter("ignore", FusionWarning)
    for name in args.situations:
        for seed in args.seeds:
            situation = SITUATIONS[name](seed)
            found = rows(situation)
            facts = {"test_images": len(situation[3]), "samples": len(situation[1].y)}
            path = args.folder / f"graphs-{name}-seed{seed}.json"
            write_record(path, f"graphs-{name}", found, seed=seed, kind="nodes", **facts)
            for row in found:
                print(name, seed, *(f"{k} {v}" for k, v in row.items()), sep="  ", flush=True)


if __name__ == "__main__":
    main()
