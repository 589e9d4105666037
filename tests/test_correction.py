"""The correction of weights: against plain regressions, and what the held-out samples decide."""

import math

import pytest
import torch
from conftest import EXACT
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.correction import Regression, Sums, corrected, corrected_from_rows, products

RIDGES = (1e-4, 1e-2, 1.0)


def rows_of(groups, count, inputs, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, count, inputs, generator=generator, dtype=torch.float64) + 0.5
    r = torch.randn(groups, count, outputs, generator=generator, dtype=torch.float64) - 0.3
    return x, r


def sums_of(x, r, centred=True):
    sums = Sums(centred)
    sums.add(x, r)
    return sums


def close(a, b, tolerance=EXACT):
    return float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1.0)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_a_vanishing_ridge_gives_plain_regression(groups, inputs, outputs, centred, seed):
    x, r = rows_of(groups, 30, inputs, outputs, seed)
    found = sums_of(x, r, centred).solve([1e-12])[0]
    one = torch.ones(groups, 30, 1, dtype=torch.float64)
    full = torch.linalg.lstsq(torch.cat([x, one], 2) if centred else x, r).solution
    assert close(found, full[:, :inputs], 1e-6)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.booleans())
def test_batches_add_up(sizes, centred):
    x, r = rows_of(2, sum(sizes) + 1, 3, 2)
    whole, parts = sums_of(x, r, centred), Sums(centred)
    start = 0
    for size in (*sizes, 1):
        parts.add(x[:, start : start + size], r[:, start : start + size])
        start += size
    for name in ("xx", "xr", "rr", "x", "r"):
        assert close(getattr(parts, name), getattr(whole, name))
    assert parts.count == whole.count


@given(st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_error_is_that_of_the_corrected_rows(centred, with_weight, seed):
    x, r = rows_of(2, 40, 3, 2, seed)
    fit, held = sums_of(x[:, :25], r[:, :25], centred), sums_of(x[:, 25:], r[:, 25:], centred)
    weight = fit.solve([0.1])[0] if with_weight else torch.zeros(2, 3, 2, dtype=torch.float64)
    bias = (r[:, :25] - x[:, :25] @ weight).mean(1, keepdim=True) * centred
    expected = (r[:, 25:] - x[:, 25:] @ weight - bias).square().sum((0, 2)).mean()
    assert held.error(fit, weight if with_weight else None) == pytest.approx(float(expected))


def test_noise_is_not_fitted_and_a_signal_is():
    x, r = rows_of(1, 60, 40, 2)
    fit, held = sums_of(x[:, :45], r[:, :45]), sums_of(x[:, 45:], r[:, 45:])
    noise = corrected(fit, held, (1e-6, 1e-4))
    assert noise.weight is None and math.isinf(noise.ridge)
    truth = torch.randn(1, 40, 2, dtype=torch.float64)
    fit, held = (sums_of(x[:, part], x[:, part] @ truth) for part in (slice(45), slice(45, 60)))
    signal = corrected(fit, held, RIDGES)
    assert signal.ridge == 1e-4 and close(signal.weight, truth, 1e-2)
    assert signal.error < 0.01 * noise.error


def test_without_samples_held_out_nothing_is_corrected():
    x, r = rows_of(1, 20, 3, 2)
    assert corrected(sums_of(x, x[..., :2]), Sums(True), RIDGES).weight is None


def test_inputs_that_never_vary_get_no_weight():
    x, r = rows_of(2, 20, 3, 2)
    x[0] = 0.75
    found = sums_of(x, r).solve([1e-3])[0]
    assert bool(found.isfinite().all()) and float(found[0].abs().max()) < 1e-6


@given(
    st.integers(1, 3),
    st.integers(1, 60),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 3.0]),
    st.integers(0, 99),
)
def test_rows_give_what_sums_give(groups, count, inputs, centred, signal, seed):
    x, r = rows_of(groups, count, inputs, 3, seed)
    r = r + signal * x @ torch.randn(groups, inputs, 3, dtype=torch.float64)
    held = torch.arange(count) % 4 == 3
    fits = [sums_of(x[:, part], r[:, part], centred) for part in (~held, held)]
    wanted, found = corrected(*fits, RIDGES), corrected_from_rows(x, r, held, centred, RIDGES)
    assert found.ridge == wanted.ridge
    assert (found.weight is None) == (wanted.weight is None)
    if wanted.weight is not None:
        assert close(found.weight, wanted.weight, 1e-6)
    if held.any():
        assert found.error == pytest.approx(wanted.error, rel=1e-6)


@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 99))
def test_one_regression_corrects_one_rest_after_another(groups, batches, centred, by_rows, seed):
    x, r = rows_of(groups, 20 * batches, 6, 3, seed)
    held = torch.arange(len(x[0])) >= 15 * batches
    regression = Regression(x, 15 * batches, centred, int(by_rows))
    for rest in (r, r.flip(1) + 2 * x[:, :, :3]):
        fits = [sums_of(x[:, part], rest[:, part], centred) for part in (~held, held)]
        wanted, found = corrected(*fits, RIDGES), regression.correct(rest, RIDGES, 0.0)
        assert found.ridge == wanted.ridge and found.error == pytest.approx(wanted.error, rel=1e-6)
        assert wanted.weight is None or close(found.weight, wanted.weight, 1e-6)
    assert regression.correct(torch.zeros_like(r), RIDGES, 0.0).weight is None


@given(st.integers(1, 4), st.integers(1, 30))
def test_one_equation_for_each_of_every_few_rows(thin, seed):
    x, r = rows_of(1, 40, 6, 3, seed)
    held = torch.arange(40) >= 30
    parts = x[:, ::thin], r[:, ::thin], held[::thin]
    wanted = corrected_from_rows(*parts, True, RIDGES)
    found = Regression(x, 30, True, thin).correct(r, RIDGES, 0.0)
    assert found.ridge == wanted.ridge and found.error == pytest.approx(wanted.error)


@pytest.mark.parametrize("groups, inputs", [(1, 3), (1, 256), (1, 300), (2, 300)])
def test_products_are_formed_by_halves(groups, inputs):
    x, _ = rows_of(groups, 20, inputs, 1)
    assert close(products(x), x.mT @ x)
