"""Moments of averaged units, computed from correlations instead of measured."""

import numpy as np
import torch

import fxfuse
from fxfuse.coupling import InPlace
from fxfuse.refit import AsMixed, ClosedFormMoments, MatchMoments
from tests.support.nets import build, data_shape, gap, mlp, randomise
from tests.support.tolerances import FUNCTION


def fused_by(refit, nets, x):
    return fxfuse.fuse(nets, x, method=fxfuse.Method(coupling=InPlace(), refit=refit))


def test_units_are_scaled_by_what_their_correlation_takes_from_their_mean():
    nets, x = [randomise(mlp(6, 8, 7, 3), seed) for seed in (1, 2)], torch.randn(200, 6)
    mixed, ours = (fused_by(refit, nets, x) for refit in (AsMixed(), ClosedFormMoments()))
    values = [x, x]
    for i in (0, 2):  # what writes the outputs stays as it was mixed
        values = [net[i](v).detach() for net, v in zip(nets, values)]
        spreads = [v.std(0, correction=0) for v in values]
        rho = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(values[0].T, values[1].T)])
        a, b = (s.numpy() for s in spreads)
        gain = (a + b) / 2 / np.sqrt((a**2 + b**2 + 2 * rho * a * b) / 4)
        before, after = (f.get_submodule(str(i)).weight.detach().numpy() for f in (mixed, ours))
        assert np.allclose(after, np.minimum(gain, 10)[:, None] * before, atol=1e-4)
        values = [v.relu() for v in values]


def test_the_first_layer_is_as_if_measured_and_deeper_ones_are_not():
    nets, x = [randomise(mlp(6, 8, 7, 3), seed) for seed in (1, 2)], torch.randn(200, 6)
    computed, measured = (
        fused_by(refit, nets, x) for refit in (ClosedFormMoments(), MatchMoments())
    )
    first, second = (
        float((computed.get_parameter(i) - measured.get_parameter(i)).detach().abs().max())
        for i in ("0.weight", "2.weight")
    )
    assert first < 1e-4 < second


def test_copies_give_the_network():
    for name in ("batch norm", "layer norm"):
        (net, x), data = build(name), torch.randn(30, *data_shape(name))
        method = fxfuse.Method(refit=ClosedFormMoments())
        fused = fxfuse.fuse([net, fxfuse.permute(net, x, seed=1)], data, method=method)
        assert gap(net, fused, data) < FUNCTION
