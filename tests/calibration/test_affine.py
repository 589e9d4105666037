"""."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxfuse.calibration.affine import (
    Affine,
    compose,
    exact_everywhere,
    read_producer,
    restate,
    write_producer,
)
from fxfuse.calibration.data import Calibration
from fxfuse.errors import ArgumentError, PassError
from fxfuse.graph.passes import canonical
from fxfuse.graph.state import tensor_at
from fxfuse.graph.trace import trace
from fxfuse.graph.verify import lint
from fxfuse.spaces.network import Network
from tests.support.nets import Twice, conv, mlp, outputs, randomise, values
from tests.support.tolerances import EXACT, FUNCTION


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


torch.manual_seed(0)  # of what is drawn while the tests are collected


VECTORS, IMAGES = torch.randn(40, 6), torch.randn(20, 4, 8, 8)


class Turned(nn.Module):
    """A weight that is stored the other way round."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(6, 6)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return x @ self.weight


def network(net, data):
    module = canonical(trace(randomise(net)), (data[:2],))
    return Network.of("net", module, (data[:2],))


def reading(net, data, at=0):
    found = network(net, data)
    nodes = [n for n in found.module.graph.nodes if n.name in found.book.weights]
    return found, read_producer(found, nodes[at])


READABLE = {
    "linear": (lambda: mlp(6, 5, 3), VECTORS),
    "linear and norm": (lambda: mlp(6, 5, 3, norm=True), VECTORS),
    "linear without bias": (lambda: mlp(6, 5, 3, bias=False), VECTORS),
    "of tokens": (lambda: nn.Linear(6, 5), torch.randn(8, 3, 6)),
    "turned": (Turned, VECTORS),
    "convolution": (lambda: conv(4, 6, norm=False, stride=2), IMAGES),
    "convolution and norm": (lambda: conv(4, 6), IMAGES),
    "grouped": (lambda: conv(4, 6, groups=2), IMAGES),
    "depthwise": (lambda: conv(4, 4, groups=4, bias=True), IMAGES),
    "dilated": (lambda: nn.Conv2d(4, 5, 3, padding="same", dilation=2), IMAGES),
    "one axis": (lambda: nn.Conv1d(6, 5, 3), torch.randn(8, 6, 9)),
    "norm without affine part": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)),
        IMAGES,
    ),
}


@pytest.mark.parametrize("name", READABLE)
def test_a_producer_is_the_map_its_nodes_compute(name):
    make, data = READABLE[name]
    found, producer = reading(make(), data)
    value = values(found.module, data)[producer.joint].double()
    reads = data.double()
    assert float((producer.affine(reads) - value).abs().max()) <= FUNCTION * float(value.max())
    assert (producer.norm is not None) is ("norm" in name or name in ("grouped", "depthwise"))


@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize("wider", [0, 2])
def test_another_map_is_computed_once_it_is_written(name, wider):
    make, data = READABLE[name]
    found, producer = reading(make(), data)
    old = producer.affine
    shape = (old.outputs + wider, *old.weight.shape[1:])
    groups = 1 if wider and old.groups > 1 else old.groups
    if groups != old.groups:
        pytest.skip("another number of groups is another layer")
    weight = torch.randn(shape, dtype=torch.float64)
    bias = torch.randn(shape[0], dtype=torch.float64) if producer.biased else None
    steps = old.stride, old.padding, old.dilation
    wanted = Affine(weight, bias, *steps, groups)
    write_producer(found, producer, wanted)
    for again in range(2):
        truth = wanted(data.double())
        value = values_until(found, producer.joint, data)
        assert float((truth - value).abs().max()) <= FUNCTION * float(truth.abs().max()), again
        restate(found, producer, Calibration(data))
    part = found.module.get_submodule(producer.weight.rpartition(".")[0])
    if not isinstance(part, type(found.module)):
        lint_one(part)


def values_until(found, name, data):
    """Run up to a node: what comes behind may have other widths."""
    from fxfuse.calibration.run import record

    return record(found, (data,), {name: lambda v: v.double()})[name]


def lint_one(part):
    from fxfuse.graph.state import sizes_of

    assert all(getattr(part, name) == size for name, size in sizes_of(part).items())


def test_restated_norms_hold_the_statistics_of_what_they_read():
    found, producer = reading(conv(4, 6), IMAGES)
    write_producer(found, producer, producer.affine)
    before = outputs(found.module, IMAGES)
    restate(found, producer, Calibration(IMAGES))
    read = values(found.module, IMAGES)[producer.node].double()
    mean, variance = (
        tensor_at(found.module, str(producer.roles[r])) for r in ("running_mean", "running_var")
    )
    assert torch.allclose(mean.double(), read.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(variance.double(), read.var((0, 2, 3), correction=0), rtol=1e-4)
    assert torch.allclose(before, outputs(found.module, IMAGES), atol=1e-5)
    lint(found.module)


def test_a_bias_without_a_place_is_refused():
    found, producer = reading(mlp(6, 5, 3, bias=False), VECTORS)
    assert not producer.biased
    wanted = Affine(producer.affine.weight, torch.ones(5, dtype=torch.float64))
    with pytest.raises(PassError, match="no place"):
        write_producer(found, producer, wanted)


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), IMAGES),
        (lambda: nn.ConvTranspose2d(4, 5, 3), IMAGES),
        (lambda: Twice(4), IMAGES),
        (lambda: nn.GRU(6, 5, batch_first=True), torch.randn(8, 3, 6)),
    ],
)
def test_what_is_no_single_map_is_none(make, data):
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = make()

        def forward(self, x):
            out = self.part(x)
            return out[0] if isinstance(out, tuple) else out

    assert reading(Called(), data)[1] is None


def test_a_norm_that_others_read_around_is_not_folded():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) + x

    _, producer = reading(Beside(), IMAGES)
    assert producer.norm is None and producer.joint == producer.node
    assert float((producer.affine.offset - 0).abs().max()) > EXACT
