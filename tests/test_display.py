"""Pictures of alignments."""

import re

import pytest

from fxfuse.display import draw
from fxfuse.errors import ArgumentError
from fxfuse.ir import Alignment, SegmentAlignment

ALIGNMENT = Alignment(
    (
        SegmentAlignment(
            "8x8 positions", 0, (("a1", "a2", "a3"), ("b1", None, "b2")), (None, ((0.1, 0.9),) * 3)
        ),
        SegmentAlignment("features", 0, (("a4",), ("b3",)), (None, None)),
    ),
    ("deep", "shallow"),
)


def test_a_picture_shows_every_layer_the_costs_and_what_is_inserted(tmp_path):
    draw(ALIGNMENT, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    shown = set(re.findall(r"<!-- (.*?) -->", text))
    assert shown >= {"deep", "shallow", "a1", "a2", "a3", "a4", "b1", "b2", "b3", "0.100", "0.900"}
    assert "neutral, inserted" in shown and "features" in shown


def test_a_picture_can_be_a_png_in_a_new_folder_and_leaves_nothing_else(tmp_path):
    draw(ALIGNMENT, tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="gif"):
        draw(ALIGNMENT, tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())
