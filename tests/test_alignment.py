from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import Pooled, Residual, Tokens, conv, mlp, randomise, residual, stages
from torch import nn

from fxfuse.alignment import align_networks, choices, monotone, pair_segments
from fxfuse.costs import LinearCKA, gram
from fxfuse.data import Calibration
from fxfuse.errors import ArgumentError, DataError, PairingError
from fxfuse.network import Network
from fxfuse.segments import partition
from fxfuse.statistics import record
from fxfuse.tracing import trace

FLAGS = [(True, True), (True, False), (False, True), (False, False)]
INF = float("inf")


def maps(m, n, first, last):
    """Every strictly increasing map of n columns into m rows that the constraints allow."""
    for rows in combinations(range(m), n):
        if first and rows[0] != 0 or last and n > 1 and rows[-1] != m - 1:
            continue
        yield list(rows)


def total(costs, rows):
    return sum(costs[row, column] for column, row in enumerate(rows))


@st.composite
def matrices(draw, infinite=False):
    """Cost matrices of small whole numbers, which add without rounding and tie often."""
    n = draw(st.integers(1, 6))
    m = draw(st.integers(n, 6))
    entry = st.sampled_from([0.0, 1.0, 2.0, 3.0, *([INF] * infinite)])
    return np.array(draw(st.lists(st.lists(entry, min_size=n, max_size=n), min_size=m, max_size=m)))


@pytest.mark.parametrize(("first", "last"), FLAGS)
@given(matrices())
def test_the_map_is_the_cheapest_and_of_those_the_smallest(first, last, costs):
    best = min(maps(*costs.shape, first, last), key=lambda rows: (total(costs, rows), rows))
    assert monotone(costs, first, last) == best


@pytest.mark.parametrize(("first", "last"), FLAGS)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 5))
def test_the_map_is_the_cheapest_of_random_costs(first, last, seed, n, more):
    costs = np.random.default_rng(seed).random((n + more, n))
    rows = monotone(costs, first, last)
    assert rows in list(maps(n + more, n, first, last))
    cheapest = min(total(costs, r) for r in maps(n + more, n, first, last))
    assert total(costs, rows) <= cheapest + 1e-12


@pytest.mark.parametrize(("first", "last"), FLAGS)
@given(matrices(infinite=True))
def test_impossible_pairs_are_avoided_or_the_segment_is_refused(first, last, costs):
    best = min(total(costs, rows) for rows in maps(*costs.shape, first, last))
    if best == INF:
        with pytest.raises(PairingError, match="out of order"):
            monotone(costs, first, last)
    else:
        assert total(costs, monotone(costs, first, last)) == best


@pytest.mark.parametrize(("first", "last"), FLAGS)
@given(matrices(infinite=True))
def test_choices_count_the_maps_that_are_left(first, last, costs):
    possible = np.isfinite(costs)
    left = [r for r in maps(*costs.shape, first, last) if total(costs, r) < INF]
    assert choices(possible, first, last) == len(left)


def test_choices_of_deep_networks_do_not_overflow():
    assert (
        choices(np.ones((100, 50), bool), first=False, last=False) == 100891344545564193334812497256
    )


@pytest.mark.parametrize(
    ("first", "last", "rows"),
    [
        (True, True, [0, 1, 4]),
        (True, False, [0, 1, 2]),
        (False, True, [0, 1, 4]),
        (False, False, [0, 1, 2]),
    ],
)
def test_ties_go_to_the_smallest_index(first, last, rows):
    assert monotone(np.ones((5, 3)), first, last) == rows


PAPER = np.array(
    [
        [0.32, 0.03, 0.70],
        [0.11, 0.05, 0.66],
        [0.97, 0.06, 0.76],
        [0.23, 0.86, 0.01],
        [0.19, 0.98, 0.58],
    ]
)


def test_the_first_constraint_holds_while_the_table_is_filled():
    """The algorithm printed in the paper gives [0, 2, 4] here, which costs 0.01 more."""
    assert monotone(PAPER) == [0, 1, 4]
    assert total(PAPER, [0, 1, 4]) < total(PAPER, [0, 2, 4])


@pytest.mark.parametrize(("flags", "rows"), zip(FLAGS, ([0, 3], [0, 2], [1, 3], [1, 2])))
def test_each_constraint_changes_the_map(flags, rows):
    costs = np.array([[9.0, 9.0], [0.0, 9.0], [9.0, 0.0], [9.0, 9.0]])
    assert monotone(costs, *flags) == rows


@pytest.mark.parametrize(("first", "last"), FLAGS)
def test_a_single_layer_takes_the_first_where_the_first_is_asked_for(first, last):
    costs = np.array([[3.0], [0.0], [1.0]])
    assert monotone(costs, first, last) == ([0] if first else [1])


def test_more_columns_than_rows_are_refused():
    with pytest.raises(ArgumentError, match=r"\(2, 3\)"):
        monotone(np.ones((2, 3)))


def test_the_costs_are_left_as_they_were():
    costs = PAPER.copy()
    monotone(costs)
    assert np.array_equal(costs, PAPER)


# --- networks -------------------------------------------------------------------------------------

VECTORS, IMAGES = torch.randn(40, 6), torch.randn(24, 3, 8, 8)


def networks(*nets, data=VECTORS):
    found = [randomise(net, seed) for seed, net in enumerate(nets)]
    return [Network.of(f"net {i}", trace(n), (data[:2],)) for i, n in enumerate(found)]


def aligned(*nets, data=VECTORS, **options):
    return align_networks(networks(*nets, data=data), Calibration(data), **options)


def with_identities(shallow, behind):
    """A network with identity layers put behind some hidden layers; and where the others went."""
    parts, planted, layers = [], [], 0
    for i, layer in enumerate(shallow):
        parts.append(layer)
        if isinstance(layer, nn.Linear):
            planted.append(layers)
            layers += 1
        elif i // 2 in behind:
            identity = nn.Linear(8, 8)
            nn.init.eye_(identity.weight)
            nn.init.zeros_(identity.bias)
            parts += [identity, nn.ReLU()]
            layers += 1
    return nn.Sequential(*parts), planted[:-1]


@given(st.sets(st.integers(0, 3), max_size=4), st.integers(0, 50))
def test_a_planted_alignment_is_found(behind, seed):
    shallow = randomise(mlp(6, *[8] * 5, 3), seed)
    deep, planted = with_identities(shallow, behind)
    nets = [Network.of(n, trace(m), (VECTORS[:2],)) for n, m in (("a", deep), ("b", shallow))]
    alignment = align_networks(nets, Calibration(VECTORS))
    hidden = alignment.segments[0]
    found = [hidden.slots[0].index(a) for a, _ in alignment.pairs[0]]
    assert found == planted
    costs = [hidden.cost_of(1, row) for row in planted]
    assert costs == pytest.approx([0.0] * len(costs), abs=1e-5)


def test_costs_are_one_minus_cka_of_pre_activations():
    a, b = networks(mlp(6, 8, 8, 7, 3), mlp(6, 5, 9, 3))
    alignment = align_networks([a, b], Calibration(VECTORS))
    meter = LinearCKA(3, 2)
    grams = [
        record(n, (VECTORS,), points, gram)
        for n, points in ((a, ["_0", "_2", "_4"]), (b, ["_0", "_2"]))
    ]
    meter.add([grams[0][p] for p in ("_0", "_2", "_4")], [grams[1][p] for p in ("_0", "_2")])
    assert np.allclose(alignment.segments[0].costs[1], meter.costs(), rtol=1e-4)
    assert alignment.segments[0].costs[0] is None, "the reference is not measured against itself"


def test_slots_hold_every_layer_once_and_gaps_where_there_is_none():
    alignment = aligned(mlp(6, 8, 8, 8, 8, 3), mlp(6, 5, 5, 3))
    hidden, last = alignment.segments
    assert hidden.reference == 0 and hidden.slots[0] == ("0", "2", "4", "6")
    assert hidden.slots[1][0] == "0" and hidden.slots[1][3] == "2"
    assert hidden.slots[1][1:3] == (None, None)
    assert last.slots == (("8",), ("4",))
    assert alignment.names == ("net 0", "net 1")


def test_each_segment_follows_the_network_that_is_deeper_there():
    alignment = aligned(stages([4, 4, 4], [5]), stages([4], [5, 5]), data=IMAGES)
    assert [s.reference for s in alignment.segments] == [0, 1, 0]
    assert alignment.pairs == [
        [("0.0.0", "0.0.0")],
        [("0.2.0", "0.4.0")],
        [("2.0", "2.0")],
    ]


def test_a_segment_of_one_layer_pairs_it_with_the_first():
    alignment = aligned(mlp(6, 8, 8, 8, 3), mlp(6, 5, 3))
    assert alignment.pairs[0] == [("0", "0")]


def test_three_networks_fall_into_one_set_of_slots():
    alignment = aligned(mlp(6, 5, 5, 3), mlp(6, 8, 8, 8, 8, 3), mlp(6, 7, 3))
    hidden = alignment.segments[0]
    assert hidden.reference == 1
    assert [sum(s is not None for s in row) for row in hidden.slots] == [2, 4, 1]
    assert [row[0] for row in hidden.slots] == ["0", "0", "0"]


def test_one_network_is_aligned_with_itself():
    (net,) = networks(mlp(6, 5, 5, 3))
    assert align_networks([net], Calibration(VECTORS)).segments[0].slots == (("0", "2"),)


def test_equal_depths_pair_layer_by_layer():
    alignment = aligned(mlp(6, 8, 8, 8, 3), mlp(6, 5, 7, 9, 3))
    assert alignment.pairs == [[("0", "0"), ("2", "2"), ("4", "4")], [("6", "6")]]


def test_blocks_of_different_kinds_never_pair():
    alignment = aligned(Tokens(depth=3), Tokens(depth=2), data=IMAGES)
    blocks = alignment.segments[1]
    for a, b in zip(*blocks.slots):
        assert b is None or a.rpartition(".")[2] == b.rpartition(".")[2]
    costs = np.array(blocks.costs[1])
    assert np.isinf(costs[0, 1]) and np.isfinite(costs[0, 0])


def test_where_the_constraints_decide_costs_are_measured_only_if_asked_for():
    nets = networks(mlp(6, 8, 8, 8, 3), mlp(6, 5, 5, 3))
    quick = align_networks(nets, Calibration(VECTORS), measure_forced=False)
    full = align_networks(nets, Calibration(VECTORS))
    assert quick.pairs == full.pairs
    assert quick.segments[0].costs == (None, None)
    assert full.segments[0].costs[1] is not None


def test_the_aligner_decides():
    nets = networks(mlp(6, 8, 8, 8, 8, 3), mlp(6, 5, 5, 3))
    chain = align_networks(nets, Calibration(VECTORS), lambda costs: list(range(costs.shape[1])))
    assert chain.pairs[0] == [("0", "0"), ("2", "2")]
    assert align_networks(nets, Calibration(VECTORS)).pairs[0] == [("0", "0"), ("6", "2")]


def test_data_decide():
    nets = networks(mlp(6, *[8] * 8, 3), mlp(6, *[5] * 4, 3))
    found = {str(align_networks(nets, Calibration(VECTORS[i : i + 10]))) for i in range(0, 40, 10)}
    assert len(found) == 4


def test_activations_that_are_not_finite_name_layer_and_network():
    a, b = networks(mlp(6, 8, 8, 8, 3), mlp(6, 5, 5, 3))
    with torch.no_grad():
        b.module.get_submodule("2").weight.mul_(1e38)
    with pytest.raises(DataError, match="NaN or infinite") as caught:
        align_networks([a, b], Calibration(VECTORS))
    assert caught.value.where == "layer '2' of net 1"


# --- pairing --------------------------------------------------------------------------------------


def paired(*nets, data=IMAGES):
    found = networks(*nets, data=data)
    return pair_segments(found, [partition(n) for n in found])


def test_a_stem_and_a_stage_pair_as_segments_of_their_own():
    names = [
        [[x.name for x in s.layers] for s in one]
        for one in paired(residual((6, 3)), residual((6, 1)))
    ]
    assert names == [
        [["0.0"], ["0.0"]],
        [["1.0", "1.1", "1.2"], ["1.0"]],
        [["2.fc"], ["2.fc"]],
    ]


def test_runs_that_differ_stay_one_segment():
    a = nn.Sequential(conv(3, 6), Residual(6, 6), conv(6, 6), Pooled(6, 3))
    b = nn.Sequential(conv(3, 6), Residual(6, 6), Pooled(6, 3))
    assert [len(one[0].layers) for one in paired(a, b)] == [3, 1]


@pytest.mark.parametrize(
    ("a", "b", "segment"),
    [
        (lambda: stages([4], [4]), lambda: stages([4], [4], [4]), 3),
        (lambda: residual((4, 2)), lambda: stages([4, 4], [4]), 2),
        (lambda: residual((4, 1), (4, 1)), lambda: residual((4, 1)), 2),
        (lambda: stages([4], hidden=(7,)), lambda: stages([4]), 2),
        (lambda: stages([4], norm=True), lambda: stages([4], norm=False), 1),
    ],
)
def test_networks_that_do_not_pair_are_shown_side_by_side_from_the_first_difference(a, b, segment):
    with pytest.raises(PairingError) as caught:
        paired(a(), b())
    error = caught.value
    assert error.where == f"segment {segment}, the first that differs"
    lines = error.met.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("  segments of net")]
    assert len(heads) == 2
    first = [line for line in lines[heads[0] + 1 : heads[1]] if "made of" not in line]
    assert first[0].lstrip("> ").startswith("8x8 positions: ")
    assert [i + 1 for i, line in enumerate(first) if ">>" in line] == [segment] * (
        len(first) >= segment
    )


def test_a_perceptron_does_not_pair_with_a_convolutional_network():
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(192, 8, 3)

        def forward(self, x):
            return self.net(x.flatten(1))

    with pytest.raises(PairingError, match="made of linear, relu"):
        paired(Reshaped(), stages([4]))


def test_layers_that_can_only_pair_out_of_order_are_refused():
    a = nn.Sequential(conv(3, 4), conv(4, 4, 5), conv(4, 4), Pooled(4, 3))
    b = nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 4, 5), Pooled(4, 3))
    with pytest.raises(PairingError, match="segments do not pair") as caught:
        aligned(a, b, data=IMAGES)
    assert caught.value.met.count(">>") == 2, "both lists, each with the segment that differs"


def test_plain_layers_do_not_pair_with_blocks():
    with pytest.raises(PairingError):
        aligned(residual((4, 2), stem=4), stages([4, 4, 4]), data=IMAGES)
