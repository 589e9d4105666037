"""Plans of single layers: who wrote last, where it is seen, and what it changes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.calibration.moments import euclidean
from fxfuse.coupling.measure import View, points_of
from fxfuse.coupling.transport import InPlace, LayerByLayer, Transport, without_far_wider
from fxfuse.errors import PairingError
from fxfuse.graph.trace import trace
from fxfuse.refit.moments import AsMixed
from fxfuse.spaces.network import Network
from tests.support.nets import build, conv, data_shape, gap, mlp, outputs, randomise, residual
from tests.support.problems import problem_of


def method(kind):
    return fxfuse.Method(coupling=kind(ground_cost=euclidean), refit=AsMixed())


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


NAIVE = fxfuse.Method(coupling=InPlace(), refit=AsMixed())


@settings(max_examples=6)
@given(st.floats(0, 1), st.integers(0, 99))
def test_weights_are_averaged_name_by_name(share, seed):
    a, b = (randomise(mlp(6, 8, 7, 3), seed + i) for i in range(2))
    fused = NAIVE([a, b], torch.randn(20, 6), weights=[share, 1 - share])
    theirs = b.state_dict()
    for name, tensor in a.state_dict().items():
        wanted = share * tensor + (1 - share) * theirs[name]
        assert torch.allclose(fused.state_dict()[name], wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["batch norm", "residual", "grouped", "tokens"])
def test_a_network_averaged_with_itself_is_itself(name):
    net, x = build(name)
    assert gap(net, NAIVE([net, net], x.repeat(8, *[1] * (x.dim() - 1))), x) <= 1e-4


def test_permuted_units_are_not_found_again():
    net, x = build("plain")
    pair, data = [net, fxfuse.permute(net, x, seed=1)], torch.randn(50, 6)
    assert gap(net, fxfuse.fuse(pair, data), data) < 1e-4 < 0.1 < gap(net, NAIVE(pair, data), data)


def test_networks_of_unequal_depth_are_balanced_first():
    deep, shallow = randomise(mlp(6, 5, 5, 3)), randomise(mlp(6, 5, 3), 1)
    data = torch.randn(30, 6)
    alignment = fxfuse.align([deep, shallow], data)
    fused = NAIVE([deep, shallow], data, alignment=alignment)
    balanced = fxfuse.balance([deep, shallow], data, alignment=alignment)[1]
    first = (deep[0].weight + balanced.get_submodule("0").weight) / 2
    assert torch.allclose(fused.get_submodule("0").weight, first, atol=1e-6)
    assert outputs(fused, data).shape == (30, 3)


def test_networks_of_unequal_width_are_refused_with_the_reason():
    pair = [randomise(residual((6, 1))), randomise(residual((8, 1), stem=8))]
    with pytest.raises(PairingError, match="in place") as caught:
        NAIVE(pair, torch.randn(8, 3, 8, 8))
    assert "equal widths" in caught.value.expected


@pytest.mark.parametrize("width, share", [(20, 0.0), (13, 0.7)])
def test_a_much_wider_network_has_no_share_in_the_units(width, share):
    nets = [randomise(mlp(6, w, w, 3), w) for w in (5, width)]
    given, x = [0.3, 0.7], torch.randn(20, 6)
    near = without_far_wider(problem_of(nets, x, weights=given))
    assert near.weights == pytest.approx((1 - share, share))
    assert near.output_weights == pytest.approx(given)
    assert without_far_wider(problem_of(nets, x, 1, given)).weights == pytest.approx(given)
    alone = without_far_wider(problem_of(nets, x, weights=[0.0, 1.0]))
    assert alone.weights == ((1.0, 0.0) if not share else (0.0, 1.0))
    assert alone.output_weights == (0.0, 1.0)
