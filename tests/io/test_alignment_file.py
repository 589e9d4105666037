"""Alignments as JSON, edited by hand."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxfuse
from fxfuse.errors import ArgumentError, FuseError
from fxfuse.ir import Alignment, SegmentAlignment
from tests.support.json_values import JSON, changed, places
from tests.support.nets import mlp, randomise, residual

ALIGNMENT = Alignment(
    (
        SegmentAlignment(
            "8x8 positions",
            0,
            (("a1", "a2", "a3"), ("b1", None, "b2")),
            (None, ((0.1, float("inf")),) * 3),
        ),
        SegmentAlignment("features", 1, (("a4",), ("b3",)), (None, None)),
    ),
    ("deep", "sch\u00f6n \u2713"),
)
TREE = json.loads(ALIGNMENT.to_json())


def test_an_alignment_comes_back_from_its_text_and_from_a_file(tmp_path):
    assert Alignment.from_json(ALIGNMENT.to_json()) == ALIGNMENT
    ALIGNMENT.save(tmp_path / "a.json")
    assert Alignment.load(tmp_path / "a.json") == ALIGNMENT
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_each_slot_has_a_line_of_its_own():
    lines = [line.strip(" ,") for line in ALIGNMENT.to_json().splitlines()]
    assert {'["a1", "b1"]', '["a2", null]', '["a3", "b2"]', '["a4", "b3"]'} <= set(lines)
    assert '"networks": ["deep", "sch\u00f6n \u2713"]' in lines


def test_costs_may_be_left_out():
    tree = copy.deepcopy(TREE)
    del tree["segments"][0]["costs"]
    assert Alignment.from_json(json.dumps(tree)).segments[0].costs == (None, None)


SLOTS = ("segments", 0, "layers")


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("format",), "other", "the alignment"),
        (("version",), 2, "the alignment"),
        (("networks",), [], "the alignment"),
        (("segments",), [], "the alignment"),
        (("segments", 0, "reference"), 2, "segments[0].reference"),
        (("segments", 0, "reference"), -1, "segments[0].reference"),
        (("segments", 0, "label"), None, "segments[0].label"),
        (SLOTS, [], "segments[0].layers"),
        ((*SLOTS, 1), ["a2"], "layers[1]"),
        ((*SLOTS, 1), [None, "b1"], "layers[1]"),
        ((*SLOTS, 1), ["a2", "b1"], "layers[1]"),
        ((*SLOTS, 1), ["a1", None], "layers[1]"),
        ((*SLOTS, 1, 0), 5, "layers[1][0]"),
        (("segments", 1, "layers", 0, 1), "b2", "segments[1].layers[0]"),
        (("segments", 0, "costs"), [None], "segments[0].costs"),
        (("segments", 0, "costs", 1), [[0.1]], "segments[0].costs[1]"),
        (("segments", 0, "extra"), 1, "segments[0]"),
    ],
)
def test_senseless_edits_are_refused_with_their_place(path, value, where):
    with pytest.raises(ArgumentError) as caught:
        Alignment.from_json(json.dumps(changed(TREE, path, value)))
    assert where in caught.value.where


def test_a_missing_file_and_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "a.json", tmp_path / "none.json", tmp_path):
        with pytest.raises(ArgumentError, match="cannot be read"):
            Alignment.load(path)


def test_an_error_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(changed(TREE, ("segments", 0, "extra"), 1)))
    with pytest.raises(ArgumentError) as caught:
        Alignment.load(path)
    assert caught.value.where == f"{path}: the alignment.segments[0]"


@settings(max_examples=100)
@given(st.sampled_from(list(places(TREE))), JSON)
def test_any_value_in_any_place_is_accepted_or_refused(path, value):
    try:
        alignment = Alignment.from_json(json.dumps(changed(TREE, path, value)))
    except FuseError:
        return
    assert str(alignment) and Alignment.from_json(alignment.to_json()).names == alignment.names


@settings(max_examples=100)
@given(st.integers(0, len(ALIGNMENT.to_json())), st.integers(0, 9), st.text(max_size=3))
def test_any_text_is_accepted_or_refused(start, length, new):
    text = ALIGNMENT.to_json()
    try:
        Alignment.from_json(text[:start] + new + text[start + length :])
    except FuseError:
        return


# --- edited, then used ----------------------------------------------------------------------------


def nets():
    return [randomise(mlp(6, 8, 7, 5, 3), 0), randomise(mlp(6, 5, 4, 3), 1)]


def edited(models, data, shallow_layers):
    """The alignment of two networks, with other layers of the second in the first segment."""
    tree = json.loads(fxfuse.align(models, data).to_json())
    slots = tree["segments"][0]["layers"]
    slots[:] = [[deep, shallow] for (deep, _), shallow in zip(slots, shallow_layers)]
    for segment in tree["segments"]:
        segment["costs"] = None
    return Alignment.from_json(json.dumps(tree))


def test_an_edit_changes_the_fusion():
    models, data = nets(), torch.randn(40, 6)
    states = []
    for shallow_layers in (["0", "2", None], ["0", None, "2"]):
        alignment = edited(models, data, shallow_layers)
        states.append(fxfuse.fuse(models, data, alignment=alignment).state_dict())
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("layers", [["2", "0", None], ["0", "9", None], ["0", None, None]])
def test_layers_out_of_order_unknown_or_left_out_are_refused_where_they_are_used(layers):
    models, data = nets(), torch.randn(40, 6)
    alignment = edited(models, data, layers)
    for use in (fxfuse.fuse, fxfuse.balance):
        with pytest.raises(ArgumentError) as caught:
            use(models, data, alignment=alignment)
        assert "argument `alignment`" in caught.value.where and "0, 2" in caught.value.expected


def test_layers_of_other_kinds_side_by_side_are_refused():
    models = [randomise(residual((6, 1), (8, 3)), 0), randomise(residual((6, 1), (8, 2)), 1)]
    data = torch.randn(8, 3, 8, 8)
    tree = json.loads(fxfuse.align(models, data).to_json())
    stage = next(s for s in tree["segments"] if len(s["layers"]) == 3)
    shallow = [row[1] for row in stage["layers"] if row[1]]  # the first one has a projection
    stage["layers"] = [[row[0], x] for row, x in zip(stage["layers"], [None, *shallow])]
    stage["costs"] = None
    with pytest.raises(ArgumentError, match="different kinds"):
        fxfuse.fuse(models, data, alignment=Alignment.from_json(json.dumps(tree)))
