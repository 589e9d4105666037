import numpy as np
import pytest
import torch
from conftest import STATISTIC
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.moments import Moments, PairMoments

cuts = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def close(found, expected):
    scale = max(np.abs(expected).max(), 1e-6)
    return np.abs(found - expected).max() <= STATISTIC * scale


def values(units, positions, seed, offset=0.0):
    rng = np.random.default_rng(seed)
    data = rng.standard_normal((units, positions)) * rng.uniform(0.5, 3, (units, 1))
    return torch.as_tensor(data + offset, dtype=torch.float32)


@given(cuts, st.integers(0, 99), st.sampled_from([0.0, 50.0]))
def test_streamed_moments_are_those_of_all_data_at_once(lengths, seed, offset):
    x = values(4, sum(lengths), seed, offset)
    moments = Moments()
    for part in x.split(lengths, 1):
        moments.add(part)
    whole = x.double().numpy()
    assert moments.count == sum(lengths)
    assert close(moments.mean, whole.mean(1))
    assert close(moments.variance, whole.var(1))
    assert close(moments.spread, whole.std(1))


@given(cuts, st.integers(0, 99), st.sampled_from([0.0, 50.0]))
def test_streamed_covariances_are_those_of_all_data_at_once(lengths, seed, offset):
    x, y = values(4, sum(lengths), seed, offset), values(3, sum(lengths), seed + 1, -offset)
    y[0] += 2 * x[1]
    moments = PairMoments()
    for a, b in zip(x.split(lengths, 1), y.split(lengths, 1)):
        moments.add(a, b)
    n = sum(lengths)
    whole = (
        np.cov(x.double().numpy(), y.double().numpy(), bias=True)[:4, 4:]
        if n > 1
        else np.zeros((4, 3))
    )
    assert np.abs(moments.covariance - whole).max() <= STATISTIC * max(1, np.abs(whole).max())


def test_a_large_mean_does_not_drown_the_variance():
    x = values(3, 4000, 0) + 1000
    moments = Moments()
    for part in x.split(500, 1):
        moments.add(part)
    assert close(moments.variance, x.double().numpy().var(1))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 2, 3, 5)])
def test_all_axes_behind_the_first_are_positions(shape):
    x = torch.randn(shape)
    moments = Moments()
    flat = moments.add(x)
    assert flat.shape == (4, x[0].numel()) and moments.count == x[0].numel()
    assert close(moments.mean, x.flatten(1).double().numpy().mean(1))


def test_the_layout_in_memory_does_not_matter():
    x = torch.randn(4, 6, 5)
    a, b = Moments(), Moments()
    a.add(x)
    b.add(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert close(a.mean, b.mean) and close(a.variance, b.variance)


def test_what_is_added_is_not_changed():
    x = torch.randn(4, 6)
    kept = x.clone()
    moments = Moments()
    moments.add(x)
    moments.add(x)
    assert torch.equal(x, kept)


def test_units_can_be_taken_out():
    x, y = values(5, 20, 0), values(4, 20, 1)
    pair, rows, columns = PairMoments(), np.array([3, 0]), np.array([2, 2, 1])
    pair.add(x, y)
    taken, direct = pair.take(rows, columns), PairMoments()
    direct.add(x[rows], y[columns])
    assert np.allclose(taken.covariance, direct.covariance, rtol=STATISTIC)
    assert np.allclose(taken.a.mean, direct.a.mean, rtol=STATISTIC)
    assert np.allclose(taken.b.variance, direct.b.variance, rtol=STATISTIC)


def test_sides_may_be_counted_elsewhere():
    x, y = values(5, 20, 0), values(4, 20, 1)
    alone, direct = PairMoments(Moments(), Moments()), PairMoments()
    for a, b in zip(x.split(7, 1), y.split(7, 1)):
        alone.add_shifted(alone.a.add(a), alone.b.add(b))
        direct.add(a, b)
    assert np.array_equal(alone.covariance, direct.covariance)


def test_half_precision_is_summed_in_full():
    x = (torch.randn(3, 5000) + 3).half()
    moments = Moments()
    for part in x.split(1000, 1):
        moments.add(part)
    assert close(moments.variance, x.double().numpy().var(1))
