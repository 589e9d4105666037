"""Couplings from weights: planted permutations, options, refusals, and no data where none count."""

import numpy as np
import pytest
import torch
from conftest import FUNCTION
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS, build, data_shape, gap, mlp, moved, outputs, random_nets, randomise, residual
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from test_weightwise import images, mixer_of
from widening import widened

import fxfuse
from fxfuse.ascent import in_place
from fxfuse.coupling import one_map
from fxfuse.errors import PairingError, SolverError
from fxfuse.measuring import Measurements
from fxfuse.solvers import Assignment
from fxfuse.weight_matching import MergeMany, WeightMatching, WeightTransport
from fxfuse.weightwise import squared_distance

NOTHING = Measurements({}, {})
METHODS = {
    "transport": WeightTransport(),
    "transport, folded": WeightTransport(folded=True),
    "matching": WeightMatching(),
    "matching, folded": WeightMatching(folded=True),
    "many": MergeMany(),
}


def fused_by(coupling, nets, data, **options):
    return fxfuse.fuse(nets, data, method=fxfuse.Method(coupling=coupling), **options)


def couplings_of(method, mixer):
    method(mixer, NOTHING)
    return {key: c.project.toarray() for key, c in mixer.couplings.items()}


# --- what comes back exactly ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["transport", "matching"])
@pytest.mark.parametrize("name", NETS)
def test_a_network_and_its_permuted_copy_find_each_other(name, method):
    net, x = build(name)
    data = torch.randn(24, *data_shape(name))
    fused = fused_by(METHODS[method], [net, fxfuse.permute(net, x, seed=3)], data)
    assert gap(net, fused, data) < FUNCTION


@settings(max_examples=6)
@given(random_nets(), st.integers(0, 100), st.sampled_from(sorted(METHODS)))
def test_random_networks_and_their_permuted_copies_find_each_other(net, seed, method):
    data = images()
    if float(outputs(net, data).abs().max()) < 0.01:
        return
    fused = fused_by(METHODS[method], [net, fxfuse.permute(net, data[:2], seed=seed)], data)
    assert gap(net, fused, data) < FUNCTION


@pytest.mark.parametrize("anchor", [0, 1])
@pytest.mark.parametrize("folded", [False, True])
def test_a_network_with_every_unit_duplicated_transports_back(anchor, folded):
    net, data = randomise(residual((6, 2), (8, 1))), images(48)
    double = widened(net, residual((12, 2), (16, 1), stem=12), data[:2])
    fused = fused_by(WeightTransport(folded=folded), [net, double], data, anchor=anchor)
    assert gap(net, fused, data) < FUNCTION


def copies_of_unequal_depth_and_width(count, data):
    """Networks of one function: as it is, wider, deeper, both, and permuted."""
    net = randomise(residual((6, 2), (8, 1)), 1)
    wide = widened(net, residual((12, 2), (16, 1), stem=12), data[:2])
    others = [randomise(residual((6, n), (8, 2)), n) for n in (3, 4)]
    deep, both = (fxfuse.balance([n, o], data)[0] for n, o in zip((net, wide), others))
    shuffled = [fxfuse.permute(n, data[:2], seed) for seed, n in enumerate((wide, deep))]
    return [net, wide, deep, shuffled[0], both, shuffled[1]][:count]


@pytest.mark.parametrize(
    ("count", "coupling"),
    [
        (3, fxfuse.Method().coupling),
        (4, fxfuse.Method().coupling),
        (6, fxfuse.Method().coupling),
        (4, WeightTransport()),
    ],
)
def test_many_networks_of_unequal_depth_and_width_and_one_function_fuse_to_it(count, coupling):
    data = images(48)
    nets = copies_of_unequal_depth_and_width(count, data)
    fused = fused_by(coupling, nets, data, anchor=count // 3 - 1)  # 0, and once 1, which is wide
    assert gap(nets[0], fused, data) < FUNCTION


@pytest.mark.parametrize("coupling", [fxfuse.Method().coupling, WeightTransport()])
def test_layers_that_the_anchor_lacks_are_matched_among_those_that_have_them(coupling):
    """The anchor is wider, so its units of the block are nobody's, and it has no share."""
    net, data = randomise(residual((6, 1), (8, 1)), 1), images(48)
    wide = widened(net, residual((12, 1), (16, 1), stem=12), data[:2])
    deep = fxfuse.balance([net, randomise(residual((6, 2), (8, 1)), 2)], data)[0]
    for parameter in deep.parameters():  # the block it was given does something from here on
        if not parameter.any():
            parameter.data.normal_(0, 0.3)
    nets = [wide, deep, fxfuse.permute(deep, data[:2], seed=4)]
    assert gap(net, deep, data) > 0.01
    fused = fused_by(coupling, nets, data, anchor=0, weights=[0, 1, 1])
    assert gap(deep, fused, data) < FUNCTION


# --- weight transport -----------------------------------------------------------------------------


def test_transport_goes_forward_with_the_input_side_mapped():
    nets = [randomise(mlp(6, 5, 4, 3, bias=False), s) for s in (1, 2)]
    mixer = mixer_of(nets, torch.randn(8, 6))
    found = couplings_of(WeightTransport(), mixer)
    weights = ([p.detach().numpy() for p in n.parameters() if p.dim() == 2] for n in nets)
    (a1, a2, _), (b1, b2, _) = weights
    _, first = linear_sum_assignment(cdist(a1, b1))
    _, second = linear_sum_assignment(cdist(a2, b2[:, first]))
    assert found["0", 1].argmax(1).tolist() == first.tolist()
    assert found["2", 1].argmax(1).tolist() == second.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"ground_cost": squared_distance},
        {"scale_to_one": True},
        {"folded": True},
        {"passes": 1},
        {"maps": one_map},
    ],
)
def test_each_option_of_transport_changes_the_result(options):
    nets = [randomise(residual((6, 2), (9, 1)), 1), randomise(residual((9, 1), (12, 1), stem=9), 2)]
    a, b = (couplings_of(WeightTransport(**o), mixer_of(nets, images())) for o in ({}, options))
    assert any(not np.array_equal(a[key], b[key]) for key in a)


def test_the_solver_of_transport_is_used():
    nets = [randomise(mlp(6, n, 7, 3), n) for n in (8, 5)]
    with pytest.raises(SolverError, match="8 and 5|5 and 8"):
        fused_by(WeightTransport(solver=Assignment()), nets, torch.randn(16, 6))


def test_later_passes_change_nothing_on_a_plain_chain():
    nets, x = [randomise(mlp(6, 8, 7, 3), s) for s in (1, 2)], torch.randn(8, 6)
    once, twice = (couplings_of(WeightTransport(passes=p), mixer_of(nets, x)) for p in (1, 2))
    assert all(np.array_equal(once[key], twice[key]) for key in once)


# --- weight matching ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"start": in_place},
        {"start": in_place, "seed": 3},
        {"start": in_place, "sweeps": 1},
        {"folded": True},
    ],
)
def test_each_option_of_matching_changes_the_result(options):
    nets = [randomise(residual((6, 2), (9, 2)), s) for s in (1, 2)]
    plain = {"start": in_place} if len(options) > 1 else {}
    a, b = (couplings_of(WeightMatching(**o), mixer_of(nets, images())) for o in (plain, options))
    assert any(not np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("method", [WeightMatching(), MergeMany()])
def test_networks_of_unequal_width_are_refused_with_what_to_use(method):
    nets = [randomise(mlp(6, 8, 7, 3)), randomise(mlp(6, 5, 7, 3))]
    with pytest.raises(PairingError, match=type(method).__name__):
        fused_by(method, nets, torch.randn(16, 6))


@pytest.mark.parametrize(("method", "anchor"), [(WeightMatching(), 2), (MergeMany(), 0)])
def test_matching_networks_of_unequal_depth_gives_permutations(method, anchor):
    nets = [randomise(residual((6, n), (8, m)), n) for n, m in ((1, 2), (2, 1), (1, 1))]
    mixer = mixer_of(nets, images(), anchor)
    found = couplings_of(method, mixer)
    for name, present in mixer.match.present.items():
        for k, here in enumerate(present):
            sums = {*found[name, k].sum(0), *found[name, k].sum(1)}
            assert sums == ({1.0} if here else {0.0})


# --- no data where none count ---------------------------------------------------------------------


@pytest.mark.parametrize("coupling", [WeightTransport(), WeightMatching(), MergeMany()])
def test_without_moments_and_norms_nothing_is_measured(coupling, monkeypatch):
    nets = [randomise(mlp(6, 8, 7, 3), s) for s in (1, 2)]
    data = torch.randn(16, 6)
    method = fxfuse.Method(coupling=coupling, match_moments=False)
    expected = fxfuse.fuse(nets, data, method=method)
    monkeypatch.setattr("fxfuse.measuring.walk", None)
    again = fxfuse.fuse(nets, data + 1, method=method)
    assert not moved(expected, again)


def test_without_moments_norms_are_still_settled():
    net, x = build("residual")
    method = fxfuse.Method(coupling=WeightMatching(), match_moments=False)
    fused = fxfuse.fuse([net, fxfuse.permute(net, x, seed=1)], images(), method=method)
    assert gap(net, fused, images()) < FUNCTION
