"""Pictures of alignments: what is where, as SVG, and as files."""

import itertools
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings

from fxfuse.errors import ArgumentError
from fxfuse.report._shared import clean
from fxfuse.report.alignment_picture import LETTER_WIDTH, SMALL, TEXT, draw, lay_out, svg_of
from tests.support.alignments import EXAMPLE, alignments, layers_of


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
        note = len(b.note) * SMALL * LETTER_WIDTH + 8 if b.note else 0
        assert len(b.text) * TEXT * LETTER_WIDTH + note <= b.width
    for b in boxes(scene, "chip"):
        assert len(b.text) * SMALL * LETTER_WIDTH <= b.width


@given(alignments())
def test_matched_layers_are_joined(alignment):
    pairs = sum(
        row[i] is not None and s.slots[s.reference][i] is not None
        for s in alignment.segments
        for k, row in enumerate(s.slots)
        for i in range(len(row))
        if k != s.reference
    )
    scene = lay_out(alignment)
    edges = {b.x for b in boxes(scene, "layer", "inserted")}
    joined = [line for line in scene.lines if line.kind == "pair"]
    assert sum(line.x2 in edges for line in joined) == pairs, "each ends at a layer"
    for line in joined:
        for b in boxes(scene, "inserted"):
            beside = line.x2 <= b.x or line.x1 >= b.x + b.width
            above, below = max(line.y1, line.y2) <= b.y, min(line.y1, line.y2) >= b.y + b.height
            assert beside or above or below, "no line goes through what is inserted"


def test_a_removed_layer_is_drawn_as_merged_and_nothing_is_inserted_for_it():
    deepened = lay_out(EXAMPLE)
    assert len(boxes(deepened, "inserted")) == 2  # one of them is in the legend
    shortened = lay_out(EXAMPLE, ({"a2"}, ()))
    assert [b.text for b in boxes(shortened, "merged") if b.text] == ["a2"]
    assert not boxes(shortened, "inserted")


def test_boxes_hold_name_width_and_cost():
    facts = {b.text: (b.note, "\n".join(b.facts)) for b in boxes(lay_out(EXAMPLE), "layer")}
    assert facts["b2"][0] == "10" and "matched with a3, cost 0.9" in facts["b2"][1]
    assert "10 units, 1,000 parameters" in facts["b2"][1] and "linear, relu" in facts["b2"][1]


NAMESPACE = {"s": "http://www.w3.org/2000/svg"}


@given(alignments())
def test_an_svg_is_xml_and_has_the_full_name_of_every_layer(alignment):
    root = ElementTree.fromstring(svg_of(lay_out(alignment), "an <alignment> & more"))
    assert root.get("aria-label") == "an <alignment> & more"
    groups = root.findall("s:g[@class='fx-layer']", NAMESPACE)
    titles = [g.find("s:title", NAMESPACE).text.split("\n")[0] for g in groups]
    assert sorted(titles) == sorted(clean(name) for _, name in layers_of(alignment))


@given(alignments())
def test_an_svg_refers_to_nothing_outside(alignment):
    text = svg_of(lay_out(alignment), "x")
    assert "href" not in text and "<image" not in text and "@import" not in text


def test_a_picture_shows_every_layer_the_costs_and_what_is_inserted(tmp_path):
    EXAMPLE.draw(tmp_path / "a.svg")
    shown = set(re.findall(r"<text[^>]*>(.*?)</text>", (tmp_path / "a.svg").read_text()))
    assert shown >= {"deep", "shallow", "a1", "a2", "a3", "a4", "b1", "b2", "b3", "0.100", "0.900"}
    assert {"inserted", "neutral layer, inserted", "2.  features, 1 + 1 layers"} <= shown
    assert any("1 \u2212 CKA" in text for text in shown), "what a cost is"


def test_merged_layers_are_marked(tmp_path):
    draw(EXAMPLE, tmp_path / "a.svg", removed=({"a2"}, ()))
    text = (tmp_path / "a.svg").read_text()
    assert "merged away" in text and ">inserted<" not in text


def test_a_picture_can_be_a_png_in_a_new_folder_and_leaves_nothing_else(tmp_path):
    draw(EXAMPLE, tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_the_same_alignment_gives_the_same_bytes(tmp_path, ending):
    files = [tmp_path / f"{i}.{ending}" for i in range(2)]
    for file in files:
        draw(EXAMPLE, file)
    assert files[0].read_bytes() == files[1].read_bytes()


@given(alignments())
@settings(max_examples=4)
def test_any_names_can_be_drawn(tmp_path_factory, alignment):
    draw(alignment, tmp_path_factory.mktemp("any") / "a.png")


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="gif"):
        draw(EXAMPLE, tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())
