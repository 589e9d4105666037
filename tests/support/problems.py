"""Networks that are ready to be coupled."""

import torch

from fxfuse.alignment.align import align_networks
from fxfuse.calibration.data import Calibration
from fxfuse.coupling._weights import Weights
from fxfuse.coupling.problem import Problem
from fxfuse.coupling.weight_matching import Ascent, join, spaces_to_join
from fxfuse.depth.deepen import deepen
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network


def images(count=20):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def network(module, x):
    return Network.of("net", trace(module), (x[:2],))


def problem_of(nets, x, anchor=0, weights=None):
    """The problem of networks with equal weights, if none are given."""
    networks = [Network.of(str(i), trace(n), (x[:2],)) for i, n in enumerate(nets)]
    balanced = deepen(networks, align_networks(networks, Calibration(x)))
    return Problem.of(balanced, anchor, weights or [1 / len(nets)] * len(nets))


def joined(nets, x, in_place=False):
    """Weights of networks that are matched forward, or left in place, and the spaces that move."""
    weights = Weights.of(problem_of(nets, x))
    free = spaces_to_join(weights)
    if in_place:
        for k, names in free.items():
            Ascent(weights, k, {}, names).keep()
    else:
        join(weights, free)
    return weights, free
