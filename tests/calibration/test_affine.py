"""Affine maps: two in a row as one, and maps that are scaled."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxfuse.calibration.affine import Affine, compose, read_producer, restate, write_producer
from fxfuse.calibration.data import Calibration
from fxfuse.calibration.run import record
from fxfuse.errors import ArgumentError, PassError
from fxfuse.graph.passes import canonical
from fxfuse.graph.state import sizes_of, tensor_at
from fxfuse.graph.trace import trace
from fxfuse.graph.verify import lint
from fxfuse.spaces.network import Network
from tests.support.nets import Twice, conv, mlp, outputs, randomise, values
from tests.support.tolerances import EXACT, FUNCTION


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


torch.manual_seed(0)  # of what is drawn while the tests are collected
VECTORS, IMAGES = torch.randn(40, 6), torch.randn(20, 4, 8, 8)


class Transposed(nn.Module):
    """A weight that is stored as `(in, out)`."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(6, 6)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return x @ self.weight


def first_producer(net, data):
    """Return a network and its first contraction as a producer."""
    module = canonical(trace(randomise(net)), (data[:2],))
    network = Network.of("net", module, (data[:2],))
    node = next(n for n in module.graph.nodes if n.name in network.weights)
    return network, read_producer(network, node)


READABLE = {
    "linear": (lambda: mlp(6, 5, 3), VECTORS),
    "linear and norm": (lambda: mlp(6, 5, 3, norm=True), VECTORS),
    "linear without bias": (lambda: mlp(6, 5, 3, bias=False), VECTORS),
    "of tokens": (lambda: nn.Linear(6, 5), torch.randn(8, 3, 6)),
    "transposed": (Transposed, VECTORS),
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
def test_a_producer_is_the_map_that_its_nodes_compute(name):
    make, data = READABLE[name]
    network, producer = first_producer(make(), data)
    value = values(network.module, data)[producer.joint].double()
    error = (producer.affine(data.double()) - value).abs().max()
    assert float(error) <= FUNCTION * float(value.max())
    assert (producer.norm is not None) is ("norm" in name or name in ("grouped", "depthwise"))


@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize("wider", [0, 2])
def test_a_map_that_was_written_is_computed_before_and_after_its_norm_gets_statistics(name, wider):
    make, data = READABLE[name]
    network, producer = first_producer(make(), data)
    old = producer.affine
    if wider and old.groups > 1:
        pytest.skip("another width needs another number of groups, which is another layer")
    weight = torch.randn(old.outputs + wider, *old.weight.shape[1:], dtype=torch.float64)
    bias = torch.randn(len(weight), dtype=torch.float64) if producer.biased else None
    wanted = Affine(weight, bias, old.stride, old.padding, old.dilation, old.groups)
    write_producer(network, producer, wanted)
    for statistics in (False, True):
        if statistics:
            restate(network, producer, Calibration(data))
        truth = wanted(data.double())
        # only up to this node: what comes behind may have other widths
        value = record(network, (data,), {producer.joint: torch.Tensor.double})[producer.joint]
        assert float((truth - value).abs().max()) <= FUNCTION * float(truth.abs().max())
    owner = network.module.get_submodule(producer.weight.rpartition(".")[0])
    assert all(getattr(owner, name) == size for name, size in sizes_of(owner).items())


def test_a_restated_norm_has_the_statistics_of_what_it_reads():
    network, producer = first_producer(conv(4, 6), IMAGES)
    write_producer(network, producer, producer.affine)
    before = outputs(network.module, IMAGES)
    restate(network, producer, Calibration(IMAGES))
    read = values(network.module, IMAGES)[producer.node].double()
    mean, variance = (
        tensor_at(network.module, str(producer.roles[r])) for r in ("running_mean", "running_var")
    )
    assert torch.allclose(mean.double(), read.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(variance.double(), read.var((0, 2, 3), correction=0), rtol=1e-4)
    assert torch.allclose(before, outputs(network.module, IMAGES), atol=1e-5)
    lint(network.module)


def test_a_bias_that_cannot_be_stored_is_refused():
    network, producer = first_producer(mlp(6, 5, 3, bias=False), VECTORS)
    assert not producer.biased
    wanted = Affine(producer.affine.weight, torch.ones(5, dtype=torch.float64))
    with pytest.raises(PassError, match="cannot be stored"):
        write_producer(network, producer, wanted)


class Called(nn.Module):
    """Calls a part and returns its first output."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        out = self.part(x)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), IMAGES),
        (lambda: nn.ConvTranspose2d(4, 5, 3), IMAGES),
        (lambda: Twice(4), IMAGES),
        (lambda: nn.GRU(6, 5, batch_first=True), torch.randn(8, 3, 6)),
    ],
)
def test_a_contraction_that_is_no_single_affine_map_is_not_read(make, data):
    assert first_producer(Called(make()), data)[1] is None


def test_a_norm_is_not_folded_if_something_else_reads_its_contraction():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) + x

    _, producer = first_producer(Beside(), IMAGES)
    assert producer.norm is None and producer.joint == producer.node
    assert float(producer.affine.offset.abs().max()) > EXACT
