"""Networks that are ready to be coupled."""

import torch

from fxfuse.alignment.align import align_networks
from fxfuse.calibration.data import Calibration
from fxfuse.coupling._weights import Weights
from fxfuse.coupling.mixing import Mixer, correspond
from fxfuse.coupling.weight_matching import forward, join, spaces_to_join
from fxfuse.depth.deepen import deepen
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network


def joined(nets, x, start=forward):
    mixer = mixer_of(nets, x)
    weights, free = Weights.of(mixer), spaces_to_join(mixer)
    join(weights, free, start)
    return weights, free


def mixer_of(nets, x, anchor=0):
    found = [Network.of(str(i), trace(n), (x[:2],)) for i, n in enumerate(nets)]
    balanced = deepen(found, align_networks(found, Calibration(x)))
    return Mixer(balanced, anchor, correspond(balanced, anchor), [1 / len(nets)] * len(nets))


def images(count=20):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def network(module, x):
    return Network.of("net", trace(module), (x[:2],))


def prepared(nets, x, anchor=0):
    found = [Network.of(str(i), trace(n), (x[:2],)) for i, n in enumerate(nets)]
    data = Calibration(x)
    balanced = deepen(found, align_networks(found, data))
    return balanced, correspond(balanced, anchor), data
