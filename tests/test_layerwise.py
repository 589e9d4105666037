"""Plans of single layers: who wrote last, where it is seen, and what it changes."""

import numpy as np
import pytest
import torch
from nets import build, conv, data_shape, gap, mlp, randomise, residual
from torch import nn

import fxfuse
from fxfuse.costs import euclidean
from fxfuse.layerwise import LayerByLayer
from fxfuse.measuring import View, points_of
from fxfuse.network import Network
from fxfuse.refit import MatchMoments
from fxfuse.tracing import trace
from fxfuse.transport import Transport


def method(kind):
    return fxfuse.Method(coupling=kind(ground_cost=euclidean), refit=MatchMoments(keep=True))


def test_without_a_skip_layers_and_spaces_are_the_same():
    nets, x = [randomise(mlp(6, 8, 7, 3), s) for s in (1, 2)], torch.randn(50, 6)
    nets[1][-1].weight.data.copy_(nets[0][-1].weight)
    plans = [
        method(kind)(nets, x)
        for kind in (Transport, lambda **k: LayerByLayer(view=View(singly=True), **k))
    ]
    assert gap(*plans, x) < 1e-6


def test_along_a_skip_every_layer_has_a_plan_of_its_own():
    nets = [randomise(residual((6, 2), (8, 2)), s) for s in (1, 2)]
    x = torch.randn(20, 3, 16, 16)
    assert gap(*(method(kind)(nets, x) for kind in (Transport, LayerByLayer)), x) > 1e-2


@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "tokens"])
def test_a_shuffled_copy_comes_back(name):
    """Tolerance 1e-4 relative: each layer's plan is the permutation itself."""
    net, x = build(name)
    data = torch.randn(48, *data_shape(name))
    fused = method(LayerByLayer)([net, fxfuse.permute(net, x, seed=4)], data)
    assert gap(net, fused, data) < 1e-4


class Sides(nn.Module):
    """Two convolutions side by side in one sum, behind a stem."""

    def __init__(self):
        super().__init__()
        self.stem, self.main, self.side = conv(3, 4), conv(4, 6, act=False), nn.Conv2d(4, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(self.main(x) + self.side(x)))


def test_a_sum_is_where_its_first_operand_is_seen():
    net, x = randomise(Sides()), torch.randn(2, 3, 8, 8)
    network = Network.of("net", trace(net), (x,))
    both, single = (points_of(network, View(singly=s)) for s in (False, True))
    assert both["main_0"] == both["side"] == "add"
    assert single["main_0"] == "add" and single["side"] == "side"


def test_a_plan_of_the_outputs_moves_the_classes():
    """With the classes of one network in another order, the plan finds that order."""
    net, x = randomise(mlp(6, 8, 7, 4)), torch.randn(60, 6)
    turned, order = randomise(mlp(6, 8, 7, 4)), [2, 0, 3, 1]
    turned[-1].weight.data, turned[-1].bias.data = (
        p.data[order].clone() for p in (net[-1].weight, net[-1].bias)
    )
    fused = method(LayerByLayer)([turned, net], x, weights=[1, 0], anchor=1)
    assert np.allclose(fused(x).detach(), net(x).detach(), atol=1e-5)


def test_a_head_reads_the_plan_of_what_wrote_last():
    """Tolerance 1e-4 relative, with the second network's weights alone, behind a residual trunk."""
    net, x = build("residual")
    data = torch.randn(40, *data_shape("residual"))
    pair = [net, fxfuse.permute(net, x, seed=4)]
    fused = fxfuse.fuse(pair, data, method=method(LayerByLayer), heads=fxfuse.heads.Separate())
    for head in fused(data):
        assert torch.allclose(head, net(data), atol=1e-4 * float(net(data).detach().abs().max()))
