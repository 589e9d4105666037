"""How much units count: norms of weights, sizes of values, effects on the outputs."""

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.calibration.data import Calibration, analyse
from fxfuse.width import activation, magnitude, taylor
from tests.support.nets import build, data_shape, mlp, randomise


def test_magnitudes_are_the_norms_of_weight_rows_with_batch_norms_folded_in():
    net, x = build("batch norm")
    network = analyse(net, x, "net")
    scores = magnitude(network, Calibration(x))["0.0.0"]
    first, norm = net[0][0][0], net[0][0][1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    rows = (first.weight * scale[:, None, None, None]).flatten(1).norm(dim=1).detach().numpy()
    assert np.allclose(scores, rows / rows.mean(), atol=1e-5)


@pytest.mark.parametrize("importance", [magnitude, activation, taylor])
def test_heads_count_as_much_as_the_units_in_them(importance):
    net, x = build("tokens")
    network = analyse(net, x, "net")
    scores = importance(network, Calibration(torch.randn(20, *data_shape("tokens"))))
    heads = next(s for s in network.spaces if not s.axes)
    assert scores[heads.name].shape == (2,) and (scores[heads.name] > 0).all()


def test_activations_are_root_mean_squares_behind_the_activation():
    net, x = randomise(mlp(4, 6, 3)), torch.randn(50, 4)
    scores = activation(analyse(net, x, "net"), Calibration(x))["0"]
    values = net[1](net[0](x)).detach().double()
    rms = values.square().mean(0).sqrt().numpy()
    assert np.allclose(scores, rms / rms.mean(), atol=1e-5)


def test_taylor_is_the_mean_change_of_the_predictions():
    net, x = randomise(mlp(4, 6, 3)), torch.randn(4000, 4)
    scores = taylor(analyse(net, x, "net"), Calibration(x))["0"]
    values, p = net[1](net[0](x)), net(x).softmax(1)
    changes = values[:, :, None] * net[2].weight.T  # of every logit, by each unit
    mean = torch.einsum("nuc,nc->nu", changes, p)
    exact = (torch.einsum("nuc,nc->nu", changes.square(), p) - mean.square()).mean(0)
    assert np.allclose(scores, exact.detach().numpy(), rtol=0.15)


def test_units_that_are_never_read_have_no_effect():
    net, x = randomise(mlp(4, 6, 3)), torch.randn(30, 4)
    with torch.no_grad():
        net[2].weight[:, 2] = 0
    network = analyse(net, x, "net")
    assert taylor(network, Calibration(x))["0"].argmin() == 2
    assert magnitude(network, Calibration(x))["0"][2] > 0


class Doubled(nn.Module):
    """A grouped transposed convolution, which keeps its outputs group by group."""

    def __init__(self, width=8):
        super().__init__()
        self.a, self.c = nn.Conv2d(3, width, 3), nn.Conv2d(width, 3, 1)
        self.b = nn.ConvTranspose2d(width, width, 2, 2, groups=2)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def test_units_that_a_grouped_transposed_convolution_writes_have_their_own_magnitude():
    net, x = randomise(Doubled()), torch.randn(4, 3, 6, 6)
    scores = magnitude(analyse(net, x, "net"))["b"]
    halves = net.b.weight.detach().view(2, 4, 4, 2, 2).square().sum((1, 3, 4)).flatten()
    sizes = (halves / halves.sum() + net.b.bias.detach().square() * 0).sqrt().numpy()
    assert np.allclose(scores, sizes / sizes.mean(), atol=1e-5)


def test_networks_that_show_no_units_are_scored_by_their_weights():
    class Looked(nn.Module):
        """Looks its table up by number; the units of the layer that makes it are seen nowhere."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(3, 5), nn.Linear(5, 8)
            self.register_buffer("grid", torch.randn(8, 3))

        def forward(self, x):
            h, table = self.a(x), self.c(torch.relu(self.b(self.grid)))
            return h + table[h.argmax(1)]

    net, x = randomise(Looked()), torch.randn(20, 6)
    network = analyse(net, x, "net")
    scores = taylor(network, Calibration(x))
    assert (scores["b"] > 0).all() and fxfuse.narrow(net, x).get_submodule("b").out_features == 2
