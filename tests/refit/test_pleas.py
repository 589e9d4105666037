"""Least squares layer by layer, against NumPy's, with and without units that are kept apart."""

import numpy as np
import torch

import fxfuse
from fxfuse import presets
from fxfuse.coupling import InPlace
from fxfuse.refit import LayerwiseLeastSquares
from tests.support.nets import build, data_shape, fitted, gap, mlp, outputs, randomise
from tests.support.tolerances import FUNCTION


def least_squares(nets, x):
    """Return weights and biases from the mean of the inputs to the mean of the outputs."""
    values, found = [x.numpy().astype(float)] * len(nets), []
    for i in range(0, len(nets[0]), 2):
        mean = np.mean(values, 0)
        layers = [(n[i].weight.detach().numpy(), n[i].bias.detach().numpy()) for n in nets]
        given = [v @ w.T + b for v, (w, b) in zip(values, layers)]
        known = np.concatenate([mean, np.ones((len(mean), 1))], 1)
        solved = np.linalg.lstsq(known, np.mean(given, 0), rcond=None)[0]
        found.append((solved[:-1].T, solved[-1]))
        values = [np.maximum(z, 0) for z in given]
    return found


def test_with_a_small_ridge_it_is_the_least_squares_solution():
    nets, x = [randomise(mlp(6, 8, 7, 3), seed) for seed in (1, 2)], torch.randn(100, 6)
    method = fxfuse.Method(coupling=InPlace(), refit=LayerwiseLeastSquares(ridges=(1e-9,)))
    fused = fxfuse.fuse(nets, x, method=method)
    for i, (weight, bias) in enumerate(least_squares(nets, fitted(x))):
        layer = fused.get_submodule(str(2 * i))
        assert np.allclose(layer.weight.detach(), weight, atol=1e-4)
        assert np.allclose(layer.bias.detach(), bias, atol=1e-4)


def test_copies_give_the_network():
    (net, x), data = build("batch norm"), torch.randn(40, *data_shape("batch norm"))
    copies = [net, fxfuse.permute(net, x, seed=1)]
    assert gap(net, presets.pleas(copies, data), data) < FUNCTION


def test_the_more_units_are_kept_apart_the_nearer_it_comes_and_all_give_the_ensemble():
    nets, x = [randomise(mlp(6, 8, 3), seed) for seed in (1, 2)], torch.randn(300, 6)
    wanted = sum(outputs(net, x) for net in nets) / 2
    errors = []
    for width in (1.0, 1.5, float("inf")):
        fused = presets.pleas(nets, x, width=width)
        errors.append(float((outputs(fused, x) - wanted).square().mean() / wanted.var()))
    assert errors[0] > 1.2 * errors[1] and errors[2] < 1e-6
