"""Contractions read as affine maps, with the norm behind them, and written back."""

import pytest
import torch
from torch import nn

from fxfuse.calibration.affine import Affine
from fxfuse.calibration.data import Calibration
from fxfuse.calibration.producers import read_producer, restate, write_producer
from fxfuse.calibration.run import record
from fxfuse.errors import PassError
from fxfuse.graph.canonical import canonical
from fxfuse.graph.state import sizes_of, tensor_at
from fxfuse.graph.trace import trace
from fxfuse.graph.verify import lint
from fxfuse.spaces.network import Network
from tests.support.nets import Twice, conv, mlp, outputs, randomise, values
from tests.support.tolerances import EXACT, FUNCTION

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
