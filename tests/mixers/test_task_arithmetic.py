"""The checkpoint and a scaled sum of changes."""

import numpy as np

from fxfuse.mixers import TaskArithmetic


def test_changes_are_added_up_scaled():
    base, *tuned = np.random.default_rng(0).normal(size=(4, 2, 3))
    tensors = [base, *tuned]
    rule = TaskArithmetic(scale=0.3)(lambda: iter([]), (0.0, 1 / 3, 1 / 3, 1 / 3))
    assert np.allclose(rule("w", tensors), base + 0.3 * sum(t - base for t in tuned))
    rule = TaskArithmetic(scale=0.3)(lambda: iter([]), (0.0, 0.5, 0.25, 0.25))
    wanted = base + 0.3 * (1.5 * (tuned[0] - base) + 0.75 * (tuned[1] + tuned[2] - 2 * base))
    assert np.allclose(rule("w", tensors), wanted)


def test_one_part_of_each_is_the_mean():
    tensors = list(np.random.default_rng(1).normal(size=(3, 5)))
    rule = TaskArithmetic(scale=0.5)(lambda: iter([]), (0.0, 0.5, 0.5))
    assert np.allclose(rule("w", tensors), (tensors[1] + tensors[2]) / 2)
