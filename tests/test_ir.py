"""What the stages hand on: it prints, compares, copies, and cannot be changed."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from scipy.sparse import csr_array

from fxfuse.ir import (
    Alignment,
    Axis,
    Coupling,
    Frozen,
    Layer,
    Segment,
    SegmentAlignment,
    Space,
    Spaces,
)


def axis(tensor="a.weight", units=4, times=1, **kwargs):
    return Axis(tensor, 0, np.arange(units * times).reshape(units, times), **kwargs)


def space(name, size, parent=None, blocks=None, **kwargs):
    return Space(name, size, (axis(units=size, **kwargs),), (), parent, blocks)


ALIGNMENT = Alignment(
    (
        SegmentAlignment("features", 0, (("a", "b"), ("p", None)), (None, ((0.25,), (0.5,)))),
        SegmentAlignment("4x4 positions", 1, (("c", None), ("q", "r")), (None, None)),
    ),
    ("deep", "other"),
)


def test_pairs_have_the_deeper_network_first_in_each_segment():
    assert ALIGNMENT.pairs == [[("a", "p")], [("q", "c")]]


def test_pairs_of_three_networks_are_refused():
    with pytest.raises(ValueError, match="two models"):
        _ = dataclasses.replace(ALIGNMENT, names=("a", "b", "c")).pairs


def test_a_printed_alignment_shows_each_slot_and_marks_missing_layers():
    lines = str(ALIGNMENT).splitlines()
    assert lines[0].split() == ["deep", "other", "cost"]
    assert lines[2].split() == ["a", "p", "0.2500"]
    assert lines[3].split() == ["b", "+"]
    assert lines[5].split() == ["c", "q"]
    assert lines[6].split() == ["+", "r"]


def test_the_cost_of_a_slot_is_none_where_nothing_was_measured():
    first, second = ALIGNMENT.segments
    assert first.cost_of(1, 0) == 0.25
    assert first.cost_of(1, 1) is None
    assert second.cost_of(0, 0) is None


def test_alignments_compare_copy_and_go_to_json():
    again = copy.deepcopy(ALIGNMENT)
    assert again == ALIGNMENT and hash(again) == hash(ALIGNMENT)
    assert dataclasses.replace(again, names=("deep", "third")) != ALIGNMENT
    assert json.loads(json.dumps(dataclasses.asdict(ALIGNMENT)))["names"] == ["deep", "other"]


@pytest.mark.parametrize("thing", [ALIGNMENT, Spaces(()), Frozen("a", 0, 1, "n", "why"), axis()])
def test_plans_cannot_be_changed(thing):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(thing, dataclasses.fields(thing)[0].name, None)


def test_a_signature_tells_places_apart_but_not_sizes():
    assert space("s", 4).signature == space("t", 9).signature
    assert space("s", 4).signature != space("s", 4, reads=True).signature
    assert space("s", 4).signature != space("s", 4, times=2).signature
    assert space("s", 4).signature != space("s", 4, tensor="b.weight").signature


def test_free_units_leave_out_blocks_and_units_that_are_alone_in_one():
    parent = space("heads", 3)
    inner = space("units", 6, "heads", np.array([0, 0, 1, 1, 2, 2]))
    fixed = space("fixed", 5, None, np.array([0, 0, 1, 2, 2]))
    alone = space("one", 1)
    assert Spaces((parent, inner)).free_units == 6
    assert Spaces((fixed,)).free_units == 4
    assert Spaces((alone,)).free_units == 0


def test_spaces_are_found_by_name():
    spaces = Spaces((space("a", 3), space("b", 4)))
    assert spaces["b"].size == 4
    assert [s.name for s in spaces] == ["a", "b"] and len(spaces) == 2


def test_an_unknown_space_is_a_key_error():
    with pytest.raises(KeyError):
        Spaces((space("a", 3),))["b"]


def test_spaces_print_their_sizes_blocks_and_what_is_fixed():
    frozen = Frozen("out.weight", 0, 3, "output", "an output of the network")
    text = str(Spaces((space("heads", 3), space("u", 6, "heads", np.zeros(6))), (frozen,)))
    assert "2 spaces, 6 free units" in text
    assert "u: 6 units on 1 axes in blocks of heads" in text
    assert "fixed: out.weight[0]: 3 units fixed at output, an output of the network" in text


def test_layers_and_segments_print_what_they_are():
    layer = Layer("a", "k", ("a",), "x", "a", "a", ("a",), True, (4, 5), (4, 1), 7)
    assert str(layer) == "a (block, 7 units)"
    assert str(Segment((layer,))) == "4x5 positions: a"
    flat = dataclasses.replace(layer, branched=False, resolution=())
    assert str(flat) == "a (layer, 7 units)"
    assert Segment((flat,)).label == "features"


def test_confidence_is_one_for_a_permutation_and_less_for_a_mixture():
    permutation, mixture = np.eye(3)[[2, 0, 1]], np.full((3, 3), 1 / 3)
    assert Coupling(csr_array(permutation), csr_array(permutation.T)).confidence == 1.0
    assert Coupling(csr_array(mixture), csr_array(mixture.T)).confidence == pytest.approx(1 / 3)
