"""Pictures of alignments."""

import re

import pytest
from alignments import EXAMPLE, alignments
from hypothesis import given, settings

from fxfuse.display import draw
from fxfuse.errors import ArgumentError


def test_a_picture_shows_every_layer_the_costs_and_what_is_inserted(tmp_path):
    EXAMPLE.draw(tmp_path / "a.svg")
    shown = set(re.findall(r"<text[^>]*>(.*?)</text>", (tmp_path / "a.svg").read_text()))
    assert shown >= {"deep", "shallow", "a1", "a2", "a3", "a4", "b1", "b2", "b3", "0.100", "0.900"}
    assert {"inserted", "neutral layer, inserted", "2.  features, 1 + 1 layers"} <= shown


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
