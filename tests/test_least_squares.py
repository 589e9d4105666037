import numpy as np
import pytest
import torch
from conftest import EXACT
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxfuse.composition import Affine
from fxfuse.errors import ArgumentError, DataError
from fxfuse.least_squares import NormalEquations, Refit, patches, rows

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
    affine = Affine.of(nn.Conv2d(2, 3, 3, padding=1))
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
