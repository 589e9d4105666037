import pytest
import torch
from conftest import EXACT, FUNCTION
from nets import Twice, conv, mlp, outputs, randomise, values
from torch import nn

from fxfuse.canonical import canonical
from fxfuse.checks import lint
from fxfuse.composition import Affine
from fxfuse.data import Calibration
from fxfuse.errors import PassError
from fxfuse.network import Network
from fxfuse.producer import read_producer, restate, tensor_at, write_producer
from fxfuse.tracing import trace

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
    from fxfuse.statistics import record

    return record(found, (data,), {name: lambda v: v.double()})[name]


def lint_one(part):
    from fxfuse.checks import sizes_of

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
