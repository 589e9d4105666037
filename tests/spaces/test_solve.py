"""Spaces of ledgers that are written by hand, and of random ones with blocks."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.spaces._labels import Ledger
from fxfuse.spaces._moves import draw_orders, sources_along
from fxfuse.spaces._solve import parents, solve, spaces_of, tied


def rearranged(ledger, seed):
    """Return, for each label, the label whose content takes its place in a random permutation."""
    spaces = spaces_of(ledger)
    order = draw_orders(spaces, np.random.default_rng(seed))
    taken = np.arange(ledger.size)
    for place, labels in ledger.axes.items():
        source = sources_along(len(labels), spaces.places.get(place, []), order).numpy()
        taken[labels] = labels[source]
    return taken


rows = st.lists(
    st.tuples(st.integers(0, 3), st.sets(st.integers(0, 8), min_size=2, max_size=6)), max_size=6
)


pairs = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=3)


@given(rows, pairs, st.lists(st.integers(0, 8), max_size=1), st.integers(0, 99))
def test_what_travels_together_arrives_together(groups, ties, frozen, seed):
    ledger = HandWritten()
    blocks, units = ledger.parameter("blocks.weight", 4), ledger.parameter("units.weight", 9)
    for block, members in groups:
        ledger.group(blocks[block : block + 1], units[sorted(members)].view(1, -1))
    for a, b in ties:
        ledger.tie(units[a], units[b])
    ledger.freeze(units[frozen], "here", "because")
    unit, _, _ = solve(ledger)
    taken = rearranged(ledger, seed)
    sets = {}
    for block, members in groups:
        units_of_set = frozenset(unit[units[sorted(members)].numpy()].tolist())
        sets.setdefault(int(unit[blocks[block]]), set()).add(units_of_set)
    for label in units.tolist():
        assert unit[taken[label]] == unit[label] or label not in units[frozen].tolist()
        assert unit[taken[unit[label]]] == unit[taken[label]]
    for block, sets_of_block in sets.items():
        for units_of_set in sets_of_block:
            moved = frozenset(int(unit[taken[u]]) for u in units_of_set)
            assert moved in sets[int(unit[taken[block]])]


def grid(ledger, shape, order=None):
    """Two families of blocks and the units where they cross, row by row or in another order."""
    high, wide = shape
    rows, columns = ledger.parameter("rows.weight", high), ledger.parameter("columns.weight", wide)
    units = ledger.parameter("units.weight", high * wide)
    table = units[torch.tensor(order)] if order else units
    table = table.view(high, wide)
    ledger.group(rows, table)
    ledger.group(columns, table.T)
    return rows, columns, table


def test_the_larger_family_of_the_rows_and_columns_moves():
    for shape, name in (((2, 4), "columns"), ((5, 3), "rows")):
        ledger = HandWritten()
        grid(ledger, shape)
        (space,) = spaces_of(ledger)
        index = {axis.tensor: axis.index for axis in space.axes}
        assert space.name == name and space.size == max(shape)
        assert index["units.weight"].shape == (max(shape), min(shape))


def test_rows_move_if_columns_are_fixed():
    ledger = HandWritten()
    _, columns, _ = grid(ledger, (2, 4))
    ledger.freeze(columns, "here", "because")
    (space,) = spaces_of(ledger)
    assert (space.name, space.size) == ("rows", 2)


def test_a_table_with_a_hole_stays():
    ledger = HandWritten()
    rows, columns = ledger.parameter("rows.weight", 2), ledger.parameter("columns.weight", 3)
    units = ledger.parameter("units.weight", 5)
    ledger.group(rows[:1], units[:3].view(1, 3))
    ledger.group(rows[1:], units[3:].view(1, 2))
    ledger.group(columns[:2], torch.stack([units[:2], units[3:]], 1))
    ledger.group(columns[2:], units[2:3].view(1, 1))
    assert spaces_of(ledger).free_units == 0


def test_columns_move_only_if_all_of_them_have_the_rows_in_one_order():
    ledger = HandWritten()
    grid(ledger, (2, 3), order=[0, 1, 2, 3, 5, 4])  # each row keeps its place in every column
    assert [s.size for s in spaces_of(ledger)] == [3]
    ledger = HandWritten()
    grid(ledger, (2, 3), order=[0, 3, 4, 1, 2, 5])  # the second column is upside down
    assert [(s.name, s.size) for s in spaces_of(ledger)] == [("rows", 2)]
    ledger = HandWritten()
    grid(ledger, (2, 3), order=[3, 1, 2, 0, 4, 5])  # and here each row is in another order too
    assert spaces_of(ledger).free_units == 0


def test_blocks_within_a_block_are_its_units():
    ledger = HandWritten()
    outer, inner = ledger.parameter("outer.weight", 2), ledger.parameter("inner.weight", 4)
    units = ledger.parameter("units.weight", 8)
    ledger.group(outer, units.view(2, 4))
    ledger.group(inner, units.view(4, 2))
    spaces = spaces_of(ledger)
    assert [(s.name, s.size, s.parent) for s in spaces] == [
        ("outer", 2, None),
        ("inner", 4, "outer"),
        ("units", 8, "inner"),
    ]


def test_blocks_that_contain_each_other_stay():
    ledger = HandWritten()
    one, two = ledger.parameter("one.weight", 1), ledger.parameter("two.weight", 1)
    a, b = ledger.parameter("a.weight", 4), ledger.parameter("b.weight", 4)
    ledger.group(one, a[:2].view(1, 2))
    ledger.group(two, a.view(1, 4))
    ledger.group(two, b[:2].view(1, 2))
    ledger.group(one, b.view(1, 4))
    assert all(s.parent is None for s in spaces_of(ledger))


def test_units_of_one_class_stay_in_their_set_and_the_block_stays():
    ledger = HandWritten()
    blocks, units = ledger.parameter("blocks.weight", 2), ledger.parameter("units.weight", 8)
    for half in units.view(2, 4):
        ledger.group(blocks, half.view(2, 2))
    _, sets, _ = solve(ledger)
    parent, crossed = parents(sets, np.zeros(ledger.size, dtype=int))
    assert set(crossed) == set(blocks.tolist())
    assert [len(set(parent[row])) for row in units.view(4, 2).numpy()] == [1] * 4
    assert len(set(parent[units.numpy()])) == 4


def test_places_without_a_unit_are_separate_blocks():
    ledger = HandWritten()
    units = ledger.parameter("units.weight", 6)
    ledger.group(torch.tensor([1, 1, 0]), units.view(3, 2))
    assert [(s.size, s.parent) for s in spaces_of(ledger)] == [(2, None)] * 3


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8))
def test_a_unit_goes_by_its_smallest_label(pairs):
    a, b = np.array(pairs, dtype=int).reshape(-1, 2).T
    unit = tied(np.arange(10), a, b)
    assert (unit[a] == unit[b]).all() and (unit <= np.arange(10)).all()
    assert (unit[unit] == unit).all()


class HandWritten(Ledger):
    """A ledger with parameters of one axis each."""

    def parameter(self, name, size, reads=False):
        labels = self.new(size)
        self.axes[name, 0] = labels.numpy()
        self.place(labels)
        if reads:
            self.reads.append(labels.numpy())
        return labels


def sizes(ledger):
    return {s.name: s.size for s in spaces_of(ledger)}


def test_untied_parameters_are_spaces_of_their_own():
    ledger = HandWritten()
    ledger.parameter("a.weight", 3)
    ledger.parameter("b.weight", 3)
    assert sizes(ledger) == {"a": 3, "b": 3}


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_ties_are_transitive(first, second):
    ledger = HandWritten()
    a, b, c = (ledger.parameter(f"{n}.weight", 4) for n in "abc")
    ledger.tie(a, b[torch.tensor(first)])
    ledger.tie(b, c[torch.tensor(second)])
    (space,) = spaces_of(ledger)
    index = {axis.tensor: axis.index.ravel() for axis in space.axes}
    assert np.array_equal(index["b.weight"], np.array(first)[index["a.weight"]])
    assert np.array_equal(index["c.weight"], np.array(second)[index["b.weight"]])


def test_units_in_other_places_are_other_spaces():
    ledger = HandWritten()
    a, b = ledger.parameter("a.weight", 5), ledger.parameter("b.weight", 2)
    ledger.tie(a[1:3], b)
    assert sorted(s.size for s in spaces_of(ledger)) == [2, 3]


def test_units_that_occur_more_often_are_other_spaces():
    ledger = HandWritten()
    a, b = ledger.parameter("a.weight", 4), ledger.parameter("b.weight", 6)
    ledger.tie(a[torch.tensor([0, 1, 2, 3, 2, 3])], b)
    spaces = spaces_of(ledger)
    assert sorted(s.size for s in spaces) == [2, 2]
    assert sorted(a.index.shape for s in spaces for a in s.axes if a.tensor == "b.weight") == [
        (2, 1),
        (2, 2),
    ]


def test_two_labels_that_become_one_unit_occur_twice():
    ledger = HandWritten()
    a = ledger.parameter("a.weight", 4)
    ledger.tie(a[:2], a[2:])
    (space,) = spaces_of(ledger)
    assert space.size == 2 and space.axes[0].index.tolist() == [[0, 2], [1, 3]]


def test_frozen_units_are_reported_with_node_and_reason_and_freeze_what_is_tied_to_them():
    ledger = HandWritten()
    a, b = ledger.parameter("a.weight", 4), ledger.parameter("b.weight", 4)
    ledger.tie(a, b)
    ledger.freeze(b[:1], "here", "because")
    spaces = spaces_of(ledger)
    assert [s.size for s in spaces] == [3]
    assert [(f.tensor, f.count, f.node, f.reason) for f in spaces.frozen] == [
        ("a.weight", 1, "here", "because"),
        ("b.weight", 1, "here", "because"),
    ]


def test_the_first_reason_for_freezing_counts():
    ledger = HandWritten()
    a = ledger.parameter("a.weight", 2)
    ledger.freeze(a, "first", "one")
    ledger.freeze(a, "second", "two")
    assert [(f.node, f.reason) for f in spaces_of(ledger).frozen] == [("first", "one")]


def test_blocks_become_a_space_and_their_members_another_inside_it():
    ledger = HandWritten()
    blocks, units = ledger.parameter("blocks.weight", 3), ledger.parameter("units.weight", 6)
    ledger.group(blocks, units.view(3, 2))
    spaces = spaces_of(ledger)
    assert [(s.name, s.size, s.parent) for s in spaces] == [
        ("blocks", 3, None),
        ("units", 6, "blocks"),
    ]
    assert spaces["units"].blocks.tolist() == [0, 0, 1, 1, 2, 2]
    assert spaces.free_units == 6


def test_blocks_with_the_same_members_are_the_same_blocks():
    ledger = HandWritten()
    units = ledger.parameter("units.weight", 6)
    one, two = ledger.parameter("one.weight", 3), ledger.parameter("two.weight", 3)
    ledger.group(one, units.view(3, 2))
    ledger.group(two, units.view(3, 2))
    spaces = spaces_of(ledger)
    assert [s.size for s in spaces] == [3, 6]
    assert {a.tensor for a in spaces.spaces[0].axes} == {"one.weight", "two.weight"}


def test_blocks_with_different_members_are_not_exchangeable():
    ledger = HandWritten()
    blocks, units = ledger.parameter("blocks.weight", 3), ledger.parameter("units.weight", 7)
    ledger.group(blocks[:2], units[:4].view(2, 2))
    ledger.group(blocks[2:], units[4:].view(1, 3))
    sizes = {(s.size, s.parent is None) for s in spaces_of(ledger)}
    assert (2, True) in sizes and (4, False) in sizes and (3, True) not in sizes


def test_blocks_that_cross_stay_and_units_move_inside_their_intersections():
    ledger = HandWritten()
    rows, columns = ledger.parameter("rows.weight", 2), ledger.parameter("columns.weight", 2)
    units = ledger.parameter("units.weight", 8).view(2, 2, 2)
    ledger.group(rows, units.reshape(2, 4))
    ledger.group(columns, units.transpose(0, 1).reshape(2, 4))
    spaces = spaces_of(ledger)
    assert {a.tensor for s in spaces for a in s.axes} == {"units.weight"}
    blocks = [
        np.sort(s.axes[0].index.ravel()[s.blocks == b]) for s in spaces for b in set(s.blocks)
    ]
    assert sorted(b.tolist() for b in blocks) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_block_with_a_fixed_member_stays():
    ledger = HandWritten()
    blocks, units = ledger.parameter("blocks.weight", 3), ledger.parameter("units.weight", 6)
    ledger.group(blocks, units.view(3, 2))
    ledger.freeze(units[:1], "here", "because")
    spaces = spaces_of(ledger)
    places = [
        a.index.ravel().tolist() for s in spaces for a in s.axes if a.tensor == "blocks.weight"
    ]
    assert places == [[1, 2]]


def test_an_axis_of_one_position_has_no_symmetry():
    ledger = HandWritten()
    ledger.parameter("a.weight", 1)
    spaces = spaces_of(ledger)
    assert len(spaces) == 0 and not spaces.frozen


def test_a_space_is_named_after_its_first_writer():
    ledger = HandWritten()
    a, b = ledger.parameter("a.weight", 3, reads=True), ledger.parameter("b.weight", 3)
    ledger.tie(a, b)
    c = ledger.parameter("b.bias", 2)
    assert c is not None
    assert sizes(ledger) == {"b": 3, "b#2": 2}


def test_an_empty_ledger_has_no_spaces():
    assert len(spaces_of(Ledger())) == 0
