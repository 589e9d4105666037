"""Pairs of networks of different depth."""

import torch
from torch import nn

from fxfuse.graph.passes import canonical
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.nets import (
    GroupedBottleneck,
    Grown,
    Inverted,
    Pooled,
    Tokens,
    conv,
    mlp,
    randomise,
    residual,
    stages,
)

CHANCE = torch.Generator().manual_seed(1)
VECTORS = torch.randn(16, 6, generator=CHANCE)
IMAGES = torch.randn(8, 3, 8, 8, generator=CHANCE)


def networks(*nets, data=VECTORS):
    """Randomise networks, trace and analyse them."""
    nets = [randomise(net, seed) for seed, net in enumerate(nets)]
    graphs = [canonical(trace(net), (data[:2],)) for net in nets]
    return [Network.of(f"net {i}", g, (data[:2],)) for i, g in enumerate(graphs)]


def dense(layers, stem=4, growth=2):
    width = stem + growth * layers
    head = nn.BatchNorm2d(width), nn.ReLU(), Pooled(width, 3)
    return nn.Sequential(conv(3, stem), Grown(stem, growth, layers), *head)


PAIRS = {
    "perceptrons": (lambda: (mlp(6, 8, 8, 8, 3), mlp(6, 5, 5, 3)), VECTORS),
    "perceptrons with norms": (
        lambda: (mlp(6, 5, 3, norm=True), mlp(6, 8, 8, 8, 3, norm=True)),
        VECTORS,
    ),
    "perceptrons without biases": (
        lambda: (mlp(6, 5, 3, bias=False), mlp(6, 8, 7, 3, bias=False)),
        VECTORS,
    ),
    "streams that grow": (lambda: (dense(5), dense(2, 5, 3)), IMAGES),
    "streams that grow and are cut": (
        lambda: (
            nn.Sequential(
                conv(3, 4),
                Grown(4, 2, 4),
                conv(12, 4, stride=2),
                dense(3, 4)[1:2],
                conv(10, 3),
                Pooled(3, 3),
            ),
            nn.Sequential(
                conv(3, 4),
                Grown(4, 2, 2),
                conv(8, 4, stride=2),
                dense(4, 4)[1:2],
                conv(12, 3),
                Pooled(3, 3),
            ),
        ),
        IMAGES,
    ),
    "each deeper elsewhere": (lambda: (stages([4, 4, 4], [5]), stages([6], [7, 7])), IMAGES),
    "with linear layers": (
        lambda: (stages([4], [5, 5], hidden=(7,)), stages([6, 6], [7], hidden=(5, 5, 5))),
        IMAGES,
    ),
    "residual": (lambda: (residual((6, 3), (8, 1)), residual((6, 1), (5, 3))), IMAGES),
    "three": (lambda: (mlp(6, 5, 3), mlp(6, 8, 8, 8, 3), mlp(6, 7, 7, 3)), VECTORS),
    "bottlenecks": (
        lambda: tuple(
            blocks(lambda w: GroupedBottleneck(w, 8, 4), w, n) for w, n in ((6, 3), (4, 1))
        ),
        IMAGES,
    ),
    "inverted": (
        lambda: tuple(blocks(lambda w: Inverted(w, w + 3, 4), w, n) for w, n in ((4, 1), (6, 3))),
        IMAGES,
    ),
    "tokens": (lambda: (Tokens(8, 2, 12, 3), Tokens(8, 2, 10, 1)), IMAGES),
    "equal": (lambda: (residual((6, 2)), residual((6, 2))), IMAGES),
}


def blocks(make, width, count):
    return nn.Sequential(conv(3, width), *[make(width) for _ in range(count)], Pooled(width, 3))
