"""The greedy zip against brute force, and networks that must come back whole."""

import time
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxfuse
from fxfuse.calibration.data import Calibration
from fxfuse.calibration.moments import PairMoments
from fxfuse.coupling.measure import View, measure
from fxfuse.coupling.zipit import Zip, greedy_zip, similarities
from fxfuse.errors import ArgumentError, FuseError, SolverError
from fxfuse.refit.moments import AsMixed, MatchMoments
from fxfuse.solvers import Assignment, Exact, Sinkhorn, UnbalancedSinkhorn
from tests.support.nets import (
    build,
    data_shape,
    gap,
    mlp,
    outputs,
    random_nets,
    randomise,
    residual,
    stages,
)
from tests.support.problems import problem_of
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION
from tests.support.widening import widened


def method(zipped, **options):
    return fxfuse.Method(coupling=zipped, **options)


def images(count=48, seed=5):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


# --- the algorithm --------------------------------------------------------------------------------


def slow_zip(similarity, owners, size, alpha, beta):
    """The rule written down plainly: all pairs of groups are looked through at every merge."""
    s, count = np.array(similarity, dtype=float), len(owners)
    held, networks = {i: [i] for i in range(count)}, sorted(set(owners))
    widths = {k: list(owners).count(k) for k in networks}
    budget = {
        k: max(np.floor((count - size) * w / count * beta + 1e-4), w - size)
        for k, w in widths.items()
    }

    def shared(i, j):
        return {owners[u] for u in held[i]} & {owners[u] for u in held[j]}

    while len(held) > size:
        pairs = [(i, j) for i in held for j in held if i < j]
        free = [p for p in pairs if all(budget[k] > 0 for k in shared(*p))]
        if not free:
            budget, free = dict.fromkeys(networks, np.inf), pairs
        i, j = max(sorted(free), key=lambda p: s[p])
        for k in shared(i, j):
            budget[k] -= 1
        lower = np.minimum(s[i], s[j])
        s[i] = lower if s[i, j] >= 1 else np.minimum(lower, alpha * lower)
        s[:, i] = s[i]
        held[i] += held.pop(j)
    groups = np.zeros(count, dtype=int)
    for g, first in enumerate(sorted(held)):
        groups[held[first]] = g
    return groups


@st.composite
def problems(draw):
    """Similarities with and without ties, some of them of units that are the same."""
    widths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    owners, rng = (
        np.repeat(np.arange(len(widths)), widths),
        np.random.default_rng(draw(st.integers(0, 999))),
    )
    s = rng.uniform(-1, 1, (len(owners),) * 2)
    if draw(st.booleans()):
        s = np.round(2 * s) / 2
    s = np.tril(s, -1) + np.tril(s, -1).T + np.eye(len(owners))
    return s, owners, draw(st.integers(1, len(owners)))


options = st.sampled_from([0.01, 0.3, 1.0]), st.sampled_from([0.0, 0.125, 0.5, 1.0])


@settings(max_examples=150)
@given(problems(), *options)
def test_the_greedy_zip_does_what_its_rule_says(problem, alpha, beta):
    kept = problem[0].copy()
    assert greedy_zip(*problem, alpha, beta).tolist() == slow_zip(*problem, alpha, beta).tolist()
    assert np.array_equal(problem[0], kept)


@given(problems(), *options)
def test_there_are_as_many_groups_as_asked_for_in_the_order_of_their_first_units(p, alpha, beta):
    groups = greedy_zip(*p, alpha, beta)
    first = [groups.tolist().index(g) for g in range(p[2])]
    assert set(groups) == set(range(p[2])) and first == sorted(first)


@given(st.integers(1, 9), st.integers(0, 99))
def test_without_a_budget_two_networks_are_matched_one_to_one(width, seed):
    """The published code lets each network merge two of its own units even so."""
    rng = np.random.default_rng(seed)
    s = np.corrcoef(rng.standard_normal((2 * width, 6)) + rng.standard_normal(6))
    groups = greedy_zip(s, np.repeat([0, 1], width), width, alpha=0.3, beta=0)
    assert groups[:width].tolist() == list(range(width))
    assert sorted(groups[width:]) == list(range(width))


def test_a_mixed_group_counts_as_both_of_its_networks():
    """Units 0 | 1 2: 0 and 1 are merged first; 2 may then not join them for free."""
    s = np.array([[1, 0.9, 0.8, 0], [0.9, 1, 0.7, 0], [0.8, 0.7, 1, 0], [0, 0, 0, 1]])
    owners = np.array([0, 1, 1, 0])
    assert greedy_zip(s, owners, 2, alpha=1, beta=0).tolist() == [0, 0, 1, 1]
    assert greedy_zip(s, owners, 2, alpha=1, beta=1).tolist() == [0, 0, 0, 1]


def test_a_discount_does_not_raise_negative_similarities():
    """The pair (0, 1) merged, -0.8 is still the worst; times alpha it would be the best."""
    s = -0.5 * np.ones((4, 4)) + 1.5 * np.eye(4)
    s[0, 1] = s[1, 0] = 0.5
    s[0, 2] = s[2, 0] = -0.8
    groups = greedy_zip(s, np.arange(4) % 2, 2, alpha=0.1, beta=1)
    assert groups.tolist() == [0, 0, 1, 0] or groups[2] != groups[0]


def test_alpha_keeps_groups_small():
    rng = np.random.default_rng(3)
    s = np.corrcoef(rng.standard_normal((40, 8)))
    sizes = {
        a: np.bincount(greedy_zip(s, np.repeat([0, 1], 20), 20, a, beta=1)).max() for a in (1, 0.01)
    }
    assert sizes[1] > sizes[0.01]


def test_a_wide_layer_is_zipped_in_seconds():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((1024, 64))
    s = np.corrcoef(np.vstack([base, base + rng.standard_normal(base.shape)]))
    start = time.perf_counter()
    groups = greedy_zip(s, np.repeat([0, 1], 1024), 1024)
    assert time.perf_counter() - start < 10 and groups.max() == 1023


# --- similarities ---------------------------------------------------------------------------------


def moments_of(*values):
    found = {}
    for i, x in enumerate(values):
        for k, y in enumerate(values):
            if i <= k:
                found[i, k] = [PairMoments()]
                found[i, k][0].add(x, y)
    return found


def test_units_of_all_networks_are_correlated_in_the_order_given():
    x, y = torch.randn(3, 50), torch.randn(2, 50) + 1
    direct = np.corrcoef(np.vstack([y, x]))
    found = similarities(moments_of(x, y), [1, 0])
    assert found.shape == (5, 5) and np.abs(found - direct).max() < 0.02  # the tie break
    assert np.allclose(found, found.T)


def test_dead_units_resemble_dead_units_of_the_same_value_only():
    x, y = torch.rand(3, 50), torch.rand(4, 50)
    x[1], y[0], y[2] = 0.0, 0.0, 3.0
    found = similarities(moments_of(x, y), [0, 1])
    assert found[1, 3] == 1.0 and found[1, 5] < 0
    assert np.abs(found[1, [0, 2, 4, 6]]).max() < 0.01
    assert np.isfinite(found).all()


# --- whole networks -------------------------------------------------------------------------------

COPIED = ["plain", "flatten", "batch norm", "residual", "grouped", "padded", "depthwise", "tokens"]


@pytest.mark.parametrize("name", some(COPIED, "flatten", "grouped", "tokens"))
def test_zipping_permuted_copies_of_a_network_gives_the_network(name):
    net, x = build(name)
    data = torch.randn(48, *data_shape(name), generator=torch.Generator().manual_seed(7))
    copies = [fxfuse.permute(net, x, seed=s) for s in (3, 4)]
    for nets, weights, zipped, matched in (
        ([net, net], None, Zip(), False),
        ([net, copies[0]], [0.2, 0.8], Zip(alpha=1, beta=1), True),
        ([net, *copies], None, Zip(beta=0), True),
        ([net, *copies], [0.2, 0.5, 0.3], Zip(alpha=0.5, beta=0.5), False),
    ):
        chosen = method(zipped, refit=MatchMoments() if matched else AsMixed())
        fused = fxfuse.fuse(nets, data, weights=weights, method=chosen)
        assert gap(net, fused, data) < FUNCTION, (weights, zipped, matched)


@settings(max_examples=6)
@given(random_nets())
def test_zipping_a_random_network_with_its_permuted_copy_gives_the_network(net):
    x = images(64)
    fused = fxfuse.fuse([net, fxfuse.permute(net, x[:2], seed=2)], x, method=method(Zip(beta=0)))
    assert gap(net, fused, x) < FUNCTION


WIDE = {
    "linear": lambda k: mlp(6, 5 * k, 4 * k, 3),
    "stages": lambda k: stages([5 * k, 6 * k], [7 * k]),
    "residual": lambda k: residual((6 * k, 2), (8 * k, 1), stem=6 * k),
}


ZIPS = [Zip(), Zip(alpha=1, beta=1)]
QUICK = ("linear", ZIPS[0]), ("stages", ZIPS[0]), ("stages", ZIPS[1])


@pytest.mark.parametrize(("name", "zipped"), some(product(WIDE, ZIPS), *QUICK))
def test_a_network_of_duplicated_units_folds_back_exactly(name, zipped):
    net = randomise(WIDE[name](1))
    x = torch.randn(60, 6) if name == "linear" else images(60)
    wide = widened(net, WIDE[name](2), x[:2])
    for nets, weights in (([wide, net], None), ([net, wide, net], [0.6, 0.1, 0.3])):
        narrow = fxfuse.fuse(
            nets, x, weights=weights, anchor=nets.index(net), method=method(zipped)
        )
        assert outputs(narrow, x).shape == outputs(net, x).shape and gap(net, narrow, x) < FUNCTION
        broad = fxfuse.fuse(nets, x, weights=weights, method=method(zipped))
        sizes = [s.size for s in broad.meta["fxfuse"].spaces]
        assert max(sizes) == max(s.size for s in fxfuse.find_spaces(wide, x[:2]))
        assert gap(net, broad, x) < FUNCTION


@pytest.mark.parametrize(("preset", "width"), [("zipit", 9), ("elastic_zip", 18)])
def test_copies_come_back_from_one_sample_which_says_nothing_of_silent_units(preset, width):
    net, x = randomise(mlp(6, 9, 9, 4)), torch.randn(40, 6)
    other = fxfuse.net2wider(net, x[:4]) if width > 9 else net
    other = fxfuse.permute(other, x[:4], seed=1)
    fused = fxfuse.fuse([net, other], x[:1], method=preset)
    assert (fused.get_submodule("0").out_features, gap(net, fused, x) < FUNCTION) == (width, True)


def test_an_anchor_wider_than_a_layer_it_lacks_holds_copies_of_its_units():
    """The deep network alone has the second block, 6 units wide where the anchor has 8."""
    x = images()
    deep = randomise(residual((6, 2), (8, 1)), 2)
    wide = randomise(residual((8, 1), (8, 1), stem=8), 1)
    fused = fxfuse.fuse([wide, deep], x, weights=[0, 1], method=method(Zip(beta=0)))
    assert fused.meta["fxfuse"].anchor == 0 and gap(deep, fused, x) < FUNCTION


@pytest.mark.parametrize("weights", [[1, 0], [0, 1]])
def test_a_network_without_a_share_has_no_say(weights):
    nets = [randomise(stages([5, 6], [7]), s) for s in (1, 2)]
    fused = fxfuse.fuse(nets, images(), weights=weights, method=method(Zip(beta=1)))
    assert gap(nets[weights.index(1)], fused, images()) < FUNCTION


def test_a_block_that_one_network_lacks_is_kept_and_the_stream_is_zipped():
    deep = randomise(residual((6, 3), (8, 1)), 1)
    shallow = randomise(residual((6, 1), (8, 1)), 2)
    fused = fxfuse.fuse([deep, shallow], images(), method=method(Zip(beta=0)))
    own = [s for s in fused.meta["fxfuse"].spaces if s.confidences[1] is None]
    assert own and all(s.confidences[0] == 1.0 for s in own)
    shared = [s for s in fused.meta["fxfuse"].spaces if s.confidences[1] is not None]
    assert shared and all(s.confidences == (1.0, 1.0) for s in shared)
    assert all(0 < c < 2 for s in shared for c in s.costs)


def zipped_networks(nets, x, zipped, weights, anchor=0):
    problem = problem_of(nets, x, anchor, weights)
    evidence = measure(problem, Calibration(x), zipped.view, {}, len(x))
    before = set(evidence.pairs)
    couplings = zipped(problem, evidence)
    assert set(evidence.pairs) == before, "what was measured is not used up"
    return couplings


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.8)])
def test_groups_are_weighted_means_and_are_read_whole(weights):
    nets = [randomise(stages([8, 9], [7]), 1), randomise(stages([5, 6], [7]), 2)]
    couplings = zipped_networks(nets, images(), Zip(alpha=1, beta=1), weights)
    uneven = False
    for name, spaces in couplings.problem.spaces.items():
        maps = [couplings.maps[name, k] for k in (0, 1)]
        total = sum(w * m.given for w, m in zip(weights, maps))
        assert np.allclose(total, 1.0)
        for coupling, space in zip(maps, spaces):
            read = coupling.unproject.toarray()
            assert read.shape == (space.size, spaces[0].size)
            assert set(np.unique(read)) <= {0.0, 1.0} and (read.sum(1) == 1).all()
            assert np.array_equal(coupling.project.toarray() > 0, read.T > 0)
            uneven |= bool((read.sum(0) > 1).any())
    assert uneven, "no group has two units of one network, so nothing is shown"


def test_a_tensor_of_one_network_alone_keeps_the_scale_of_its_units():
    """A unit made of two of network 0 and one of network 1 is the mean of the two there."""
    nets = [randomise(stages([12, 16], [14]), 1), randomise(stages([10, 12], [14]), 2)]
    couplings = zipped_networks(nets, images(), Zip(alpha=1, beta=1), (0.3, 0.7))
    uneven = False
    for space in couplings.problem.networks[0].spaces:
        axis = next(a for a in space.axes if not a.reads)
        couplings.problem.__dict__["lacking"] = (set(), {axis.tensor})
        values = [np.ones(s.size) for s in couplings.problem.spaces[space.name]]
        mixed = couplings.mix(axis.tensor, values, axis.dim)
        given = [couplings.maps[space.name, k].given for k in (0, 1)]
        assert np.allclose(mixed[given[0] > 0], 1.0) and not mixed[given[0] == 0].any()
        uneven |= bool(((given[1] > 0) & (given[0] > 0) & (given[0] != given[1])).any())
    assert uneven, "no group has more of one network than of the other, so nothing is shown"


def test_each_choice_of_a_zip_changes_the_result():
    nets, x = [randomise(stages([8, 16], [24]), s) for s in (1, 2)], images()
    plain = fxfuse.fuse(nets, x, method=method(Zip(alpha=0.3, beta=1)))
    for other in (
        Zip(alpha=1, beta=1),
        Zip(alpha=0.3, beta=0),
        Zip(alpha=0.3, beta=1, view=View(everything=True)),
    ):
        assert gap(plain, fxfuse.fuse(nets, x, method=method(other)), x) > 1e-3, other


def test_the_widest_network_is_the_anchor_of_a_zip_and_the_deepest_among_equals():
    x = images()
    wide, deep = (
        randomise(residual((8, 1), (8, 1), stem=8), 1),
        randomise(residual((6, 2), (8, 1)), 2),
    )
    anchor = fxfuse.fuse([wide, deep], x, method=method(Zip())).meta["fxfuse"].anchor
    assert anchor == 0 and fxfuse.fuse([wide, deep], x).meta["fxfuse"].anchor == 1
    same = randomise(residual((6, 1), (8, 1)), 1)
    assert fxfuse.fuse([same, deep], x, method=method(Zip())).meta["fxfuse"].anchor == 1
    told = method(Zip(), anchor=lambda depths: 1)
    assert fxfuse.fuse([wide, deep], x, method=told).meta["fxfuse"].anchor == 1


# --- what is refused ------------------------------------------------------------------------------


def uniform(*sizes):
    return [np.full(n, 1 / n) for n in sizes]


COST = np.random.default_rng(0).random((6, 4))
NAN = COST[:4].copy()
NAN[2, 1] = np.nan


REFUSED = {
    "sizes that differ": (
        lambda: Assignment()(COST, *uniform(6, 4)),
        SolverError,
        "6 and 4 units.*0.167 to 0.167 and 0.25 to 0.25",
    ),
    "marginals that are not uniform": (
        lambda: Assignment()(COST[:3, :3], np.array([0.2, 0.3, 0.5]), uniform(3)[0]),
        SolverError,
        "3 and 3 units, of masses 0.2 to 0.5",
    ),
    "masses that differ": (
        lambda: Exact()(COST, uniform(6)[0], 2 * uniform(4)[0]),
        SolverError,
        "add up to 1 and 2",
    ),
    "masses that differ, softly": (
        lambda: Sinkhorn()(COST, uniform(6)[0], 2 * uniform(4)[0]),
        SolverError,
        "add up to 1 and 2",
    ),
    "no mass": (
        lambda: UnbalancedSinkhorn()(COST, np.zeros(6), uniform(4)[0]),
        SolverError,
        "not all positive",
    ),
    "too few scalings": (
        lambda: Sinkhorn(0.02, iterations=3)(COST, *uniform(6, 4)),
        SolverError,
        "did not converge in 3 iterations: marginals are off by up to .*e-0.* of a unit's mass",
    ),
    "too little regularisation": (
        lambda: Sinkhorn(1e-7, iterations=50)(COST, *uniform(6, 4)),
        SolverError,
        "did not converge in 50 iterations: marginals",
    ),
    "too few scalings, unbalanced": (
        lambda: UnbalancedSinkhorn(0.01, 9.0, iterations=3)(COST, *uniform(6, 4)),
        SolverError,
        "did not converge in 3 iterations: marginals",
    ),
    "nothing worth its cost": (
        lambda: UnbalancedSinkhorn(0.5, 0.01, absolute=True)(COST + 99, *uniform(6, 4)),
        SolverError,
        "matches no unit|did not converge",
    ),
    "no regularisation": (lambda: Sinkhorn(0.0), ArgumentError, "regularisation 0.0"),
    "no iterations": (lambda: Sinkhorn(iterations=0), ArgumentError, "iterations 0"),
    "no price of marginals": (
        lambda: UnbalancedSinkhorn(marginals=-1.0),
        ArgumentError,
        "marginals -1.0",
    ),
    "alpha zero": (lambda: Zip(alpha=0), ArgumentError, "alpha 0 and beta 0.125"),
    "alpha above one": (lambda: Zip(alpha=1.5), ArgumentError, "alpha 1.5"),
    "beta below zero": (lambda: Zip(beta=-0.1), ArgumentError, "beta -0.1"),
    "beta above one": (lambda: Zip(beta=2), ArgumentError, "beta 2"),
    "alpha that is no number": (lambda: Zip(alpha=float("nan")), ArgumentError, "alpha nan"),
    "a view of some": (lambda: Zip(view=View(activated=True)), ArgumentError, "everything=False"),
    "more groups than units": (
        lambda: greedy_zip(np.eye(3), np.zeros(3, int), 4),
        ArgumentError,
        "3 units to be zipped into 4 groups",
    ),
    "no groups": (lambda: greedy_zip(np.eye(3), np.zeros(3, int), 0), ArgumentError, "0 groups"),
    **{
        f"costs that are not numbers, {type(s).__name__}": (
            lambda s=s: s(NAN, *uniform(4, 4)),
            SolverError,
            "NaN or infinite",
        )
        for s in (Exact(), Assignment(), Sinkhorn(), UnbalancedSinkhorn())
    },
    "similarities that are not numbers": (
        lambda: greedy_zip(np.full((3, 3), np.nan), np.zeros(3, int), 2),
        ArgumentError,
        "NaN or infinite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_coupled_is_refused_in_four_parts(case):
    call, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words) as caught:
        call()
    error = caught.value
    assert isinstance(error, FuseError) and all((error.met, error.where, error.expected, error.do))
