"""Matching into a set that grows, against an independent version of the published algorithm."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import fxfuse
from fxfuse import presets
from fxfuse.coupling import MatchedAveraging
from fxfuse.coupling.matched_averaging import match_into_growing_set
from fxfuse.errors import ArgumentError
from fxfuse.refit import AsMixed
from tests.support.nets import build, data_shape, gap, mlp, outputs, randomise
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


# --- Wang et al. 2020 and Yurochkin et al. 2019, as the papers write them ---------------------


def log_posterior(members, prior):
    """Of fused weights about which members `(weights, precision)` lie, but for constants."""
    weighed = sum(p * w for w, p in members)
    return float((weighed**2 / (1 / prior**2 + sum(p for _, p in members))).sum())


def assigned(rows, precision, fused, networks, prior, gamma, most):
    """Hungarian assignment of one network's units to fused units, which are lists of members."""
    old, new = len(fused), min(len(rows), most - len(fused))
    gains = np.zeros((len(rows), len(fused) + new))
    for unit, w in enumerate(rows):
        for i, members in enumerate(fused):
            joined = log_posterior([*members, (w, precision)], prior)
            popular = np.log(len(members) / max(networks - len(members), 1))
            gains[unit, i] = joined - log_posterior(members, prior) + popular
        for i in range(new):
            alone = log_posterior([(w, precision)], prior)
            gains[unit, old + i] = alone + 2 * np.log(gamma / networks) - 2 * np.log(i + 1)
    places = linear_sum_assignment(-gains)[1] if fused else np.arange(len(rows))
    for unit, weights in enumerate(rows):
        if places[unit] >= old:
            places[unit] = len(fused)
            fused.append([])
        fused[places[unit]].append((weights, precision))
    return places


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 999))
@settings(max_examples=12, deadline=None)
def test_units_are_matched_as_the_papers_say(sizes, seed):
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=(n, 3)) for n in sorted(sizes, reverse=True)]
    precisions = rng.uniform(1, 9, size=(len(sizes), 1)) * np.ones(3)
    most, fused, wanted = max(sizes) + 3, [], []
    for w, p in zip(rows, precisions):
        wanted.append(assigned(w, p, fused, len(sizes), 2.0, 1.5, most))
    places = match_into_growing_set(rows, precisions, 2.0, 1.5, most, 0, rng)
    assert [p.tolist() for p in places] == [p.tolist() for p in wanted]


def test_networks_are_taken_out_and_assigned_anew():
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(6, 4)) + 2 * np.eye(6, 4) for _ in range(4)]
    precisions, best = np.full((4, 4), 1.0), []
    for rounds in (0, 5):
        places = match_into_growing_set(rows, precisions, 9.0, 1.0, 9, rounds, rng)
        members = [[] for _ in range(9)]
        for w, p in zip(rows, places):
            assert len(set(p.tolist())) == len(p)  # no two units of a network are one
            for row, i in zip(w, p):
                members[i].append((row, np.ones(4)))
        best.append(sum(log_posterior(m, 9.0) for m in members if m) - 3 * sum(map(bool, members)))
    assert best[1] > best[0]


def layers(net):
    weights = [p.detach().double().numpy() for p in net.parameters()]
    return list(zip(weights[::2], weights[1::2]))


def matched_averages(nets, shares, noise, prior, gamma):
    """The published algorithm on plain networks: their layers, matched and averaged one by one."""
    inputs, count = None, len(nets)
    result, depth = [], len(layers(nets[0]))
    for d in range(depth):
        both = [layers(net)[d] for net in nets]
        rows = []
        for k, (w, b) in enumerate(both):
            if inputs is not None:  # zeros for what the network has no unit for
                padded = np.zeros((len(w), max(p.max() for p in inputs) + 1))
                padded[:, inputs[k]] = w
                w = padded
            rows.append(np.hstack([w, b[:, None]]))
        places, fused = [np.arange(len(r)) for r in rows], []
        if d < depth - 1:
            scale = np.sqrt(np.mean(np.concatenate([(r**2).sum(1) for r in rows])))
            for k, r in enumerate(rows):
                precision = np.full(r.shape[1], shares[k] * count / noise**2)
                places[k] = assigned(r / scale, precision, fused, count, prior, gamma, 99)
        size = max(p.max() for p in places) + 1
        mass, mean = np.zeros(size), np.zeros((size, rows[0].shape[1]))
        for k, (r, p) in enumerate(zip(rows, places)):
            mass[p] += shares[k]
            mean[p] += shares[k] * r
        result.append(mean / mass[:, None])
        inputs = places
    return result


@pytest.mark.parametrize("noise", some([0.35, 0.6], 0.35))
def test_a_plain_network_is_that_of_the_published_algorithm(noise):
    nets = [randomise(mlp(6, 9 - k, 8 - k, 3), k) for k in range(3)]  # the widest comes first
    shares = np.array([50, 30, 20]) / 100
    method = MatchedAveraging(noise=noise, prior=5.0, gamma=2.0, limit=9.0, rounds=0)
    fused = fxfuse.fuse(
        nets, X, weights=[50, 30, 20], method=replace(presets.fedma, coupling=method)
    )
    wanted = matched_averages(nets, shares, noise, 5.0, 2.0)
    assert len(wanted[0]) > 9 or noise > 0.5  # it grows
    for (w, b), both in zip(layers(fused), wanted):
        assert np.allclose(np.hstack([w, b[:, None]]), both, atol=1e-5)


# --- laws and options ---------------------------------------------------------------------------

CLIENTS = [randomise(mlp(6, 8, 7, 3), 1), randomise(mlp(6, 10, 5, 4, 3), 2)]
CLIENTS += [randomise(mlp(6, 6, 3), 3), randomise(mlp(6, 8, 7, 3), 4)]


def widths(fused):
    return [p.shape[0] for p in fused.parameters() if p.dim() > 1]


def test_clients_of_unlike_depth_and_width_become_one_that_is_wider_within_a_limit():
    for limit in (1.0, 1.3):
        method = replace(presets.fedma, coupling=MatchedAveraging(limit=limit))
        fused = method(CLIENTS, X, weights=[100, 20, 3, 40])
        for space in fused.meta["fxfuse"].spaces:
            having = [n for n, c in zip(space.sizes, space.confidences) if c is not None]
            assert space.size <= math.ceil(limit * max(having))
    assert widths(fused)[0] == 13 and torch.isfinite(outputs(fused, X)).all()


@pytest.mark.parametrize("name", some([*("plain", "residual", "tokens", "grouped")], "plain"))
def test_copies_and_permuted_copies_change_nothing_and_weight_one_returns_a_network(name):
    net, x = build(name, 1)
    data = torch.randn(8, *data_shape(name))
    copies = presets.fedma([net, fxfuse.permute(net, x, seed=3), net], data)
    assert gap(net, copies, x) < FUNCTION
    alone = presets.fedma([net, build(name, 2)[0]], data, weights=[1, 0])
    assert gap(net, alone, x) < FUNCTION
    if name == "plain":
        state = net.state_dict()
        assert all(torch.equal(t, state[n]) for n, t in alone.state_dict().items())


@pytest.mark.sweep
def test_the_order_of_the_networks_does_not_matter():
    a, b, c, d = CLIENTS
    one = presets.fedma([a, b, c, d], X, weights=[1, 2, 3, 4], anchor=1)
    other = presets.fedma([d, c, b, a], X, weights=[4, 3, 2, 1], anchor=2)
    assert gap(one, other, X) < FUNCTION


def test_a_unit_that_is_alone_is_no_mean_and_only_its_network_reads_it():
    nets = [randomise(mlp(6, 4, 3), seed) for seed in (1, 2)]
    apart = MatchedAveraging(noise=1e-3, limit=9.0)
    fused = replace(presets.fedma, coupling=apart, refit=AsMixed())(nets, X, weights=[3, 1])
    with torch.no_grad():
        mean = 0.75 * nets[0](X) + 0.25 * nets[1](X)
        assert widths(fused)[0] == 8 and torch.allclose(fused(X), mean, atol=1e-5)


OPTIONS = [{"noise": 1.0}, {"prior": 0.1}, {"gamma": 0.01}, {"limit": 1.1}, {"rounds": 0}]


@pytest.mark.parametrize("option", some(OPTIONS, {"noise": 1.0}))
def test_every_option_matters(option):
    nets = [randomise(mlp(6, 12, 3), seed) for seed in (1, 2, 3)]
    usual = MatchedAveraging(noise=0.5)
    pair = [replace(presets.fedma, coupling=c)(nets, X) for c in (usual, replace(usual, **option))]
    assert widths(pair[0]) != widths(pair[1]) or gap(*pair, X) > 0.01


def test_the_seed_draws_the_order_in_which_networks_are_assigned_anew():
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(5, 2)) for _ in range(5)]
    found = {
        str(match_into_growing_set(rows, np.ones((5, 2)), 9, 1, 7, 1, np.random.default_rng(s)))
        for s in range(5)
    }
    assert len(found) > 1


@pytest.mark.parametrize("wrong", [{"noise": 0.0}, {"gamma": -1.0}, {"limit": 0.5}, {"rounds": -1}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ArgumentError, match="MatchedAveraging"):
        MatchedAveraging(**wrong)


def test_a_width_beside_a_coupling_that_chooses_it_is_refused():
    with pytest.raises(ArgumentError, match="limit"):
        presets.fedma(CLIENTS[:2], X, width=1.5)
