"""The correction of weights: against plain regressions, and what the held-out samples decide.

Positions: drawn evenly, each sample on one side; rows there against the whole."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.calibration.affine import Affine
from fxfuse.calibration.least_squares import (
    NormalEquations,
    Refit,
    Regression,
    Sums,
    corrected,
    corrected_from_rows,
    patches,
    products,
    reads_at,
    rows,
    rows_as_weight,
    rows_at,
    sample,
    units_as_rows,
    weight_as_rows,
)
from fxfuse.errors import ArgumentError, DataError
from tests.support.tolerances import EXACT

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


F64 = torch.float64


@st.composite
def maps(draw):
    """Return a linear map or convolution and an input for it."""
    n = draw(st.integers(0, 3))
    groups = draw(st.sampled_from([1, 2])) if n else 1
    kernel = [draw(st.integers(1, 3)) for _ in range(n)]
    steps = [[draw(st.integers(low, 2)) for _ in range(n)] for low in (1, 0, 1)]
    torch.manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(4, draw(st.integers(1, 2)), *kernel, dtype=F64)
    affine = Affine(weight, torch.randn(4, dtype=F64), *map(tuple, steps), groups)
    shape = (3, affine.inputs, *[6, 7, 5][:n]) if n else (3, 5, affine.inputs)
    return affine, torch.randn(shape, dtype=F64)


@given(maps())
def test_patches_are_what_each_output_sees(case):
    affine, x = case
    seen = patches(x, affine)
    weight = affine.weight.flatten(1).unflatten(0, (affine.groups, -1))
    bias = affine.offset.view(affine.groups, 1, -1)
    assert torch.allclose(seen @ weight.mT + bias, rows(affine(x), affine), atol=EXACT)


@given(maps(), st.booleans())
def test_a_map_is_found_again_from_what_it_computes(case, bias):
    affine, _ = case
    affine = affine if bias else Affine(affine.weight, None, *geometry(affine))
    refit = Refit(affine)
    for _ in range(8):
        x = torch.randn(case[1].shape[0] * 8, *case[1].shape[1:], dtype=F64)
        refit.add(x, affine(x))
    found = refit.solve(1e-12, bias=bias)
    assert torch.allclose(found.weight, affine.weight, atol=1e-7)
    assert (found.bias is None) is not bias
    assert torch.allclose(found.offset, affine.offset, atol=1e-7)


def geometry(affine):
    return affine.stride, affine.padding, affine.dilation, affine.groups


@given(st.integers(1, 60), st.integers(1, 3), st.sampled_from([1e-3, 0.1, 3.0]), st.booleans())
def test_the_solution_is_that_of_one_stacked_regression(p, q, ridge, bias):
    rng = np.random.default_rng(p + 10 * q)
    x, y, prior = rng.normal(2, 1, (30, p)), rng.normal(1, 1, (30, q)), rng.normal(size=(q, p))
    equations = NormalEquations()
    for part in (slice(0, 7), slice(7, 8), slice(8, 30)):
        equations.add(torch.tensor(x[None, part]), torch.tensor(y[None, part]))
    found, offset = equations.solve(ridge, torch.tensor(prior)[None], bias)
    centred, aimed = (x - x.mean(0), y - y.mean(0)) if bias else (x, y)
    power = (centred**2).mean()
    stacked = np.vstack([centred / 30**0.5, (ridge * power) ** 0.5 * np.eye(p)])
    wanted = np.vstack([aimed / 30**0.5, (ridge * power) ** 0.5 * prior.T])
    truth = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    assert np.allclose(found[0], truth, atol=EXACT)
    shift = y.mean(0) - truth @ x.mean(0) if bias else np.zeros(q)
    assert np.allclose(offset[0], shift, atol=EXACT)


def test_batches_of_any_size_give_the_same_and_offsets_do_not_hurt():
    torch.manual_seed(0)
    x = torch.randn(1, 400, 3, dtype=F64) + 1e4
    y = x @ torch.ones(1, 3, 2, dtype=F64) - 7
    solutions = []
    for size in (400, 37):
        equations = NormalEquations()
        for a, b in zip(x.split(size, 1), y.split(size, 1)):
            equations.add(a, b)
        solutions.append(torch.cat([t.flatten() for t in equations.solve(1e-9)]))
    assert torch.allclose(*solutions, rtol=1e-7)
    assert torch.allclose(solutions[0][:6], torch.ones(6, dtype=F64), atol=1e-6)


def test_without_information_the_prior_stays():
    equations, prior = NormalEquations(), torch.randn(1, 2, 3, dtype=F64)
    equations.add(torch.ones(1, 5, 3), torch.randn(1, 5, 2))
    weight, bias = equations.solve(1e-3, prior)
    assert torch.allclose(weight, prior) and bool(bias.isfinite().all())
    assert torch.equal(equations.solve(1e-3)[0], torch.zeros(1, 2, 3, dtype=F64))


def test_more_ridge_is_nearer_to_the_prior():
    torch.manual_seed(0)
    affine = Affine(torch.randn(3, 2, 3, 3), torch.randn(3), (1, 1), (1, 1), (1, 1))
    refit, x = Refit(affine), torch.randn(6, 2, 5, 5)
    refit.add(x, torch.randn(6, 3, 5, 5))
    far = [
        float((refit.solve(r, affine).weight - affine.weight).norm()) for r in (1e-6, 0.1, 10, 1e6)
    ]
    assert far == sorted(far, reverse=True) and far[-1] < 1e-5


def test_what_cannot_be_solved_is_refused():
    equations = NormalEquations()
    with pytest.raises(DataError, match="no rows"):
        equations.solve()
    equations.add(torch.randn(1, 4, 2), torch.randn(1, 4, 2))
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(ArgumentError, match="argument `ridge`"):
            equations.solve(ridge)
    equations.add(torch.full((1, 4, 2), float("inf")), torch.randn(1, 4, 2))
    with pytest.raises(DataError, match="not finite"):
        equations.solve()


@given(
    st.integers(1, 50), st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 900)
)
def test_positions_are_drawn_evenly_and_samples_are_held_out_whole(places, sizes, wanted):
    found, seen = sample(places, sizes, wanted), 0
    total, count = places * sum(sizes), sum(map(len, found.at))
    assert abs(count - min(wanted, total)) <= len(sizes)
    for size, at, fit in zip(sizes, found.at, found.fit):
        assert at.numel() == 0 or (int(at.min()) >= 0 and int(at.max()) < places * size)
        held = (seen + at // places) % 4 == 3
        assert not held[:fit].any() and held[fit:].all()
        order = at.sort()[0]
        if len(at) > 1:  # neighbours are at most two stretches apart
            assert int(order.diff().max()) <= 2 * places * size / len(at) + 1
        seen += size
    if wanted >= total:
        assert all(len(set(at.tolist())) == places * size for at, size in zip(found.at, sizes))


def test_rows_of_batches_are_joined_with_those_to_fit_on_first():
    found = sample(2, [4, 3, 5], 24)
    rows = [at[:, None] + 100 * i for i, at in enumerate(found.at)]
    joined = found.joined(rows)
    fit = sum(found.fit)
    assert torch.equal(joined[:fit], torch.cat([r[:n] for r, n in zip(rows, found.fit)]))
    assert torch.equal(joined[fit:], torch.cat([r[n:] for r, n in zip(rows, found.fit)]))
    assert torch.equal(found.joined([r[None] for r in rows])[0], joined)


@given(maps(), st.lists(st.integers(0, 1000), max_size=9))
def test_rows_are_what_a_map_reads_and_gives_at_their_positions(case, at):
    affine, x = case
    y = affine(x)
    whole = rows(y, affine)
    at = torch.tensor(at, dtype=torch.long) % whole.shape[1]
    given = units_as_rows(rows_at(y, 1 if affine.kernel else -1, at), affine.groups)
    assert torch.equal(given, whole[:, at])
    seen = reads_at(x, affine, at)
    assert torch.equal(seen.sort(2)[0], patches(x, affine)[:, at].sort(2)[0])
    found = seen @ weight_as_rows(affine.weight, affine) + affine.offset.view(affine.groups, 1, -1)
    assert torch.allclose(found, given, atol=EXACT)


@given(maps())
def test_a_weight_comes_back_from_its_rows(case):
    affine, _ = case
    assert torch.equal(rows_as_weight(weight_as_rows(affine.weight, affine), affine), affine.weight)
