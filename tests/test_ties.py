"""Spaces of ledgers written by hand: what ties, freezes, places and blocks mean together."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.labels import Ledger, TensorAxis
from fxfuse.ties import spaces_of


class Book(Ledger):
    """A ledger with parameters of one axis each."""

    def parameter(self, name, size, reads=False):
        labels = self.new(size)
        self.axes.append(TensorAxis(name, 0, labels.numpy()))
        self.place(labels)
        if reads:
            self.reads.append(labels.numpy())
        return labels


def sizes(book):
    return {s.name: s.size for s in spaces_of(book)}


def test_untied_parameters_are_spaces_of_their_own():
    book = Book()
    book.parameter("a.weight", 3)
    book.parameter("b.weight", 3)
    assert sizes(book) == {"a": 3, "b": 3}


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_ties_are_transitive_and_keep_who_is_who(first, second):
    book = Book()
    a, b, c = (book.parameter(f"{n}.weight", 4) for n in "abc")
    book.tie(a, b[torch.tensor(first)])
    book.tie(b, c[torch.tensor(second)])
    (space,) = spaces_of(book)
    index = {axis.tensor: axis.index.ravel() for axis in space.axes}
    assert np.array_equal(index["b.weight"], np.array(first)[index["a.weight"]])
    assert np.array_equal(index["c.weight"], np.array(second)[index["b.weight"]])


def test_units_in_other_places_are_other_spaces():
    book = Book()
    a, b = book.parameter("a.weight", 5), book.parameter("b.weight", 2)
    book.tie(a[1:3], b)
    assert sorted(s.size for s in spaces_of(book)) == [2, 3]


def test_units_that_occur_more_often_are_other_spaces():
    book = Book()
    a, b = book.parameter("a.weight", 4), book.parameter("b.weight", 6)
    book.tie(a[torch.tensor([0, 1, 2, 3, 2, 3])], b)
    spaces = spaces_of(book)
    assert sorted(s.size for s in spaces) == [2, 2]
    assert sorted(a.index.shape for s in spaces for a in s.axes if a.tensor == "b.weight") == [
        (2, 1),
        (2, 2),
    ]


def test_two_labels_that_become_one_unit_occur_twice():
    book = Book()
    a = book.parameter("a.weight", 4)
    book.tie(a[:2], a[2:])
    (space,) = spaces_of(book)
    assert space.size == 2 and space.axes[0].index.tolist() == [[0, 2], [1, 3]]


def test_frozen_units_are_reported_with_node_and_reason_and_freeze_what_is_tied_to_them():
    book = Book()
    a, b = book.parameter("a.weight", 4), book.parameter("b.weight", 4)
    book.tie(a, b)
    book.freeze(b[:1], "here", "because")
    spaces = spaces_of(book)
    assert [s.size for s in spaces] == [3]
    assert [(f.tensor, f.count, f.node, f.reason) for f in spaces.frozen] == [
        ("a.weight", 1, "here", "because"),
        ("b.weight", 1, "here", "because"),
    ]


def test_the_first_reason_for_freezing_counts():
    book = Book()
    a = book.parameter("a.weight", 2)
    book.freeze(a, "first", "one")
    book.freeze(a, "second", "two")
    assert [(f.node, f.reason) for f in spaces_of(book).frozen] == [("first", "one")]


def test_blocks_become_a_space_and_their_members_another_inside_it():
    book = Book()
    blocks, units = book.parameter("blocks.weight", 3), book.parameter("units.weight", 6)
    book.group(blocks, units.view(3, 2))
    spaces = spaces_of(book)
    assert [(s.name, s.size, s.parent) for s in spaces] == [
        ("blocks", 3, None),
        ("units", 6, "blocks"),
    ]
    assert spaces["units"].blocks.tolist() == [0, 0, 1, 1, 2, 2]
    assert spaces.free_units == 6


def test_blocks_with_the_same_members_are_the_same_blocks():
    book = Book()
    units = book.parameter("units.weight", 6)
    one, two = book.parameter("one.weight", 3), book.parameter("two.weight", 3)
    book.group(one, units.view(3, 2))
    book.group(two, units.view(3, 2))
    spaces = spaces_of(book)
    assert [s.size for s in spaces] == [3, 6]
    assert {a.tensor for a in spaces.spaces[0].axes} == {"one.weight", "two.weight"}


def test_blocks_of_different_make_are_not_exchangeable():
    book = Book()
    blocks, units = book.parameter("blocks.weight", 3), book.parameter("units.weight", 7)
    book.group(blocks[:2], units[:4].view(2, 2))
    book.group(blocks[2:], units[4:].view(1, 3))
    found = sorted((s.size, s.parent is None) for s in spaces_of(book))
    assert (2, True) in found and (4, False) in found and (3, True) not in found


def test_blocks_that_cross_stay_and_units_move_inside_their_intersections():
    book = Book()
    rows, columns = book.parameter("rows.weight", 2), book.parameter("columns.weight", 2)
    units = book.parameter("units.weight", 8).view(2, 2, 2)
    book.group(rows, units.reshape(2, 4))
    book.group(columns, units.transpose(0, 1).reshape(2, 4))
    spaces = spaces_of(book)
    assert {a.tensor for s in spaces for a in s.axes} == {"units.weight"}
    blocks = [
        np.sort(s.axes[0].index.ravel()[s.blocks == b]) for s in spaces for b in set(s.blocks)
    ]
    assert sorted(b.tolist() for b in blocks) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_block_with_a_fixed_member_stays():
    book = Book()
    blocks, units = book.parameter("blocks.weight", 3), book.parameter("units.weight", 6)
    book.group(blocks, units.view(3, 2))
    book.freeze(units[:1], "here", "because")
    spaces = spaces_of(book)
    places = [
        a.index.ravel().tolist() for s in spaces for a in s.axes if a.tensor == "blocks.weight"
    ]
    assert places == [[1, 2]]


def test_an_axis_of_one_position_has_no_symmetry():
    book = Book()
    book.parameter("a.weight", 1)
    spaces = spaces_of(book)
    assert len(spaces) == 0 and not spaces.frozen


def test_names_are_those_of_the_first_writer_and_unique():
    book = Book()
    a, b = book.parameter("a.weight", 3, reads=True), book.parameter("b.weight", 3)
    book.tie(a, b)
    c = book.parameter("b.bias", 2)
    assert c is not None
    assert sizes(book) == {"b": 3, "b#2": 2}


def test_an_empty_ledger_has_no_spaces():
    assert len(spaces_of(Ledger())) == 0
