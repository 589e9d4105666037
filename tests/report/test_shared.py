"""Colours, short names and numbers that pictures and pages share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.errors import ArgumentError
from fxfuse.report._shared import (
    ALIKE,
    LONGEST_NAME,
    UNLIKE,
    clean,
    clipped,
    cost_matrices,
    require_picture,
    shades,
    short_number,
    split_prefix,
)
from tests.support.alignments import EXAMPLE


def test_only_names_with_something_in_common_lose_a_prefix_and_none_gets_empty():
    a = "the.trunk.of.the.network"
    assert split_prefix([f"{a}.b", f"{a}.b.c"]) == (f"{a}.", ["b", "b.c"])
    assert split_prefix([f"{a}.c"]) == ("", [f"{a}.c"])
    assert split_prefix([f"{a}.x1..{a}.x2", None, f"{a}.x3"]) == (f"{a}.", ["x1..x2", "", "x3"])
    assert split_prefix(["stage.0", "stage.1"]) == ("", ["stage.0", "stage.1"])
    assert split_prefix([None]) == ("", [""])


@given(st.text(max_size=200))
def test_long_names_keep_both_ends(text):
    short = clipped(text)
    assert len(short) <= LONGEST_NAME and short[:5] == text[:5] and short[-5:] == text[-5:]


def test_large_numbers_are_shown_by_three_digits():
    shown = [short_number(n) for n in (0, 999, 999_499, 1000, 11_700_000, 2 * 10**9)]
    assert shown == ["0", "999", "999k", "1k", "11.7M", "2G"]


@given(st.floats(-1, 2))
def test_shades_are_colours(share):
    assert all(len(c) == 7 and int(c[1:], 16) >= 0 for c in shades(share))


def test_the_ends_of_the_scale_are_the_colours_of_alike_and_unlike():
    assert (shades(0.0)[1], shades(1.0)[1]) == (ALIKE, UNLIKE)


def test_characters_that_xml_forbids_are_replaced():
    assert clean("a\x00b\x1f\ud800\n") == "a\ufffdb\ufffd\ufffd\n"


def test_costs_name_their_rows_and_columns_and_what_was_chosen():
    (matrix,) = cost_matrices(EXAMPLE)
    assert matrix.title == "1. 8x8 positions: deep (rows), shallow (columns)"
    assert (matrix.rows, matrix.columns) == (["a1", "a2", "a3"], ["b1", "b2"])
    assert matrix.chosen == [0, 2] and matrix.costs == ((0.1, 0.9),) * 3


def test_pictures_of_other_endings_are_refused(tmp_path):
    assert require_picture(tmp_path / "a.pdf") == tmp_path / "a.pdf"
    with pytest.raises(ArgumentError, match="gif"):
        require_picture(tmp_path / "a.gif")
