"""Matching by weights: planted permutations, brute force, the order of visits, and refusals."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

import fxfuse
from fxfuse.coupling._weights import Weights
from fxfuse.coupling.measure import Evidence
from fxfuse.coupling.plans import one_map
from fxfuse.coupling.weight_matching import (
    Ascent,
    MergeMany,
    WeightMatching,
    WeightTransport,
    by_content,
    families,
    inner,
    members,
    merge_in_turn,
    network_order,
    require_equal_widths,
    sum_of,
)
from fxfuse.errors import PairingError, SolverError
from fxfuse.refit.moments import AsMixed
from fxfuse.solvers import Assignment
from tests.support.nets import (
    NETS,
    build,
    data_shape,
    gap,
    mlp,
    moved,
    outputs,
    random_nets,
    randomise,
    residual,
)
from tests.support.problems import images, joined, problem_of
from tests.support.sweeps import crossed
from tests.support.tolerances import FUNCTION
from tests.support.widening import widened


def length(weights):
    """Squared norm of the sum of all networks: what matching raises."""
    return sum(inner(t, t) for t in sum_of(weights, range(len(weights.states))).values())


def test_networks_are_ordered_by_what_they_hold():
    nets, x = [randomise(mlp(6, 8, 7, 3), s) for s in range(3)], torch.randn(8, 6)
    ranks = set()
    for order in itertools.permutations(range(3)):
        weights = Weights.of(problem_of([nets[i] for i in order], x))
        ranks.add(tuple(order[i] for i in by_content(weights)))
    assert len(ranks) == 1


def test_the_sum_is_over_the_networks_that_have_a_tensor():
    nets = [randomise(residual((6, n), (8, 1)), n) for n in (1, 2, 1)]
    weights, _ = joined(nets, images(), in_place=True)
    total = sum_of(weights, range(3))
    assert np.array_equal(total["1.1.a.0.weight"], nets[1].state_dict()["1.1.a.0.weight"].numpy())
    stem = [n.state_dict()["0.0.weight"].numpy() for n in nets]
    assert np.allclose(total["0.0.weight"], sum(stem), atol=1e-6)


@pytest.mark.parametrize("in_place", [False, True])
def test_turns_make_the_networks_more_alike_until_none_moves(in_place):
    nets = [randomise(mlp(6, 8, 7, 3), s) for s in range(4)]
    weights, free = joined(nets, torch.randn(8, 6), in_place)
    before = length(weights)
    merge_in_turn(weights, free, 100, np.random.default_rng(0))
    after = length(weights)
    assert after > before
    merge_in_turn(weights, free, 100, np.random.default_rng(1))
    assert length(weights) == pytest.approx(after, rel=1e-12)


def test_of_small_networks_no_single_map_could_be_better():
    nets = [randomise(mlp(4, 3, 2, bias=False), s) for s in range(3)]
    weights, free = joined(nets, torch.randn(8, 4))
    merge_in_turn(weights, free, 100, np.random.default_rng(0))
    orders = [weights.couplings["0", k].project.indices for k in range(3)]
    pairs = [[p.detach().double() for p in n.parameters() if p.dim() == 2] for n in nets]

    def score(orders):
        first = sum(a[list(o)] for (a, _), o in zip(pairs, orders))
        second = sum(b[:, list(o)] for (_, b), o in zip(pairs, orders))
        return float(first.square().sum() + second.square().sum())

    for k, order in itertools.product(range(3), itertools.permutations(range(3))):
        tried = [order if i == k else o for i, o in enumerate(orders)]
        assert score(tried) <= score(orders) + 1e-6


def test_the_order_of_the_networks_does_not_matter():
    nets, data = [randomise(residual((6, 1), (8, 1)), s) for s in range(3)], images()
    method = fxfuse.Method(coupling=MergeMany())
    whole = fxfuse.fuse(nets, data, method=method)
    for shift in (1, 2):
        turned = nets[shift:][::-1] + nets[:shift]
        assert gap(whole, fxfuse.fuse(turned, data, method=method), data) < FUNCTION


@pytest.mark.parametrize("name", ["plain", "grouped", "tokens"])
def test_permuted_copies_of_one_network_fuse_to_it(name):
    net, x = build(name)
    data = torch.randn(24, *data_shape(name))
    copies = [net, *(fxfuse.permute(net, x, seed=s) for s in range(3))]
    fused = fxfuse.fuse(copies, data, method=fxfuse.Method(coupling=MergeMany()))
    assert gap(net, fused, data) < FUNCTION


def ascent_of(a, b, x):
    """Return an ascent of the second network towards the first, and its weights."""
    weights = Weights.of(problem_of([a, b], x))
    Ascent(weights, 0, {}, list(weights.problem.spaces)).keep()
    targets = {name: weights.carried(name, 0) for name in weights.states[0]}
    return Ascent(weights, 1, targets, list(weights.problem.spaces))


def value(ascent):
    targets = ascent.targets.items()
    return sum(inner(t, ascent.weights.carried(n, 1)) for n, t in targets)


def by_hand(a, b, orders):
    """Sum of inner products of two MLPs' tensors, the second's hidden units in some order."""
    first, last, total = [part for part in b if hasattr(part, "weight")], None, 0.0
    for i, (one, two) in enumerate(zip([part for part in a if hasattr(part, "weight")], first)):
        w, bias = two.weight.detach().double(), two.bias.detach().double()
        if i:
            w = w[:, last]
        if i < len(orders):
            last = list(orders[i])
            w, bias = w[last], bias[last]
        total += float((one.weight.detach() * w).sum() + (one.bias.detach() * bias).sum())
    return total


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([Ascent.sweep, Ascent.keep]))
def test_what_is_reached_no_single_space_can_raise(seed, start):
    nets, x = [randomise(mlp(5, 4, 3, 2), s) for s in (seed, seed + 1)], torch.randn(8, 5)
    ascent = ascent_of(*nets, x)
    start(ascent)
    ascent.run(np.random.default_rng(seed))
    orders = [ascent.weights.couplings[n, 1].project.indices for n in ("0", "2")]
    reached = by_hand(*nets, orders)
    assert reached == pytest.approx(value(ascent), rel=1e-6)
    for i, size in enumerate((4, 3)):
        for order in itertools.permutations(range(size)):
            tried = [order if j == i else orders[j] for j in range(2)]
            assert by_hand(*nets, tried) <= reached + 1e-5


@pytest.mark.parametrize("name", NETS)
def test_a_run_never_lowers_the_sum_and_ends(name):
    (a, _), (b, _) = build(name, 1), build(name, 2)
    ascent = ascent_of(a, b, torch.randn(8, *data_shape(name)))
    ascent.keep()
    reached = [value(ascent)]
    for seed in range(3):
        ascent.run(np.random.default_rng(seed), 1)
        reached.append(value(ascent))
    assert all(b >= a - 1e-6 * abs(a) for a, b in itertools.pairwise(reached))
    ascent.run(np.random.default_rng(0))
    assert not ascent.run(np.random.default_rng(1)), "it stopped before the end"


def test_every_map_stays_a_permutation_inside_its_blocks():
    (a, _), (b, _) = build("grouped", 1), build("grouped", 2)
    ascent = ascent_of(a, b, images())
    ascent.sweep()
    ascent.run(np.random.default_rng(0))
    problem, couplings = ascent.weights.problem, ascent.weights.couplings
    for name, spaces in problem.spaces.items():
        project = couplings[name, 1].project.toarray()
        assert (project.sum(0) == 1).all() and (project.sum(1) == 1).all()
        parent = spaces[0].parent
        if parent is not None:
            outer = couplings[parent, 1].project.toarray()
            for fused, own in zip(*project.nonzero()):
                assert outer[spaces[0].blocks[fused], spaces[1].blocks[own]]


def test_the_least_sweeps_stop_early():
    nets, x = [randomise(residual((6, 2), (8, 2)), s) for s in (1, 2)], images()
    reached = []
    for sweeps in (0, 1, 100):
        ascent = ascent_of(*nets, x)
        ascent.keep()
        ascent.run(np.random.default_rng(0), sweeps)
        reached.append(value(ascent))
    assert reached[0] < reached[1] < reached[2]


def test_spaces_come_in_the_order_in_which_they_are_written():
    class Backwards(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = torch.nn.Linear(7, 3), torch.nn.Linear(6, 8)
            self.middle = torch.nn.Linear(8, 7)

        def forward(self, x):
            return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))

    problem = problem_of([randomise(Backwards())], torch.randn(8, 6))
    assert network_order(problem.networks[0]) == ["first", "middle"]


def test_spaces_inside_blocks_form_a_family_with_them():
    net, _ = build("tokens")
    problem = problem_of([net], images())
    network = problem.networks[0]
    parents = {s.name: s.parent for s in network.spaces}
    for family in families(network):
        assert {parents[name] for name in family[1:]} <= {*family}
        assert parents[family[0]] is None
    assert sorted(n for f in families(network) for n in f) == sorted(parents)
    heads = next(f for f in families(network) if len(f) == 3)
    assert [members(problem, name) for name in heads] == [1, 4, 4]


def test_networks_of_unequal_width_are_refused():
    nets = [randomise(mlp(6, 8, 7, 3)), randomise(mlp(6, 5, 7, 3))]
    with pytest.raises(PairingError, match="8 and 5") as caught:
        require_equal_widths(problem_of(nets, torch.randn(8, 6)), "M")
    assert "WeightTransport" in caught.value.do
    require_equal_widths(problem_of([nets[0], nets[0]], torch.randn(8, 6)), "M")


def test_a_layer_that_only_one_network_has_does_not_make_widths_unequal():
    nets = [randomise(residual((6, 2), inner=9)), randomise(residual((6, 1), inner=9))]
    require_equal_widths(problem_of(nets, images()), "M")
    assert fxfuse.find_spaces(nets[0], images(2)).free_units


NOTHING = Evidence({}, {})


METHODS = {
    "transport": WeightTransport(),
    "matching": WeightMatching(),
    "many": MergeMany(),
}


def fused_by(coupling, nets, data, **options):
    return fxfuse.fuse(nets, data, method=fxfuse.Method(coupling=coupling), **options)


def couplings_of(method, problem):
    maps = method(problem, NOTHING).maps
    return {key: c.project.toarray() for key, c in maps.items()}


# --- what comes back exactly ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), crossed(NETS, ["matching", "transport"]))
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
def test_a_network_with_every_unit_duplicated_transports_back(anchor):
    net, data = randomise(residual((6, 2), (8, 1))), images(48)
    double = widened(net, residual((12, 2), (16, 1), stem=12), data[:2])
    fused = fused_by(WeightTransport(), [net, double], data, anchor=anchor)
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
        pytest.param(4, fxfuse.Method().coupling, marks=pytest.mark.sweep),
        pytest.param(6, fxfuse.Method().coupling, marks=pytest.mark.sweep),
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
    found = couplings_of(WeightTransport(), problem_of(nets, torch.randn(8, 6)))
    weights = ([p.detach().numpy() for p in n.parameters() if p.dim() == 2] for n in nets)
    (a1, a2, _), (b1, b2, _) = weights
    _, first = linear_sum_assignment(cdist(a1, b1))
    _, second = linear_sum_assignment(cdist(a2, b2[:, first]))
    assert found["0", 1].argmax(1).tolist() == first.tolist()
    assert found["2", 1].argmax(1).tolist() == second.tolist()


@pytest.mark.parametrize("options", [{"passes": 1}, {"maps": one_map}])
def test_each_option_of_transport_changes_the_result(options):
    nets = [randomise(residual((6, 2), (9, 1)), 1), randomise(residual((9, 1), (12, 1), stem=9), 2)]
    a, b = (couplings_of(WeightTransport(**o), problem_of(nets, images())) for o in ({}, options))
    assert any(not np.array_equal(a[key], b[key]) for key in a)


def test_the_solver_of_transport_is_used():
    nets = [randomise(mlp(6, n, 7, 3), n) for n in (8, 5)]
    with pytest.raises(SolverError, match="8 and 5|5 and 8"):
        fused_by(WeightTransport(solver=Assignment()), nets, torch.randn(16, 6))


def test_later_passes_change_nothing_on_a_plain_chain():
    nets, x = [randomise(mlp(6, 8, 7, 3), s) for s in (1, 2)], torch.randn(8, 6)
    once, twice = (couplings_of(WeightTransport(passes=p), problem_of(nets, x)) for p in (1, 2))
    assert all(np.array_equal(once[key], twice[key]) for key in once)


# --- weight matching ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [WeightMatching, MergeMany])
def test_the_seed_changes_where_matching_ends(method):
    nets = [randomise(mlp(6, 16, 16, 16, 16, 3), s) for s in range(3)]
    problem = problem_of(nets, torch.randn(8, 6))
    ends = [couplings_of(method(seed=seed), problem) for seed in range(4)]
    assert any(not np.array_equal(ends[0][key], end[key]) for end in ends[1:] for key in end)


@pytest.mark.parametrize("method", [WeightMatching(), MergeMany()])
def test_networks_of_unequal_width_are_refused_with_what_to_use(method):
    nets = [randomise(mlp(6, 8, 7, 3)), randomise(mlp(6, 5, 7, 3))]
    with pytest.raises(PairingError, match=type(method).__name__):
        fused_by(method, nets, torch.randn(16, 6))


@pytest.mark.parametrize(("method", "anchor"), [(WeightMatching(), 2), (MergeMany(), 0)])
def test_matching_networks_of_unequal_depth_gives_permutations(method, anchor):
    nets = [randomise(residual((6, n), (8, m)), n) for n, m in ((1, 2), (2, 1), (1, 1))]
    problem = problem_of(nets, images(), anchor)
    found = couplings_of(method, problem)
    for name, present in problem.present.items():
        for k, here in enumerate(present):
            sums = {*found[name, k].sum(0), *found[name, k].sum(1)}
            assert sums == ({1.0} if here else {0.0})


# --- no data where none count ---------------------------------------------------------------------


@pytest.mark.parametrize("coupling", [WeightTransport(), WeightMatching(), MergeMany()])
def test_without_moments_and_norms_nothing_is_measured(coupling, monkeypatch):
    nets = [randomise(mlp(6, 8, 7, 3), s) for s in (1, 2)]
    data = torch.randn(16, 6)
    method = fxfuse.Method(coupling=coupling, refit=AsMixed())
    expected = fxfuse.fuse(nets, data, method=method)
    monkeypatch.setattr("fxfuse.coupling.measure.walk", None)
    again = fxfuse.fuse(nets, data + 1, method=method)
    assert not moved(expected, again)


def test_without_moments_norms_are_still_settled():
    net, x = build("residual")
    method = fxfuse.Method(coupling=WeightMatching(), refit=AsMixed())
    fused = fxfuse.fuse([net, fxfuse.permute(net, x, seed=1)], images(), method=method)
    assert gap(net, fused, images()) < FUNCTION
