"""Canonical correlations: the maps against their definition, and networks that come back."""

import numpy as np
import pytest
import torch

import fxfuse
from fxfuse.coupling import CanonicalCorrelation
from fxfuse.coupling.cca import canonical_maps
from fxfuse.errors import ArgumentError
from fxfuse.refit import AsMixed
from tests.support.nets import build, data_shape, gap, mlp, outputs, randomise
from tests.support.tolerances import FUNCTION


def samples(n, m, shared, count=4000, seed=0):
    """Return values of two networks that see `shared` common signals, and noise."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(count, shared))
    return (
        common @ rng.normal(size=(shared, size)) + 0.3 * rng.normal(size=(count, size))
        for size in (n, m)
    )


def maps_of(x, y, ridge=1e-9):
    n, m = x.shape[1], y.shape[1]
    both = np.cov(x.T, y.T, bias=True)
    return canonical_maps(both[:n, :n], both[n:, n:], both[:n, n:], np.zeros((n, m)), ridge)


def test_mapped_features_correlate_as_canonical_variates_do():
    x, y = samples(5, 5, 5)
    project, unproject = maps_of(x, y)
    left, right = (np.linalg.qr(v - v.mean(0))[0] for v in (x, y))
    canonical = np.linalg.svd(left.T @ right)[1]  # by Bjorck and Golub
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    white = vectors / np.sqrt(values) @ vectors.T
    a, b = (white @ (v - v.mean(0)).T for v in (x, y @ project.T))
    assert np.allclose(b @ b.T / len(x), np.eye(5), atol=1e-6), "the base's covariances"
    assert np.trace(a @ b.T) / len(x) == pytest.approx(canonical.sum(), abs=1e-6)
    assert np.allclose(project @ unproject, np.eye(5), atol=1e-6)


def test_between_widths_one_side_has_an_inverse():
    project, unproject = maps_of(*samples(6, 4, 4))
    assert project.shape == (6, 4) and np.allclose(unproject @ project, np.eye(4), atol=1e-4)
    project, unproject = maps_of(*samples(4, 6, 4))
    assert np.allclose(project @ unproject, np.eye(4), atol=1e-4)


@pytest.mark.parametrize("name", ["batch norm", "gate", "grouped"])
def test_permuted_copies_give_the_network(name):
    (net, x), data = build(name), torch.randn(60, *data_shape(name))
    copies = [net, fxfuse.permute(net, x, seed=1)]
    method = fxfuse.Method(coupling=CanonicalCorrelation(), refit=AsMixed())
    assert gap(net, fxfuse.fuse(copies, data, method=method), data) < FUNCTION


def test_linear_networks_are_turned_onto_each_other_as_no_permutation_can():
    generator = torch.Generator().manual_seed(1)
    net = randomise(mlp(6, 5, 3, act=torch.nn.Identity), 1)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    turned = randomise(mlp(6, 5, 3, act=torch.nn.Identity), 1)
    turned[0].weight.data, turned[0].bias.data = turn @ net[0].weight.data, turn @ net[0].bias.data
    turned[2].weight.data = net[2].weight.data @ turn.T
    x = torch.randn(200, 6)
    assert gap(net, turned, x) < FUNCTION
    method = fxfuse.Method(coupling=CanonicalCorrelation(ridge=1e-6), refit=AsMixed())
    assert gap(net, fxfuse.fuse([net, turned], x, method=method), x) < 2e-2


def test_networks_of_other_widths_and_depths_fuse_and_a_ridge_must_be_positive():
    nets, x = [randomise(mlp(6, 8, 8, 3), 1), randomise(mlp(6, 5, 3), 2)], torch.randn(60, 6)
    assert outputs(fxfuse.fuse(nets, x, method="cca_merge"), x).isfinite().all()
    with pytest.raises(ArgumentError, match="ridge 0"):
        CanonicalCorrelation(ridge=0)
