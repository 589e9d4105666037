"""Which tokens of a sample count."""

import pytest

from fxfuse.coupling.tokens import Leading, Window
from fxfuse.errors import ArgumentError


def test_a_window_larger_than_the_grid_keeps_all():
    assert Window(4)(11).tolist() == list(range(11))


def test_a_window_lies_in_the_middle_behind_the_first_tokens():
    assert Window(2)(18).tolist() == [0, 1, 7, 8, 11, 12]  # two tokens, 4 x 4 patches


def test_leading_tokens_are_no_more_than_there_are():
    assert Leading(3)(2).tolist() == [0, 1]


@pytest.mark.parametrize("make", [Window, Leading])
def test_no_tokens_are_refused(make):
    with pytest.raises(ArgumentError):
        make(0)
