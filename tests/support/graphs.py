"""Networks that pass messages along the edges of graphs, and graphs for them."""

import torch
import torch.nn.functional as F
from torch import nn

FEATURES, CLASSES = 6, 4


def graph(nodes, seed=0, groups=0):
    """Features of nodes and edges `(2, edges)`; with groups, also the graph of each node."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(nodes, FEATURES, generator=generator)
    edges = torch.randint(0, nodes, (2, 3 * nodes), generator=generator)
    of = torch.randint(0, groups, (nodes,), generator=generator) if groups else None
    return (x, edges) if of is None else (x, edges, of.sort()[0])


class Messages(nn.Module):
    """Layers that add what the neighbours of a node send to what it has."""

    def __init__(self, depth=2, width=8):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(width if i else FEATURES, width) for i in range(depth)
        )
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x, edges):
        for layer in self.layers:
            h = layer(x)
            x = F.relu(self.received(h, edges) + h)
        return self.out(x)


class Sums(Messages):
    def received(self, h, edges):
        source, target = edges
        degree = torch.zeros(len(h)).index_add(0, target, torch.ones(len(target))).clamp(min=1)
        return torch.zeros_like(h).index_add(0, target, h[source]) / degree[:, None]


class Maxima(Messages):
    def received(self, h, edges):
        source, target = edges
        index = target[:, None].expand(-1, h.shape[1])
        return torch.zeros_like(h).scatter_reduce(0, index, h[source], "amax", include_self=False)


class Scattered(Messages):
    def received(self, h, edges):
        source, target = edges
        index = target.unsqueeze(-1).expand(-1, h.shape[1])
        return torch.zeros_like(h).scatter_add_(0, index, h.index_select(0, source))


class Products(Messages):
    def received(self, h, edges):
        source, target = edges
        ones, size = torch.ones(target.shape[0]), (h.shape[0], h.shape[0])
        return torch.sparse.mm(
            torch.sparse_coo_tensor(torch.stack([target, source]), ones, size), h
        )


class Means(Messages):
    """Counts neighbours once, for all layers."""

    def forward(self, x, edges):
        source, target = edges
        degree = torch.zeros(x.shape[0]).index_add(0, target, torch.ones(target.shape[0]))
        for layer in self.layers:
            h = layer(x)
            sums = torch.zeros_like(h).index_add(0, target, h[source])
            x = F.relu(sums / degree.clamp(min=1)[:, None] + h)
        return self.out(x)


class Pooled(Sums):
    """Classifies graphs: the mean of the nodes of each."""

    def forward(self, x, edges, graph):
        for layer in self.layers:
            h = layer(x)
            x = F.relu(self.received(h, edges) + h)
        count = int(graph.max()) + 1
        sums = x.new_zeros(count, x.shape[1]).index_add(0, graph, x)
        return self.out(sums / torch.bincount(graph, minlength=count).clamp(min=1)[:, None])


class Known(Sums):
    """Has the graph, and is given its nodes."""

    def __init__(self, depth=2, width=8):
        super().__init__(depth, width)
        self.register_buffer("edges", graph(12)[1])

    def forward(self, x):
        return super().forward(x, self.edges)


KINDS = (Sums, Maxima, Scattered, Products, Means, Pooled, Known)
PLAIN = {kind.__name__: kind for kind in KINDS}


def inputs(name, seed=0, nodes=12):
    """What a network of `PLAIN` takes."""
    if name == "Known":
        return (graph(12, seed)[0],)
    return graph(nodes, seed, groups=4 if name == "Pooled" else 0)
