import pytest
import torch
from conftest import EXACT
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxfuse.composition import Affine, compose, exact_everywhere
from fxfuse.errors import ArgumentError


def close(a, b):
    return bool((a - b).abs().max() <= EXACT * max(float(a.abs().max()), 1.0))


@st.composite
def convolutions(draw, n, inputs=None):
    """Return a convolution of `n` place axes with a random geometry, in float64."""
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel = [draw(st.integers(1, 3)) for _ in range(n)]
    steps = [[draw(st.integers(low, 2)) for _ in range(n)] for low in (1, 0, 1)]
    bias = draw(st.booleans())
    outputs = 4 * draw(st.integers(1, 2))
    inputs = inputs or 4 * draw(st.integers(1, 2))
    torch.manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(outputs, inputs // groups, *kernel, dtype=torch.float64)
    offset = torch.randn(outputs, dtype=torch.float64) if bias else None
    return Affine(weight, offset, *map(tuple, steps), groups)


@st.composite
def pairs(draw):
    n = draw(st.integers(1, 2))
    first = draw(convolutions(n))
    return first, draw(convolutions(n, first.outputs))


def both(first, second):
    x = torch.randn(2, first.inputs, *[17] * len(first.kernel), dtype=torch.float64)
    return x, second(first(x)), compose(first, second)(x)


def interior(y, second):
    """Leave out the rings that the padding of the second map reaches."""
    for axis, (p, s) in enumerate(zip(second.padding, second.stride)):
        ring = -(-p // s)
        y = y.narrow(2 + axis, ring, max(y.shape[2 + axis] - 2 * ring, 0))
    return y


@given(pairs())
def test_two_convolutions_are_one_inside_the_border(pair):
    _, truth, found = both(*pair)
    assert truth.shape == found.shape
    inside = interior(truth, pair[1]), interior(found, pair[1])
    assert not inside[0].numel() or close(*inside)


@given(pairs())
def test_what_is_said_to_be_exact_at_borders_is(pair):
    x, truth, found = both(*pair)
    if exact_everywhere(*pair, tuple(x.shape[2:])):
        assert close(truth, found)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size", "bias", "exact"),
    [
        (1, 1, 0, 6, False, True),  # beyond the border there is nothing to see
        (1, 1, 0, 6, True, False),  # but a bias
        (3, 1, 1, 6, False, False),  # a window that starts outside sees the first pixel
        (3, 2, 1, 7, False, True),
        (3, 2, 1, 6, False, False),  # on the right it depends on the size
        (5, 2, 2, 6, False, False),
    ],
)
def test_exactness_at_borders_where_the_second_pads(kernel, stride, padding, size, bias, exact):
    torch.manual_seed(0)
    first = Affine.of(nn.Conv2d(3, 4, kernel, stride, padding, bias=bias).double())
    second = Affine.of(nn.Conv2d(4, 5, 3, 1, 1).double())
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    assert exact_everywhere(first, second, (size, size)) is exact
    assert close(second(first(x)), compose(first, second)(x)) is exact


def test_without_padding_in_the_second_they_are_equal_everywhere():
    first = Affine.of(nn.Conv2d(4, 6, 3, 2, 1, groups=2).double())
    second = Affine.of(nn.Conv2d(6, 4, 3, 2, 0, groups=2).double())
    x = torch.randn(2, 4, 15, 14, dtype=torch.float64)
    composite = compose(first, second)
    assert composite.groups == 2 and composite.kernel == (7, 7) and composite.stride == (4, 4)
    assert exact_everywhere(first, second, (15, 14))
    assert close(second(first(x)), composite(x))


def test_depthwise_and_pointwise_become_one_dense_convolution():
    first = Affine.of(nn.Conv1d(6, 6, 3, padding=1, groups=6).double())
    second = Affine.of(nn.Conv1d(6, 8, 1).double())
    composite = compose(first, second)
    assert composite.groups == 1 and composite.kernel == (3,)
    x = torch.randn(2, 6, 9, dtype=torch.float64)
    assert close(second(first(x)), composite(x))


def test_a_dilated_kernel_behind_a_pointwise_one_stays_as_small_as_it_is():
    first, second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=2, dilation=2)
    composite = compose(Affine.of(first), Affine.of(second))
    assert (composite.kernel, composite.dilation) == ((3, 3), (2, 2))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans())
def test_linear_layers_compose_exactly(a, b, c, first_bias, second_bias):
    first = Affine.of(nn.Linear(a, b, bias=first_bias).double())
    second = Affine.of(nn.Linear(b, c, bias=second_bias).double())
    x = torch.randn(3, 2, a, dtype=torch.float64)
    composite = compose(first, second)
    assert (composite.bias is not None) is (first_bias or second_bias)
    assert close(second(first(x)), composite(x)) and exact_everywhere(first, second)


def test_scaling_and_shifting_units():
    linear = Affine.of(nn.Linear(3, 4).double())
    scale, shift = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    assert close(scale * linear(x) + shift, linear.scaled(scale, shift)(x))


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.ConvTranspose2d(3, 4, 3),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 4, 3, padding="same"),
    ],
)
def test_other_modules_are_refused(module):
    with pytest.raises(ArgumentError, match="argument `module`"):
        Affine.of(module)


def test_maps_that_do_not_follow_on_each_other_are_refused():
    with pytest.raises(ArgumentError, match="compose"):
        compose(Affine.of(nn.Linear(3, 4)), Affine.of(nn.Linear(3, 4)))
    with pytest.raises(ArgumentError, match="compose"):
        compose(Affine.of(nn.Conv2d(3, 4, 1)), Affine.of(nn.Linear(4, 4)))
