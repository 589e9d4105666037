"""Where things are in the picture of an alignment."""

import itertools

from alignments import EXAMPLE, alignments, layers_of
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.scene import LETTER, LONGEST, SMALL, TEXT, clipped, count_of, lay_out, shades, shortened


def boxes(scene, *kinds):
    return [b for b in scene.boxes if b.kind in kinds]


@given(alignments())
def test_every_layer_has_one_box_and_none_overlap_or_leave_the_picture(alignment):
    scene = lay_out(alignment)
    shown = boxes(scene, "layer", "inserted")
    assert len(boxes(scene, "layer")) == len(layers_of(alignment))
    for b in scene.boxes:
        assert b.x >= 0 and b.y >= 0
        assert b.x + b.width <= scene.width and b.y + b.height <= scene.height
    for a, b in itertools.combinations([*shown, *boxes(scene, "chip")], 2):
        apart = a.x + a.width <= b.x + 1e-6 or b.x + b.width <= a.x + 1e-6
        assert apart or a.y + a.height <= b.y + 1e-6 or b.y + b.height <= a.y + 1e-6


@given(alignments())
def test_texts_fit_into_their_boxes(alignment):
    scene = lay_out(alignment)
    for b in boxes(scene, "layer", "inserted"):
        note = len(b.note) * SMALL * LETTER + 8 if b.note else 0
        assert len(b.text) * TEXT * LETTER + note <= b.width
    for b in boxes(scene, "chip"):
        assert len(b.text) * SMALL * LETTER <= b.width


@given(alignments())
def test_matched_layers_are_joined(alignment):
    pairs = sum(
        row[i] is not None and s.slots[s.reference][i] is not None
        for s in alignment.segments
        for k, row in enumerate(s.slots)
        for i in range(len(row))
        if k != s.reference
    )
    assert sum(line.kind == "pair" for line in lay_out(alignment).lines) == pairs


def test_what_is_removed_is_drawn_as_merged_and_nothing_is_inserted_for_it():
    kept = lay_out(EXAMPLE)
    assert len(boxes(kept, "inserted")) == 2  # of which one explains the kind
    lost = lay_out(EXAMPLE, ({"a2"}, ()))
    assert [b.text for b in boxes(lost, "merged") if b.text] == ["a2"]
    assert not boxes(lost, "inserted")


def test_boxes_tell_name_width_and_cost():
    facts = {b.text: (b.note, "\n".join(b.facts)) for b in boxes(lay_out(EXAMPLE), "layer")}
    assert facts["b2"][0] == "10" and "matched with a3, cost 0.9" in facts["b2"][1]
    assert "10 units, 1,000 parameters" in facts["b2"][1] and "linear, relu" in facts["b2"][1]


def test_prefixes_are_shared_and_nothing_gets_empty():
    a = "the.trunk.of.the.network"
    assert shortened([f"{a}.b", f"{a}.b.c"]) == (f"{a}.", ["b", "b.c"])
    assert shortened([f"{a}.c"]) == ("", [f"{a}.c"])
    assert shortened([f"{a}.x1..{a}.x2", None, f"{a}.x3"]) == (f"{a}.", ["x1..x2", "", "x3"])
    assert shortened(["stage.0", "stage.1"]) == ("", ["stage.0", "stage.1"])
    assert shortened([None]) == ("", [""])


@given(st.text(max_size=200))
def test_long_names_keep_both_ends(text):
    short = clipped(text)
    assert len(short) <= LONGEST and short[:5] == text[:5] and short[-5:] == text[-5:]


def test_numbers_are_short():
    found = [count_of(n) for n in (0, 999, 999_499, 1000, 11_700_000, 2 * 10**9)]
    assert found == ["0", "999", "999k", "1k", "11.7M", "2G"]


@given(st.floats(-1, 2))
def test_shades_are_colours(share):
    assert all(len(c) == 7 and int(c[1:], 16) >= 0 for c in shades(share))
