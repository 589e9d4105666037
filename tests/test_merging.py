import pytest
import torch
from conftest import FUNCTION
from nets import Pooled, conv, gap, mlp, outputs, randomise, residual, stages
from test_removal import layers_of, plan
from torch import nn

from fxfuse import gates
from fxfuse.data import Calibration
from fxfuse.errors import PassError
from fxfuse.merging import Merging
from fxfuse.network import Network
from fxfuse.removal import remove
from fxfuse.tracing import trace

torch.manual_seed(0)  # of what is drawn while the tests are collected
VECTORS, IMAGES = torch.randn(200, 6), torch.randn(20, 3, 8, 8)


def merged(net, data, at, gate):
    found = Network.of("net", trace(net), (data[:2],))
    strategy = Merging(gate, Calibration(data))
    return remove(found.module, found.example, found, plan(found, at), strategy)


def open_net(norm=False):
    """A perceptron whose second and third layer are always active."""
    net = randomise(mlp(6, 8, 7, 5, 3, norm=norm))
    for module in net[2 if not norm else 3 : -1]:
        if isinstance(module, nn.BatchNorm1d if norm else nn.Linear):
            module.bias.data.fill_(60.0)
    return net


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("at", [[1], [2], [1, 2]])
@pytest.mark.parametrize("gate", [gates.sign_of_sum, gates.majority_vote, gates.line])
def test_layers_that_are_always_active_merge_exactly(norm, at, gate):
    net = open_net(norm)
    shorter = merged(net, VECTORS, at, gate)
    assert gap(net, shorter, VECTORS) <= FUNCTION
    assert len(layers_of(Network.of("", shorter, (VECTORS[:2],)))) == 4 - len(at)


def test_merging_multiplies_the_matrices_as_the_paper_says():
    net = randomise(mlp(6, 8, 7, 3, bias=False))
    net[4].bias = None
    shorter = merged(net, VECTORS, [1], gates.sign_of_sum)
    z = torch.relu(VECTORS @ net[0].weight.T) @ net[2].weight.T
    truth = net[4].weight @ torch.diag((z.sum(0) >= 0).float()) @ net[2].weight
    assert torch.allclose(shorter.get_submodule("4").weight, truth, atol=1e-6)


def test_biases_are_composed():
    net = randomise(mlp(6, 8, 7, 3))
    shorter = merged(net, VECTORS, [1], gates.average_of_signs)
    z = net[2](torch.relu(net[0](VECTORS)))
    share = (z > 0).double().mean(0).float()
    truth = net[4].bias + net[4].weight @ (share * net[2].bias)
    assert torch.allclose(shorter.get_submodule("4").bias, truth, atol=1e-6)


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Tanh])
def test_the_line_is_the_best_of_the_gates(act):
    net = randomise(mlp(6, 16, 16, 16, 3, act=act), 3)
    errors = {}
    for gate in (gates.sign_of_sum, gates.average_of_signs, gates.line):
        if act is nn.ReLU or gate is gates.line:
            shorter = merged(net, VECTORS, [1], gate)
            errors[gate] = float((outputs(net, VECTORS) - outputs(shorter, VECTORS)).norm())
    assert min(errors, key=errors.get) is gates.line
    assert errors[gates.line] < 0.5 * float(outputs(net, VECTORS).norm())


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh])
def test_gates_by_sign_need_a_rectifier(act):
    with pytest.raises(PassError, match="no rectifier"):
        merged(randomise(mlp(6, 8, 7, 3, act=act)), VECTORS, [1], gates.sign_of_sum)


def test_convolutions_merge_where_the_kernel_fits():
    parts = [conv(3, 4), conv(4, 6, 1, act=False, bias=True), conv(6, 5), Pooled(5, 3)]
    parts[2][0].padding = (0, 0)  # at padded borders a composite would not be exact
    net = randomise(nn.Sequential(*parts))
    assert gap(net, merged(net, IMAGES, [1], gates.line), IMAGES) <= FUNCTION


REFUSED = {
    "they need a kernel of 5x5": (lambda: stages([4, 4, 4]), [1]),
    "pooling or flattening": (lambda: stages([4, 4], [4]), [1]),
    "is a block": (lambda: residual((6, 3)), [2]),
    "more than contract": (
        lambda: nn.Sequential(
            conv(3, 4, 1),
            conv(4, 4, 1, norm=False, act=False),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            conv(4, 4, 1),
            Pooled(4, 3),
        ),
        [1],
    ),
    "no single contraction": (
        lambda: nn.Sequential(
            conv(3, 4, 1),
            nn.Conv2d(4, 4, 1, 1, 1, padding_mode="circular"),
            conv(4, 4, 1),
            Pooled(4, 3),
        ),
        [1],
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_merge_is_refused_with_the_reason(reason):
    make, at = REFUSED[reason]
    with pytest.raises(PassError, match=reason) as caught:
        merged(randomise(make()), IMAGES, at, gates.line)
    assert "least squares" in caught.value.do


def test_an_offset_needs_a_bias_to_go_to():
    net = randomise(mlp(6, 8, 7, 3, bias=False))
    net[4].bias = None
    with pytest.raises(PassError, match="no place"):
        merged(net, VECTORS, [1], gates.line)
    assert gap(net, merged(net, VECTORS, [1], gates.line_through_zero), VECTORS) < 1
