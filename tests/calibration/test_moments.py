"""Streamed moments against those of all data at once, and ground costs against definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.calibration.moments import (
    Moments,
    PairMoments,
    correlation,
    cosine,
    euclidean,
    pearson,
    squared_euclidean,
)
from tests.support.tolerances import STATISTIC

cuts = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def close(streamed, expected):
    scale = max(np.abs(expected).max(), 1e-6)
    return np.abs(streamed - expected).max() <= STATISTIC * scale


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


def test_the_variance_is_accurate_beside_a_large_mean():
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


def test_adding_does_not_change_the_values():
    x = torch.randn(4, 6)
    before = x.clone()
    moments = Moments()
    moments.add(x)
    moments.add(x)
    assert torch.equal(x, before)


def test_moments_of_some_units_are_those_of_their_values():
    x, y = values(5, 20, 0), values(4, 20, 1)
    pair, rows, columns = PairMoments(), np.array([3, 0]), np.array([2, 2, 1])
    pair.add(x, y)
    taken, direct = pair.take(rows, columns), PairMoments()
    direct.add(x[rows], y[columns])
    assert np.allclose(taken.covariance, direct.covariance, rtol=STATISTIC)
    assert np.allclose(taken.a.mean, direct.a.mean, rtol=STATISTIC)
    assert np.allclose(taken.b.variance, direct.b.variance, rtol=STATISTIC)


def test_moments_of_the_sides_may_be_added_up_outside():
    x, y = values(5, 20, 0), values(4, 20, 1)
    outside, direct = PairMoments(Moments(), Moments()), PairMoments()
    for a, b in zip(x.split(7, 1), y.split(7, 1)):
        outside.add_shifted(outside.a.add(a), outside.b.add(b))
        direct.add(a, b)
    assert np.array_equal(outside.covariance, direct.covariance)


def test_half_precision_is_summed_in_full():
    x = (torch.randn(3, 5000) + 3).half()
    moments = Moments()
    for part in x.split(1000, 1):
        moments.add(part)
    assert close(moments.variance, x.double().numpy().var(1))


seeds = st.integers(0, 999)


def activations(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.7


def places(seed, count=1, n=4, m=3, positions=40):
    """Return moments of pairs at some places, and the values behind them."""
    made = []
    for i in range(count):
        x, y = activations(seed + i, n, positions), activations(seed + 77 + i, m, positions)
        y[0] = x[2] * 1.5 + 0.1 * y[0]
        moments = PairMoments()
        for a, b in zip(x.split(15, 1), y.split(15, 1)):
            moments.add(a, b)
        made.append((moments, x.double().numpy(), y.double().numpy()))
    return [m for m, _, _ in made], [(x, y) for _, x, y in made]


def entries(pairs, scalar, n=4, m=3):
    """Return the cost of each pair of units, summed over places."""
    return np.array(
        [[sum(scalar(x[i], y[j]) for x, y in pairs) for j in range(m)] for i in range(n)]
    )


@given(seeds, st.integers(1, 3))
def test_squared_euclidean_is_the_mean_squared_difference(seed, count):
    moments, pairs = places(seed, count)
    expected = entries(pairs, lambda a, b: ((a - b) ** 2).mean())
    assert np.allclose(squared_euclidean(moments), expected, rtol=STATISTIC, atol=STATISTIC)
    assert np.allclose(euclidean(moments), np.sqrt(expected), rtol=STATISTIC, atol=STATISTIC)


@given(seeds, st.integers(1, 3))
def test_correlation_is_one_minus_pearsons_averaged_over_places(seed, count):
    moments, pairs = places(seed, count)
    expected = entries(pairs, lambda a, b: (1 - np.corrcoef(a, b)[0, 1]) / count)
    assert np.allclose(correlation(moments, tie_break=0.0), expected, atol=STATISTIC)


@given(seeds, st.integers(1, 3))
def test_cosine_is_one_minus_the_cosine_means_included(seed, count):
    moments, pairs = places(seed, count)
    norm = np.linalg.norm
    expected = entries(pairs, lambda a, b: (1 - a @ b / (norm(a) * norm(b))) / count)
    assert np.allclose(cosine(moments), expected, atol=STATISTIC)


def test_cosine_depends_on_means_unlike_correlation_and_is_defined_for_zeros():
    x = activations(3, 4, 50)
    a, b = PairMoments(), PairMoments()
    a.add(x, x)
    b.add(x, x + 5)
    plain = [correlation([m], tie_break=0.0) for m in (a, b)]
    assert np.allclose(*plain, atol=STATISTIC) and not np.allclose(cosine([a]), cosine([b]))
    x[1] = 0.0
    zero = PairMoments()
    zero.add(x, x)
    assert np.allclose(cosine([zero])[1], 1.0) and np.isfinite(cosine([zero])).all()


def test_with_a_floor_units_that_hardly_vary_correlate_with_nothing():
    x = 1e-5 * activations(3, 4, 50)
    moments = PairMoments()
    moments.add(x, x)
    assert np.allclose(np.diag(pearson(moments)), 1.0, atol=STATISTIC)
    assert np.abs(pearson(moments, floor=1e-7)).max() < 0.01


@given(seeds)
def test_the_tie_break_adds_the_distance_of_means_and_spreads(seed):
    moments, ((x, y),) = places(seed)
    unit = (x**2).mean() + (y**2).mean()
    apart = entries([(x, y)], lambda a, b: (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2)
    plain, broken = (correlation(moments, tie_break=t) for t in (0.0, 0.3))
    assert np.allclose(broken - plain, 0.3 * apart / unit, atol=STATISTIC)


def test_units_that_never_vary_are_matched_by_their_means():
    x = torch.tensor([[1.0] * 6, [2.0] * 6, [3.0] * 6])
    moments = PairMoments()
    moments.add(x, x[[2, 0, 1]])
    assert correlation([moments]).argmin(1).tolist() == [1, 2, 0]
    assert np.allclose(correlation([moments], tie_break=0.0), 0.0)  # alike in not varying
    moving = PairMoments()
    moving.add(x, torch.randn(3, 6))
    assert np.allclose(correlation([moving], tie_break=0.0), 1.0)


@pytest.mark.parametrize("cost", [squared_euclidean, euclidean, correlation, cosine])
def test_ground_costs_are_smallest_for_a_unit_itself_and_never_negative(cost):
    x = activations(3, 5, 50)
    order = [2, 0, 4, 1, 3]
    moments = PairMoments()
    moments.add(x, x[order])
    costs = cost([moments])
    assert (costs >= 0).all()
    assert costs.argmin(0).tolist() == order
    assert costs.min(0).max() <= 0.01


@pytest.mark.parametrize("cost", [squared_euclidean, euclidean, correlation, cosine])
def test_ground_costs_follow_the_order_of_units(cost):
    x, y = activations(3, 5, 50), activations(4, 4, 50)
    a, b = PairMoments(), PairMoments()
    a.add(x, y)
    b.add(x.flip(0), y[[1, 3, 0, 2]])
    assert np.allclose(cost([b]), cost([a])[::-1][:, [1, 3, 0, 2]], rtol=STATISTIC)


def test_euclidean_depends_on_scale_unlike_correlation():
    x = activations(3, 5, 50)
    moments = PairMoments()
    moments.add(x, 4 * x)
    assert np.diag(correlation([moments], tie_break=0.0)).max() <= STATISTIC
    assert np.diag(euclidean([moments])).min() > 1


def test_truth_values_count_as_numbers():
    values = torch.randn(5, 40) > 0.3
    moments, numbers = Moments(), Moments()
    moments.add(values)
    numbers.add(values.float())
    assert np.array_equal(moments.mean, numbers.mean)
    assert np.array_equal(moments.spread, numbers.spread)


def test_a_batch_without_values_says_nothing():
    x, moments = torch.randn(3, 20), Moments()
    for part in (x[:, :0], x[:, :5], x[:, :0], x[:, 5:]):
        moments.add(part)
    assert np.allclose(moments.mean, x.mean(1)) and moments.count == 20
