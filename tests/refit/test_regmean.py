"""RegMean against its closed form in NumPy, on networks whose units are in place or permuted."""

import numpy as np
import pytest
import torch

import fxfuse
from fxfuse import presets
from fxfuse.coupling import InPlace
from fxfuse.errors import ArgumentError
from fxfuse.refit import AsMixed, RegMean
from tests.support.nets import build, data_shape, gap, mlp, outputs, randomise
from tests.support.tolerances import FUNCTION


def closed_form(nets, x, weights, apart):
    """Return the weights of a plain network, layer by layer, each network on its own inputs."""
    inputs, merged = [x.numpy().astype(float)] * len(nets), []
    for i in range(0, len(nets[0]), 2):
        left, right = 0.0, 0.0
        for k, (w, net) in enumerate(zip(weights, nets)):
            gram = inputs[k].T @ inputs[k]
            gram = apart * gram + (1 - apart) * np.diag(np.diag(gram))
            weight = net[i].weight.detach().numpy()
            left, right = left + w * gram, right + w * gram @ weight.T
            inputs[k] = np.maximum(inputs[k] @ weight.T + net[i].bias.detach().numpy(), 0)
        merged.append(np.linalg.solve(left, right).T)
    return merged


@pytest.mark.parametrize("apart", [0.9, 1.0])
def test_with_units_in_place_the_weights_are_those_of_the_closed_form(apart):
    nets, x = [randomise(mlp(6, 8, 7, 3), seed) for seed in (1, 2, 3)], torch.randn(100, 6)
    method = fxfuse.Method(coupling=InPlace(), refit=RegMean(apart=apart))
    fused = fxfuse.fuse(nets, x, weights=[2, 1, 1], method=method)
    wanted = closed_form(nets, x, [0.5, 0.25, 0.25], apart)
    for i, weight in enumerate(wanted):
        layer = fused.get_submodule(str(2 * i))
        assert np.allclose(layer.weight.detach(), weight, atol=1e-4)
        biases = [net[2 * i].bias for net in nets]
        mean = biases[0] / 2 + biases[1] / 4 + biases[2] / 4
        assert torch.allclose(layer.bias, mean, atol=1e-6)


@pytest.mark.parametrize("name", ["batch norm", "depthwise"])
def test_permuted_copies_give_the_network(name):
    (net, x), data = build(name), torch.randn(40, *data_shape(name))
    copies = [net, fxfuse.permute(net, x, seed=1)]
    assert gap(net, presets.regmean(copies, data), data) < FUNCTION


def test_its_outputs_are_nearer_to_the_networks_than_those_of_the_mean():
    nets, x = [randomise(mlp(6, 8, 3), seed) for seed in (1, 2)], torch.randn(300, 6)
    methods = [fxfuse.Method(coupling=InPlace(), refit=refit) for refit in (AsMixed(), RegMean())]
    mean, ours = (fxfuse.fuse(nets, x, method=method) for method in methods)
    wanted = sum(outputs(net, x) for net in nets) / 2
    errors = [float((outputs(f, x) - wanted).square().mean()) for f in (mean, ours)]
    assert errors[1] < 0.9 * errors[0]


def test_inputs_that_are_always_zero_keep_the_mean_of_their_weights():
    nets, x = [randomise(mlp(6, 5, 3), seed) for seed in (1, 2)], torch.randn(50, 6)
    x[:, 2] = 0.0
    fused = fxfuse.fuse(nets, x, method=fxfuse.Method(coupling=InPlace(), refit=RegMean()))
    mean = (nets[0][0].weight[:, 2] + nets[1][0].weight[:, 2]) / 2
    assert torch.allclose(fused.get_submodule("0").weight[:, 2], mean, atol=1e-6)


def test_a_factor_out_of_range_is_refused():
    with pytest.raises(ArgumentError, match="apart 2"):
        RegMean(apart=2)
