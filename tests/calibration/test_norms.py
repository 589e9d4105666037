"""Batch norms: read, written, given statistics, and folded into the weights in front of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from fxfuse.calibration.moments import Moments
from fxfuse.calibration.norms import (
    fold_norms,
    foldable_norms,
    scale_and_shift,
    scale_statistics,
    single_weights,
    tensors_for,
    write_norm,
    write_statistics,
)
from fxfuse.graph.state import fill
from fxfuse.graph.trace import trace
from tests.support.nets import build, outputs, random_nets, randomise
from tests.support.problems import network
from tests.support.tolerances import EXACT, FUNCTION


def norm(units=5, affine=True):
    """A norm in float64, and its tensors by role."""
    module = randomise(nn.BatchNorm1d(units, affine=affine)).double().eval()
    names = ["running_mean", "running_var", *(["weight", "bias"] if affine else [])]
    return module, {name: name for name in names} | {"eps": module.eps}


def units(seed, low=-1.0, count=5):
    return np.random.default_rng(seed).uniform(low, 2.0, count)


AFFINE = pytest.mark.parametrize("affine", [True, False])


@AFFINE
def test_a_norm_multiplies_by_its_scale_and_adds_its_shift(affine):
    module, roles = norm(affine=affine)
    x = torch.randn(7, 5, dtype=torch.float64)
    scale, shift = scale_and_shift(module, roles)
    assert np.allclose(module(x).detach().numpy(), scale * x.numpy() + shift, atol=EXACT)


@AFFINE
@pytest.mark.parametrize("count", [5, 8])
def test_a_norm_computes_what_is_written_whatever_its_statistics_and_width(affine, count):
    module, roles = norm(affine=affine)
    scale, output_mean, mean = (units(seed, 0.3, count) for seed in range(3))
    variance = units(3, 0.1, count)
    write_norm(module, roles, scale, output_mean, mean, variance)
    x = torch.randn(7, count, dtype=torch.float64)
    expected = scale * (x.numpy() - mean) + output_mean
    assert np.allclose(module(x).detach().numpy(), expected, atol=1e-9)
    assert module.num_features == count
    kept = np.allclose(module.running_mean, mean) and np.allclose(module.running_var, variance)
    assert kept is affine


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_a_norm_with_a_weight_or_a_bias_alone_computes_what_is_written(missing):
    module, roles = norm(affine=True)
    setattr(module, missing, None)
    del roles[missing]
    scale, output_mean, mean = (units(seed, 0.3, 5) for seed in range(3))
    write_norm(module, roles, abs(scale), output_mean, mean, units(3, 0.1, 5))
    x = torch.randn(7, 5, dtype=torch.float64)
    expected = abs(scale) * (x.numpy() - mean) + output_mean
    assert np.allclose(module(x).detach().numpy(), expected, atol=1e-9)


def test_one_number_stands_for_all_units():
    module, roles = norm()
    for name, value in tensors_for(roles, 2.0, 0.5).items():
        fill(module, name, value)
    x = torch.randn(7, 5, dtype=torch.float64)
    assert torch.allclose(module(x), 2 * x + 0.5, atol=EXACT)


@AFFINE
def test_statistics_can_be_replaced_without_changing_the_function(affine):
    module, roles = norm(affine=affine)
    x = torch.randn(50, 5, dtype=torch.float64) * 3 + 1
    before, moments = module(x), Moments()
    moments.add(x.T)
    write_statistics(module, roles, moments)
    assert torch.allclose(module(x), before, atol=1e-9)
    assert np.allclose(module.running_mean, moments.mean) is affine


@AFFINE
def test_a_norm_gives_the_same_for_scaled_inputs_once_its_statistics_are_scaled(affine):
    module, roles = norm(affine=affine)
    x = torch.randn(7, 5, dtype=torch.float64)
    before, factors = module(x), scale_statistics(module, roles, np.array([0.0, 0.5, 1, 2, 3]))
    assert torch.allclose(module(x * torch.as_tensor(factors)), before, atol=1e-9)
    assert (factors[1:] == [0.5, 1, 2, 3]).all() and 0 < factors[0] < 0.01
    assert bool((module.running_var >= -1e-12).all())


# --- folding --------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(random_nets())
def test_folded_weights_and_what_is_left_to_the_norms_compute_the_same(net):
    x = torch.randn(4, 3, 8, 8)
    traced = network(net, x)
    state = fold_norms(traced, foldable_norms(traced))
    twin = trace(net)
    for node, roles in traced.norms.items():
        left = tensors_for(roles, state.scales[node], state.shifts[node])
        for name, values in left.items():
            fill(twin, name, values)
    for name in state.factors:
        fill(twin, name, state[name])
    reference = outputs(net, x)
    error = float((outputs(twin.eval(), x) - reference).abs().max())
    assert error < FUNCTION * max(float(reference.abs().max()), 1e-3)


def test_a_norm_behind_a_shared_convolution_is_not_folded():
    net, x = build("shared")
    traced = network(net, x)
    weights = [names[0] for names in traced.weights.values()]
    shared = {n for n, names in traced.weights.items() if weights.count(names[0]) == 2}
    assert len(shared) == 2 and not shared & set(single_weights(traced))
    assert foldable_norms(traced) and not shared & set(foldable_norms(traced).values())
