"""TIES against the three steps of its paper, written for vectors."""

import numpy as np
import pytest

from fxfuse.mixers import Ties


def written_out(base, tuned, density, scale):
    """Trim, elect and merge flat vectors, one network and one weight after the other."""
    changes = [np.array(t) - base for t in tuned]
    for change in changes:
        keep = int(density * len(change))
        change[np.argsort(-abs(change))[keep:]] = 0.0
    signs = np.sign(sum(changes))
    signs[signs == 0] = np.sign(signs.sum())
    merged = base.copy()
    for i, sign in enumerate(signs):
        agreeing = [c[i] for c in changes if c[i] != 0 and np.sign(c[i]) == sign]
        merged[i] += scale * np.mean(agreeing) if agreeing else 0.0
    return merged


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_it_trims_over_all_tensors_elects_signs_and_takes_the_mean_of_those_that_agree(
    count, density
):
    rng = np.random.default_rng(count)
    flat = rng.normal(size=(count + 1, 40))
    parts = {"a": slice(0, 12), "b": slice(12, 40)}
    named = [(n, [f[p].reshape(4, -1) for f in flat]) for n, p in parts.items()]
    mixer = Ties(density=density, scale=0.7)
    rule = mixer(lambda: iter(named), (0.0, *[1 / count] * count))
    ours = np.concatenate([rule(n, t).ravel() for n, t in named])
    assert np.allclose(ours, written_out(flat[0], flat[1:], density, 0.7))


def test_signs_that_cancel_are_those_of_most_others():
    base = np.zeros(3)
    tensors = [base, np.array([1.0, 2.0, 3.0]), np.array([-1.0, 1.0, 1.0])]
    rule = Ties(density=1.0)(lambda: iter([("w", tensors)]), (0.0, 0.5, 0.5))
    assert rule("w", tensors).tolist() == [1.0, 1.5, 2.0]


def test_weights_count_in_the_sums_and_in_the_means():
    tensors = [np.zeros(2), np.array([1.0, 1.0]), np.array([3.0, -2.0])]
    rule = Ties(density=1.0)(lambda: iter([("w", tensors)]), (0.0, 0.75, 0.25))
    assert np.allclose(rule("w", tensors), [1.5, 1.0])
