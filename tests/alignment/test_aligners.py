"""Aligners against brute force: every map, every cut, every constraint."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.alignment.aligners import (
    Aligner,
    Monotone,
    Nearest,
    Random,
    count_maps,
    head_tail,
    layer_wise,
    monotone,
    same_index,
    segment_wise,
    uniform,
)
from fxfuse.errors import ArgumentError, PairingError

FLAGS = [(True, True), (True, False), (False, True), (False, False)]
INF = float("inf")
EVERY = [monotone, segment_wise, layer_wise, same_index, uniform, head_tail, Random()]


def maps(m, n, first=False, last=False):
    """Every strictly increasing map of n columns into m rows that the constraints allow."""
    for rows in combinations(range(m), n):
        if first and rows[0] != 0 or last and n > 1 and rows[-1] != m - 1:
            continue
        yield list(rows)


def total(costs, rows):
    return sum(costs[row, column] for column, row in enumerate(rows))


@st.composite
def matrices(draw, infinite=False, most=7):
    """Cost matrices of small whole numbers, which add without rounding and tie often."""
    n = draw(st.integers(1, most))
    m = draw(st.integers(n, most))
    entry = st.sampled_from([0.0, 1.0, 2.0, 3.0, *([INF] * infinite)])
    return np.array(draw(st.lists(st.lists(entry, min_size=n, max_size=n), min_size=m, max_size=m)))


# --- least total cost -----------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "last"), FLAGS)
@given(matrices())
def test_the_map_is_the_cheapest_and_of_equal_ones_that_of_smallest_rows(first, last, costs):
    cheapest = min(maps(*costs.shape, first, last), key=lambda rows: (total(costs, rows), rows))
    assert Monotone(first, last)(costs) == cheapest


@pytest.mark.parametrize(("first", "last"), FLAGS)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 5))
def test_the_map_is_the_cheapest_of_random_costs(first, last, seed, n, more):
    costs = np.random.default_rng(seed).random((n + more, n))
    rows = Monotone(first, last)(costs)
    assert rows in list(maps(n + more, n, first, last))
    cheapest = min(total(costs, r) for r in maps(n + more, n, first, last))
    assert total(costs, rows) <= cheapest + 1e-12


@pytest.mark.parametrize(("first", "last"), FLAGS)
@given(matrices(infinite=True))
def test_impossible_pairs_are_avoided_or_the_segment_is_refused(first, last, costs):
    sizes, ways = costs.shape, [(first, last), (first, False), (False, last), (False, False)]
    leasts = (min(total(costs, rows) for rows in maps(*sizes, *way)) for way in ways)
    least = next((x for x in leasts if x < INF), INF)  # a constraint that cannot be met is dropped
    if least == INF:
        with pytest.raises(PairingError, match="out of order"):
            Monotone(first, last)(costs)
    else:
        assert total(costs, Monotone(first, last)(costs)) == least


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
    assert Monotone(first, last)(np.ones((5, 3))) == rows


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


def test_the_papers_example_of_four_and_three_layers():
    """Figure 2: hidden layers of 5, 4, 3, 1 and of 3, 2, 1 units, squared differences."""
    costs = np.subtract.outer([5.0, 4, 3, 1], [3, 2, 1]) ** 2
    assert monotone(costs) == [0, 2, 3]


@pytest.mark.parametrize(("flags", "rows"), [*zip(FLAGS, ([0, 3], [0, 2], [1, 3], [1, 2]))])
def test_each_constraint_changes_the_map(flags, rows):
    costs = np.array([[9.0, 9.0], [0.0, 9.0], [9.0, 0.0], [9.0, 9.0]])
    assert Monotone(*flags)(costs) == rows


@pytest.mark.parametrize(("first", "last"), FLAGS)
def test_a_single_layer_takes_the_first_where_the_first_is_asked_for(first, last):
    costs = np.array([[3.0], [0.0], [1.0]])
    assert Monotone(first, last)(costs) == ([0] if first else [1])


@given(matrices())
def test_segment_wise_binds_the_first_layers_only(costs):
    cheapest = min(maps(*costs.shape, first=True), key=lambda rows: (total(costs, rows), rows))
    assert segment_wise(costs) == cheapest


# --- every row to the column of its run -----------------------------------------------------------


def cuts(costs):
    """Every cut into runs, the first of them one row, as `(cost, row of each column)`."""
    m, n = costs.shape
    possible = np.isfinite(costs)
    spent = np.where(possible, costs, costs[possible].max(initial=0.0))
    for ends in combinations(range(1, m), n - 1) if n > 1 else [()]:
        if n > 1 and ends[0] != 1 or not possible[0, 0]:
            continue
        run = np.searchsorted(ends, np.arange(m), side="right") if n > 1 else np.zeros(1, int)
        runs = [np.flatnonzero(run == k) for k in range(n)]
        partners = [[row for row in rows if possible[row, k]] for k, rows in enumerate(runs)]
        if all(partners):
            cost = sum(spent[row, k] for row, k in enumerate(run))
            yield cost, [rows[-1] for rows in partners]


@given(matrices())
def test_layer_wise_is_the_cheapest_cut_and_of_equal_ones_that_of_smallest_rows(costs):
    assert layer_wise(costs) == min(cuts(costs))[1]


@given(matrices(infinite=True))
def test_layer_wise_gives_every_column_a_row_of_its_kind(costs):
    valid = list(cuts(costs))
    if not valid:
        with pytest.raises(PairingError, match="out of order"):
            layer_wise(costs)
    else:
        least = min(valid)[0]
        assert layer_wise(costs) in [rows for cost, rows in valid if cost == least]


def test_layer_wise_counts_the_layers_that_pair_with_none():
    costs = np.array([[0.0, 9, 9], [9, 2, 9], [9, 1, 9], [9, 5, 0], [9, 9, 0]])
    assert monotone(costs) == layer_wise(costs) == [0, 2, 4]
    costs[2] = [9, 1, 0]
    assert monotone(costs) == [0, 2, 4] and layer_wise(costs) == [0, 1, 4]


# --- baselines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aligner", "m", "n", "rows"),
    [
        (same_index, 5, 3, [0, 1, 2]),
        (uniform, 5, 3, [0, 2, 4]),
        (uniform, 7, 5, [0, 1, 2, 3, 4]),
        (uniform, 8, 5, [0, 2, 4, 6, 7]),
        (head_tail, 7, 4, [0, 1, 5, 6]),
        (head_tail, 7, 3, [0, 1, 6]),
        (head_tail, 4, 1, [0]),
        (Nearest(lambda m, n: [0] * n), 4, 2, [0, 1]),
    ],
)
def test_baselines_take_the_rows_they_want(aligner, m, n, rows):
    costs = np.random.default_rng(0).random((m, n))
    assert aligner(costs) == aligner(costs[::-1]) == rows


@pytest.mark.parametrize("aligner", [same_index, uniform, head_tail])
@given(matrices(infinite=True))
def test_baselines_that_would_pair_different_kinds_take_the_nearest_map(aligner, costs):
    wanted = np.array(aligner.wanted(*costs.shape))
    valid = [rows for rows in maps(*costs.shape) if total(costs, rows) < INF]
    if not valid:
        with pytest.raises(PairingError, match="out of order"):
            aligner(costs)
    else:
        assert aligner(costs) == min(valid, key=lambda r: (((r - wanted) ** 2).sum(), r))


@pytest.mark.parametrize(("first", "last"), FLAGS)
@given(matrices(infinite=True), st.integers(0, 3))
def test_random_maps_are_possible(first, last, costs, seed):
    valid = [r for r in maps(*costs.shape, first, last) if total(costs, r) < INF]
    draw = Random(seed, first, last)
    if not valid:
        with pytest.raises(PairingError, match="out of order"):
            draw(costs)
    else:
        assert draw(costs) == draw(costs) and draw(costs) in valid


def test_random_maps_are_drawn_with_the_same_probability():
    costs = np.ones((6, 3))
    costs[2, 1] = INF
    valid = [tuple(r) for r in maps(6, 3) if total(costs, r) < INF]
    draws = Counter(tuple(Random(seed, first=False)(costs)) for seed in range(1700))
    assert set(draws) == set(valid) and len(valid) == 14
    expected = 1700 / len(valid)
    chi_squared = sum((n - expected) ** 2 / expected for n in draws.values())
    assert chi_squared < 34.5  # exceeded with a chance of 0.001


def test_random_maps_of_deep_networks_can_be_drawn():
    rows = Random()(np.ones((120, 60)))
    assert rows == sorted(set(rows)) and len(rows) == 60 and rows[0] == 0


# --- what all have in common ----------------------------------------------------------------------


@pytest.mark.parametrize("aligner", EVERY)
def test_more_columns_than_rows_are_refused(aligner):
    with pytest.raises(ArgumentError, match=r"\(2, 3\)"):
        aligner(np.ones((2, 3)))


@pytest.mark.parametrize("aligner", EVERY)
def test_aligners_do_not_change_the_costs(aligner):
    costs = PAPER.copy()
    aligner(costs)
    assert np.array_equal(costs, PAPER)


@pytest.mark.parametrize("aligner", EVERY)
@given(st.integers(1, 7))
def test_as_many_rows_as_columns_leave_one_map(aligner, n):
    assert list(aligner(np.random.default_rng(n).random((n, n)))) == list(range(n))


@pytest.mark.parametrize(("first", "last"), FLAGS)
@given(matrices(infinite=True))
def test_the_maps_that_are_left_are_counted(first, last, costs):
    possible = np.isfinite(costs)
    valid = [r for r in maps(*costs.shape, first, last) if total(costs, r) < INF]
    assert count_maps(possible, first, last) == len(valid)
    if valid:
        assert Monotone(first, last).needs_costs(possible) == (len(valid) > 1)


def test_counts_of_deep_networks_do_not_overflow():
    assert count_maps(np.ones((100, 50), bool)) == 100891344545564193334812497256


def test_costs_are_needed_where_an_aligner_has_a_choice_that_depends_on_them():
    possible = np.ones((3, 2), bool)
    assert not monotone.needs_costs(possible) and segment_wise.needs_costs(possible)
    assert layer_wise.needs_costs(possible) and Aligner().needs_costs(possible)
    assert not any(a.needs_costs(possible) for a in (same_index, uniform, head_tail, Random()))
    assert not layer_wise.needs_costs(np.ones((2, 2), bool))
