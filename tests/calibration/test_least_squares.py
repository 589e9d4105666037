"""Ridge regression: against plain regressions, by both forms, and what held-out rows decide."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.calibration.affine import Affine
from fxfuse.calibration.least_squares import (
    AffineFit,
    Correction,
    InputSums,
    Regression,
    Sums,
    best_ridge,
    mixtures_of,
    products,
)
from fxfuse.calibration.rows import (
    in_groups,
    input_rows,
    output_rows,
    rows_as_weight,
    weight_as_rows,
)
from fxfuse.errors import ArgumentError, DataError
from tests.support.maps import maps
from tests.support.tolerances import EXACT


@given(maps())
def test_input_rows_times_the_weights_rows_are_the_output_rows(case):
    affine, x = case
    axis = 1 if affine.kernel else -1
    outputs = in_groups(output_rows(affine(x), axis), affine.groups)
    bias = affine.offset.view(affine.groups, 1, -1)
    rows = input_rows(x, affine) @ weight_as_rows(affine.weight, affine) + bias
    assert torch.allclose(rows, outputs, atol=EXACT)


@given(maps(), st.lists(st.integers(0, 1000), max_size=9))
def test_rows_at_some_positions_are_those_of_the_whole(case, at):
    affine, x = case
    y, axis = affine(x), 1 if affine.kernel else -1
    every_input, every_output = input_rows(x, affine), output_rows(y, axis)
    at = torch.tensor(at, dtype=torch.long) % len(every_output)
    assert torch.equal(output_rows(y, axis, at), every_output[at])
    assert torch.equal(input_rows(x, affine, at), every_input[:, at])


def test_input_rows_are_patches_in_the_order_of_the_kernel():
    x = torch.arange(2.0 * 3 * 4 * 4).view(2, 3, 4, 4)
    affine = Affine(torch.zeros(5, 3, 2, 2), None, (2, 2), (0, 0), (1, 1))
    patch = x[1, :, 2:4, 0:2].permute(1, 2, 0).flatten()  # of the second sample, at row 1, column 0
    assert torch.equal(input_rows(x, affine)[0, 4 + 2], patch)


@given(maps())
def test_a_weight_comes_back_from_its_rows(case):
    affine, _ = case
    rows = weight_as_rows(affine.weight, affine)
    assert torch.equal(rows_as_weight(rows, affine.kernel), affine.weight)


RIDGES = (1e-4, 1e-2, 1.0)
F64 = torch.float64


def random_rows(groups, count, inputs, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, count, inputs, generator=generator, dtype=F64) + 0.5
    r = torch.randn(groups, count, outputs, generator=generator, dtype=F64) - 0.3
    return x, r


def sums_of(x, r, centred=True):
    sums = Sums(InputSums(centred))
    sums.inputs.add(x)
    sums.add(x, r)
    return sums


def solved(x, r, ridge, centred=True):
    """Return the ridge regression by its definition: the weight and the bias."""
    x_mean, r_mean = (t.mean(1, keepdim=True) * centred for t in (x, r))
    x, r = x - x_mean, r - r_mean
    power = (x * x).mean((1, 2))
    power = power.clamp(min=1e-3 * float(power.mean()))
    hold = torch.eye(x.shape[2], dtype=x.dtype) * power[:, None, None] * ridge * x.shape[1]
    weight = torch.linalg.solve(x.mT @ x + hold, x.mT @ r)
    return weight, r_mean - x_mean @ weight


def best_of(x, r, held, centred=True, ridges=RIDGES):
    """Return the best correction by its definition: all ridges are tried, on all units."""
    known = {}
    for ridge in (math.inf, *ridges):
        weight, bias = solved(x[:, ~held], r[:, ~held], min(ridge, 1e15), centred)
        left = r[:, held] - x[:, held] @ weight - bias
        known[ridge] = float(left.square().sum()) / max(int(held.sum()), 1)
    ridge = min(known, key=known.get)
    weight = None if ridge == math.inf else solved(x, r, ridge, centred)[0]
    return Correction(weight, ridge, known[ridge])


def close(a, b, tolerance=EXACT):
    return float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1.0)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_a_vanishing_ridge_gives_plain_regression(groups, inputs, outputs, centred, seed):
    x, r = random_rows(groups, 30, inputs, outputs, seed)
    weight = sums_of(x, r, centred).solve(1e-12)
    one = torch.ones(groups, 30, 1, dtype=F64)
    full = torch.linalg.lstsq(torch.cat([x, one], 2) if centred else x, r).solution
    assert close(weight, full[:, :inputs], 1e-6)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.booleans())
def test_batches_add_up(sizes, centred):
    x, r = random_rows(2, sum(sizes) + 1, 3, 2)
    whole, parts = sums_of(x, r, centred), Sums(InputSums(centred))
    for a, b in zip(x.split([*sizes, 1], 1), r.split([*sizes, 1], 1)):
        parts.inputs.add(a)
        parts.add(a, b)
    assert all(close(getattr(parts, name), getattr(whole, name)) for name in ("xr", "rr", "r"))
    assert all(
        close(getattr(parts.inputs, name), getattr(whole.inputs, name)) for name in ["x", "xx"]
    )
    assert parts.inputs.count == whole.inputs.count


@given(st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_error_is_that_of_the_corrected_rows(centred, with_weight, seed):
    x, r = random_rows(2, 40, 3, 2, seed)
    fit, held = sums_of(x[:, :25], r[:, :25], centred), sums_of(x[:, 25:], r[:, 25:], centred)
    weight = fit.solve(0.1) if with_weight else torch.zeros(2, 3, 2, dtype=F64)
    bias = (r[:, :25] - x[:, :25] @ weight).mean(1, keepdim=True) * centred
    expected = (r[:, 25:] - x[:, 25:] @ weight - bias).square().sum((0, 2)).mean()
    assert held.error(fit, weight if with_weight else None) == pytest.approx(float(expected))


@pytest.mark.parametrize("dual", [0, 1])
def test_noise_is_not_fitted_and_a_signal_is(dual):
    x, r = random_rows(1, 60, 40, 2)
    regression = Regression(x, 45, True, dual)
    noise = regression.correct(r, (1e-6, 1e-4), 0.0)
    assert noise.weight is None and math.isinf(noise.ridge)
    truth = torch.randn(1, 40, 2, dtype=F64)
    signal = regression.correct(x @ truth, RIDGES, 0.0)
    assert signal.ridge == 1e-4 and close(signal.weight, truth, 1e-2)
    assert signal.error < 0.01 * noise.error


@given(st.integers(1, 7), st.integers(0, 7), st.integers(0, 3))
def test_the_best_ridge_is_found_downhill(count, least, singular):
    ridges = [10.0**-i for i in range(count)]
    errors = dict(zip(sorted([*ridges, math.inf]), (abs(i - least) + 1.0 for i in range(8))))
    errors |= dict.fromkeys(sorted(ridges)[:singular], math.inf)
    error, ridge = best_ridge(errors.__getitem__, ridges)
    assert error == errors[ridge] == min(errors.values())


def test_ridges_far_from_the_best_are_not_tried():
    tried = []
    best_ridge(lambda ridge: tried.append(ridge) or abs(ridge - 4), range(1, 8))
    assert sorted(tried) == [3, 4, 5, math.inf]


@pytest.mark.parametrize("dual", [0, 1])
@pytest.mark.parametrize("fit", [0, 20])
def test_without_held_out_rows_nothing_is_corrected(dual, fit):
    x, _ = random_rows(1, 20, 3, 2)
    assert Regression(x, fit, True, dual).correct(x[..., :2], RIDGES, 0.0).weight is None


def test_inputs_that_never_vary_get_no_weight():
    x, r = random_rows(2, 20, 3, 2)
    x[0] = 0.75
    weight = sums_of(x, r).solve(1e-3)
    assert bool(weight.isfinite().all()) and float(weight[0].abs().max()) < 1e-6


@given(
    st.integers(1, 3),
    st.integers(1, 60),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 3.0]),
    st.integers(0, 99),
)
def test_both_forms_give_the_same(groups, count, inputs, centred, signal, seed):
    x, r = random_rows(groups, count, inputs, 3, seed)
    r = r + signal * x @ torch.randn(groups, inputs, 3, dtype=F64)
    fit = count - count // 4
    expected = best_of(x, r, torch.arange(count) >= fit, centred)
    primal, dual = (Regression(x, fit, centred, n).correct(r, RIDGES, 0.0) for n in (0, 1))
    assert dual.ridge == primal.ridge
    for found in (primal, dual):
        if fit < count:
            assert expected.error <= found.error * (1 + 1e-6)
        if found.ridge == expected.ridge < math.inf:
            assert close(found.weight, expected.weight, 1e-6)
            assert found.error == pytest.approx(expected.error, rel=1e-6)


@pytest.mark.parametrize("dual", [0, 1])
@pytest.mark.parametrize("noise", [0.3, 3.0, 30.0])
def test_of_many_units_and_equations_the_same_ridge_is_chosen(dual, noise):
    x, r = random_rows(1, 800, 520, 200, 1)
    x = (x @ torch.randn(520, 520, dtype=F64)).float() / 20  # directions of unlike variance
    r = (x.double() @ torch.randn(1, 520, 200, dtype=F64) / 5 + noise * r).float()
    ridges = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    expected = best_of(x.double(), r.double(), torch.arange(800) >= 600, True, ridges)
    found = Regression(x, 600, True, dual).correct(r, ridges, 0.0)
    assert found.ridge == expected.ridge
    assert found.error == pytest.approx(expected.error, rel=1e-3)
    assert (found.weight is None) == (expected.weight is None)
    assert expected.weight is None or close(found.weight.double(), expected.weight, 1e-3)


def test_mixtures_have_the_squares_of_the_units():
    assert mixtures_of(64) is None
    mixtures = mixtures_of(500)
    values = torch.randn(50, 500, generator=torch.Generator().manual_seed(0))
    assert float((values @ mixtures).square().sum() / values.square().sum()) == pytest.approx(
        1, abs=0.1
    )


@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 99))
def test_one_regression_corrects_several_residuals_in_turn(groups, batches, centred, dual, seed):
    x, r = random_rows(groups, 20 * batches, 6, 3, seed)
    held = torch.arange(len(x[0])) >= 15 * batches
    regression = Regression(x, 15 * batches, centred, int(dual))
    for residuals in (r, r.flip(1) + 2 * x[:, :, :3]):
        expected = best_of(x, residuals, held, centred)
        correction = regression.correct(residuals, RIDGES, 0.0)
        assert correction.ridge == expected.ridge
        assert correction.error == pytest.approx(expected.error, rel=1e-6)
        assert expected.weight is None or close(correction.weight, expected.weight, 1e-6)
    assert regression.correct(torch.zeros_like(r), RIDGES, 0.0).weight is None


@given(st.integers(1, 4), st.integers(1, 30))
def test_the_dual_form_may_use_every_nth_row_only(n, seed):
    x, r = random_rows(1, 40, 6, 3, seed)
    fit = len(range(0, 30, n))
    expected = Regression(x[:, ::n], fit, True, 1).correct(r[:, ::n], RIDGES, 0.0)
    correction = Regression(x, 30, True, n).correct(r, RIDGES, 0.0)
    assert correction.ridge == expected.ridge
    assert correction.error == pytest.approx(expected.error)


@pytest.mark.parametrize("groups, inputs", [(1, 3), (1, 256), (1, 300), (2, 300)])
def test_symmetric_products_are_complete(groups, inputs):
    x, _ = random_rows(groups, 20, inputs, 1)
    assert close(products(x), x.mT @ x)


# --- fitting a map --------------------------------------------------------------------------------


@given(maps(), st.booleans())
def test_a_map_is_recovered_from_what_it_computes(case, biased):
    affine, x = case
    affine = affine if biased else replace(affine, bias=None)
    fit = AffineFit(affine, biased=biased)
    for _ in range(8):
        batch = torch.randn(x.shape[0] * 8, *x.shape[1:], dtype=F64)
        fit.add(batch, affine(batch))
    fitted = fit.solve(1e-12)
    assert torch.allclose(fitted.weight, affine.weight, atol=1e-7)
    assert (fitted.bias is None) is not biased
    assert torch.allclose(fitted.offset, affine.offset, atol=1e-7)


def linear(inputs, outputs):
    return Affine(torch.zeros(outputs, inputs, dtype=F64))


@given(st.integers(1, 60), st.integers(1, 3), st.sampled_from([1e-3, 0.1, 3.0]), st.booleans())
def test_the_fit_is_that_of_one_stacked_regression(p, q, ridge, biased):
    rng = np.random.default_rng(p + 10 * q)
    x, y, prior = rng.normal(2, 1, (30, p)), rng.normal(1, 1, (30, q)), rng.normal(size=(q, p))
    fit = AffineFit(linear(p, q), Affine(torch.tensor(prior)), biased)
    for part in (slice(0, 7), slice(7, 8), slice(8, 30)):
        fit.add(torch.tensor(x[part]), torch.tensor(y[part]))
    fitted = fit.solve(ridge)
    centred_x, centred_y = (x - x.mean(0), y - y.mean(0)) if biased else (x, y)
    power = (centred_x**2).mean()
    stacked = np.vstack([centred_x / 30**0.5, (ridge * power) ** 0.5 * np.eye(p)])
    wanted = np.vstack([centred_y / 30**0.5, (ridge * power) ** 0.5 * prior.T])
    truth = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    assert np.allclose(fitted.weight, truth, atol=EXACT)
    bias = y.mean(0) - truth @ x.mean(0) if biased else np.zeros(q)
    assert np.allclose(fitted.offset, bias, atol=EXACT)


def test_batches_of_any_size_give_the_same_fit_even_far_from_zero():
    torch.manual_seed(0)
    x = torch.randn(400, 3, dtype=F64) + 1e4
    y = x @ torch.ones(3, 2, dtype=F64) - 7
    solutions = []
    for size in (400, 37):
        fit = AffineFit(linear(3, 2))
        for a, b in zip(x.split(size), y.split(size)):
            fit.add(a, b)
        fitted = fit.solve(1e-9)
        solutions.append(torch.cat([fitted.weight.flatten(), fitted.bias]))
    assert torch.allclose(*solutions, rtol=1e-7)
    assert torch.allclose(solutions[0][:6], torch.ones(6, dtype=F64), atol=1e-6)


def test_without_information_the_prior_stays():
    prior = Affine(torch.randn(2, 3, dtype=F64))
    x, y = torch.ones(5, 3), torch.randn(5, 2)
    fits = [AffineFit(linear(3, 2), prior), AffineFit(linear(3, 2))]
    for fit in fits:
        fit.add(x, y)
    drawn, free = (fit.solve(1e-3) for fit in fits)
    assert torch.allclose(drawn.weight, prior.weight) and bool(drawn.bias.isfinite().all())
    assert torch.equal(free.weight, torch.zeros(2, 3, dtype=F64))


def test_more_ridge_is_nearer_to_the_prior():
    torch.manual_seed(0)
    affine = Affine(torch.randn(3, 2, 3, 3), torch.randn(3), (1, 1), (1, 1), (1, 1))
    fit = AffineFit(affine, affine)
    fit.add(torch.randn(6, 2, 5, 5), torch.randn(6, 3, 5, 5))
    distances = [float((fit.solve(r).weight - affine.weight).norm()) for r in (1e-6, 0.1, 10, 1e6)]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-5


def test_what_cannot_be_solved_is_refused():
    fit = AffineFit(linear(2, 2))
    with pytest.raises(DataError, match="no rows"):
        fit.solve()
    fit.add(torch.randn(4, 2), torch.randn(4, 2))
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(ArgumentError, match="argument `ridge`"):
            fit.solve(ridge)
    fit.add(torch.full((4, 2), float("inf")), torch.randn(4, 2))
    with pytest.raises(DataError, match="not finite"):
        fit.solve()


@pytest.mark.parametrize("dual_every", [0, 1])
def test_constant_inputs_explain_nothing(dual_every):
    """Their products vary by rounding, which a small ridge would divide by."""
    x, r = torch.full((1, 120, 3), 1.3), torch.randn(1, 120, 2)
    correction = Regression(x, 90, True, dual_every).correct(r, (1e-6, 1e-2), 0.0)
    assert correction.weight is None or not correction.weight.any()
    x[..., 0] += torch.randn(1, 120)
    correction = Regression(x, 90, True, dual_every).correct(r + x[..., :1], (1e-6, 1e-2), 0.0)
    assert correction.weight is not None and float(correction.weight.abs().max()) < 1.5
