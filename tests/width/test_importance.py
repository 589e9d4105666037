"""How much units count: norms of weights, sizes of values, effects on the outputs."""

import numpy as np
import pytest
import torch

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
