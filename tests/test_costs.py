import numpy as np
import pytest
import torch
from conftest import STATISTIC
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.costs import (
    LinearCKA,
    correlation,
    cosine,
    euclidean,
    gram,
    pearson,
    squared_euclidean,
)
from fxfuse.moments import PairMoments

seeds = st.integers(0, 999)


def activations(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.7


def cka(left, right):
    """One minus linear CKA of two lists of activations, from grams of one batch."""
    meter = LinearCKA(len(left), len(right))
    meter.add([gram(x) for x in left], [gram(y) for y in right])
    return meter.costs()


def direct_cka(x, y):
    """The textbook formula: |Y'X|^2 / (|X'X| |Y'Y|) of columns without their means."""
    x, y = (t.flatten(1).double().numpy() for t in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    return 1 - norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


def test_a_gram_matrix_is_that_of_centred_samples():
    x = activations(0, 5, 3, 2, 2)
    flat = x.flatten(1).double()
    flat = flat - flat.mean(0)
    assert torch.allclose(gram(x), flat @ flat.T, rtol=STATISTIC, atol=STATISTIC)
    assert gram(x).dtype == torch.float64
    assert float(gram(x).sum(0).abs().max()) < STATISTIC


@given(seeds)
def test_costs_of_layers_are_one_minus_linear_cka(seed):
    left = [activations(seed + i, 7, 3 + i, 2) for i in range(3)]
    right = [activations(seed + 10 + i, 7, 4, 1 + i) for i in range(2)]
    expected = np.array([[direct_cka(x, y) for y in right] for x in left])
    assert np.abs(cka(left, right) - expected).max() <= STATISTIC


@given(seeds)
def test_cka_of_several_batches_adds_their_inner_products(seed):
    batches = [(activations(seed + i, 6, 4), activations(seed + 50 + i, 6, 3)) for i in range(3)]
    meter = LinearCKA(1, 1)
    for x, y in batches:
        meter.add([gram(x)], [gram(y)])
    grams = [(gram(x).numpy(), gram(y).numpy()) for x, y in batches]
    cross = sum((k * m).sum() for k, m in grams)
    own = sum((k * k).sum() for k, _ in grams) * sum((m * m).sum() for _, m in grams)
    assert meter.costs()[0, 0] == pytest.approx(1 - cross / own**0.5, rel=STATISTIC)


@given(seeds)
def test_cka_does_not_see_the_order_scale_or_rotation_of_units(seed):
    x, y = activations(seed, 9, 5), activations(seed + 1, 9, 6)
    rng = np.random.default_rng(seed)
    rotation = torch.as_tensor(np.linalg.qr(rng.standard_normal((5, 5)))[0], dtype=torch.float32)
    changed = [x, x[:, rng.permutation(5)], 3 * x, x @ rotation, x + 5]
    costs = cka(changed, [y])
    assert np.abs(costs - costs[0]).max() <= STATISTIC
    assert np.abs(cka([x], changed)).max() <= STATISTIC


def test_cka_tells_layers_apart():
    x, y = activations(0, 30, 5), activations(1, 30, 5)
    assert cka([x], [x + 0.1 * y])[0, 0] < 0.1 < 0.5 < cka([x], [y])[0, 0]
    assert cka([x], [x * torch.tensor([1.0, 5, 1, 1, 1])])[0, 0] > 0.01


def test_a_constant_layer_is_unlike_everything_itself_included():
    x, constant = activations(0, 5, 3), torch.ones(5, 3)
    assert np.array_equal(cka([constant], [x, constant]), [[1.0, 1.0]])


# --- units ----------------------------------------------------------------------------------------


def places(seed, count=1, n=4, m=3, positions=40):
    """Pairs of moments at some places, and the values they were made of."""
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
    """The cost of each pair of units, one by one, summed over places."""
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
def test_cosine_is_one_minus_the_cosine_with_means_left_in(seed, count):
    moments, pairs = places(seed, count)
    norm = np.linalg.norm
    expected = entries(pairs, lambda a, b: (1 - a @ b / (norm(a) * norm(b))) / count)
    assert np.allclose(cosine(moments), expected, atol=STATISTIC)


def test_cosine_sees_means_which_correlation_does_not_and_is_defined_for_zeros():
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


def test_the_floor_of_correlations_quiets_units_that_hardly_vary():
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
    assert np.allclose(correlation([moments], tie_break=0.0), 1.0)


@pytest.mark.parametrize("cost", [squared_euclidean, euclidean, correlation, cosine])
def test_ground_costs_are_smallest_for_a_unit_itself_and_never_negative(cost):
    x = activations(3, 5, 50)
    order = [2, 0, 4, 1, 3]
    moments = PairMoments()
    moments.add(x, x[order])
    found = cost([moments])
    assert (found >= 0).all()
    assert found.argmin(0).tolist() == order
    assert found.min(0).max() <= 0.01


@pytest.mark.parametrize("cost", [squared_euclidean, euclidean, correlation, cosine])
def test_ground_costs_follow_the_order_of_units(cost):
    x, y = activations(3, 5, 50), activations(4, 4, 50)
    a, b = PairMoments(), PairMoments()
    a.add(x, y)
    b.add(x.flip(0), y[[1, 3, 0, 2]])
    assert np.allclose(cost([b]), cost([a])[::-1][:, [1, 3, 0, 2]], rtol=STATISTIC)


def test_correlation_does_not_see_scale_but_euclidean_does():
    x = activations(3, 5, 50)
    moments = PairMoments()
    moments.add(x, 4 * x)
    assert np.diag(correlation([moments], tie_break=0.0)).max() <= STATISTIC
    assert np.diag(euclidean([moments])).min() > 1
