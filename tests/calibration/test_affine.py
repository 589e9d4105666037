"""Affine maps: two in a row as one, and maps that are scaled."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.calibration.affine import Affine, compose
from fxfuse.errors import ArgumentError
from tests.support.tolerances import EXACT


def close(a, b):
    return bool((a - b).abs().max() <= EXACT * max(float(a.abs().max()), 1.0))


@st.composite
def convolutions(draw, n, inputs=None):
    """Return a convolution over `n` axes with a random geometry, in float64."""
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel = [draw(st.integers(1, 3)) for _ in range(n)]
    geometry = [[draw(st.integers(low, 2)) for _ in range(n)] for low in (1, 0, 1)]
    bias = draw(st.booleans())
    outputs = 4 * draw(st.integers(1, 2))
    inputs = inputs or 4 * draw(st.integers(1, 2))
    torch.manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(outputs, inputs // groups, *kernel, dtype=torch.float64)
    offset = torch.randn(outputs, dtype=torch.float64) if bias else None
    return Affine(weight, offset, *map(tuple, geometry), groups)


@st.composite
def pairs(draw):
    n = draw(st.integers(1, 2))
    first = draw(convolutions(n))
    return first, draw(convolutions(n, first.outputs))


def both(first, second):
    """Return what a pair of maps gives for random inputs, and what their composite gives."""
    x = torch.randn(2, first.inputs, *[17] * len(first.kernel), dtype=torch.float64)
    return second(first(x)), compose(first, second)(x)


def interior(y, second):
    """Return outputs without those near the border that the padding of the second map reaches."""
    for axis, (p, s) in enumerate(zip(second.padding, second.stride)):
        border = -(-p // s)
        y = y.narrow(2 + axis, border, max(y.shape[2 + axis] - 2 * border, 0))
    return y


@given(pairs())
def test_two_convolutions_are_one_inside_the_border(pair):
    outputs = both(*pair)
    assert outputs[0].shape == outputs[1].shape
    inside = [interior(y, pair[1]) for y in outputs]
    assert not inside[0].numel() or close(*inside)


def random_map(inputs, outputs, kernel=(), stride=1, padding=0, groups=1, dilation=1, bias=True):
    """Return a linear map or convolution with random weights in float64."""
    weight = torch.randn(outputs, inputs // groups, *kernel, dtype=torch.float64)
    offset = torch.randn(outputs, dtype=torch.float64) if bias else None
    geometry = ((step,) * len(kernel) for step in (stride, padding, dilation))
    return Affine(weight, offset, *geometry, groups)


def test_without_padding_in_the_second_they_are_equal_everywhere():
    first = random_map(4, 6, (3, 3), stride=2, padding=1, groups=2)
    second = random_map(6, 4, (3, 3), stride=2, groups=2)
    pair, one = both(first, second)
    composite = compose(first, second)
    assert composite.groups == 2 and composite.kernel == (7, 7) and composite.stride == (4, 4)
    assert close(pair, one)


def test_depthwise_and_pointwise_become_one_dense_convolution():
    first, second = random_map(6, 6, (3,), padding=1, groups=6), random_map(6, 8, (1,))
    composite = compose(first, second)
    assert composite.groups == 1 and composite.kernel == (3,)
    pair, one = both(first, second)
    assert close(pair, one)


def test_a_dilated_kernel_behind_a_pointwise_one_keeps_its_size():
    first, second = random_map(3, 4, (1, 1)), random_map(4, 5, (3, 3), padding=2, dilation=2)
    composite = compose(first, second)
    assert (composite.kernel, composite.dilation) == ((3, 3), (2, 2))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans())
def test_linear_maps_compose_exactly(a, b, c, first_bias, second_bias):
    first, second = random_map(a, b, bias=first_bias), random_map(b, c, bias=second_bias)
    x = torch.randn(3, 2, a, dtype=torch.float64)
    composite = compose(first, second)
    assert (composite.bias is not None) is (first_bias or second_bias)
    assert close(second(first(x)), composite(x))


def test_units_are_scaled_and_shifted():
    linear = random_map(3, 4)
    scale, shift = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    assert close(scale * linear(x) + shift, linear.scaled(scale, shift)(x))


def test_maps_that_do_not_follow_on_each_other_are_refused():
    with pytest.raises(ArgumentError, match="compose"):
        compose(random_map(3, 4), random_map(3, 4))
    with pytest.raises(ArgumentError, match="compose"):
        compose(random_map(3, 4, (1, 1)), random_map(4, 4))
