"""Thinned changes: what is kept, how it is enlarged, and that the draw is fixed by its seed."""

import numpy as np
import pytest

from fxfuse.errors import ArgumentError
from fxfuse.mixers import Dare, TaskArithmetic, Ties

SHARES = (0.0, 0.5, 0.5)


def rule(mixer, tensors):
    return mixer(lambda: iter([("w", tensors)]), SHARES)("w", tensors)


def test_what_is_left_of_a_change_is_divided_by_the_share_that_is_left():
    base = np.ones(20_000)
    tensors = [base, base + 2, base]
    mixed = rule(Dare(density=0.25, then=TaskArithmetic(scale=1.0)), tensors)
    assert set(np.unique(mixed)) == {1.0, 9.0}
    assert mixed.mean() == pytest.approx(3.0, rel=0.05)  # in the mean, nothing is lost


def test_networks_and_tensors_are_drawn_apart_and_always_alike():
    base = np.zeros(200)
    a, b = rule(Dare(), [base, base + 1, base]), rule(Dare(), [base, base, base + 1])
    assert not np.array_equal(a, b)
    assert np.array_equal(a, rule(Dare(), [base, base + 1, base]))
    assert not np.array_equal(a, rule(Dare(seed=1), [base, base + 1, base]))


def test_signs_are_elected_of_what_is_left():
    tensors = [np.zeros(400), np.full(400, 2.0), np.full(400, -1.0)]
    mixed = rule(Dare(density=0.5, then=Ties(density=1.0)), tensors)
    assert set(np.unique(mixed)) == {-2.0, 0.0, 4.0}  # only the second left; none; the first


def test_with_all_changes_kept_it_is_what_follows():
    tensors = list(np.random.default_rng(0).normal(size=(3, 9)))
    assert np.allclose(rule(Dare(density=1.0), tensors), rule(TaskArithmetic(), tensors))
    with pytest.raises(ArgumentError, match="density 1.5"):
        Dare(density=1.5)
