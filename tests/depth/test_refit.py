"""Layers removed while neighbours are refitted."""

import numpy as np
import pytest
import torch
from torch import nn

from fxfuse.calibration.data import Calibration
from fxfuse.depth import fitted_line
from fxfuse.depth._refit import RefitNeighbour
from fxfuse.errors import PassError
from fxfuse.graph.trace import trace
from tests.support.nets import (
    Grown,
    Inverted,
    Pooled,
    Tokens,
    conv,
    gap,
    mlp,
    outputs,
    randomise,
    residual,
    stages,
    values,
)
from tests.support.removals import layers_of, merged, network_of, removed
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION

torch.manual_seed(0)  # of what is drawn while the tests are collected

VECTORS, IMAGES = torch.randn(300, 6), torch.randn(40, 3, 8, 8)


def refitted(net, data, at, ridge=1e-6, **options):
    return removed(network_of(net, data), at, RefitNeighbour(Calibration(data), ridge, **options))


def error(net, other, data):
    a, b = outputs(net, data), outputs(other, data)
    return float((a - b).norm() / a.norm())


def unit(net, name):
    return [n for n in trace(net).graph.nodes if n.op == "call_module" and n.target == name][0].name


def test_the_next_plain_layer_is_the_least_squares_fit_to_its_own_pre_activation():
    net = randomise(mlp(6, 8, 7, 5, 3))
    shorter = refitted(net, VECTORS, [1], 1e-9, rounds=0, reach=0)
    z = values(trace(net), VECTORS)
    x, y = z[unit(net, "1")].double().numpy(), z[unit(net, "4")].double().numpy()
    design = np.hstack([x, np.ones((len(x), 1))])
    truth = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert np.allclose(values(shorter, VECTORS)[unit(net, "4")].numpy(), truth, atol=1e-3)


LINEAR = {
    "linear layer": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Linear(7, 3)),
        VECTORS,
        [1],
    ),
    "pointwise convolution": (
        lambda: nn.Sequential(conv(3, 4), conv(4, 6, 1, act=False), conv(6, 5), Pooled(5, 3)),
        IMAGES,
        [1],
    ),
    "convolution and pooling": (
        lambda: nn.Sequential(
            conv(3, 4),
            conv(4, 6, 1, act=False),
            nn.AvgPool2d(2),
            conv(6, 5, norm=False),
            Pooled(5, 3),
        ),
        IMAGES,
        [1],
    ),
    "before flattening": (
        lambda: nn.Sequential(
            conv(3, 4),
            conv(4, 3, 1, act=False, norm=False),
            nn.MaxPool2d(4),
            nn.Conv2d(3, 3, 1),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        IMAGES,
        [2],
    ),
    "depthwise": (
        lambda: nn.Sequential(
            conv(3, 4), conv(4, 4, 1, groups=4, act=False), conv(4, 4, groups=4), Pooled(4, 3)
        ),
        IMAGES,
        [1],
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_work_of_linear_layers_is_taken_over_exactly(name):
    """At padded borders only without a bias in front, which is why the biases are zero."""
    make, data, at = LINEAR[name]
    net = randomise(make())
    if name != "linear layer":
        for module in net[at[0]].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.data.zero_()
                module.running_mean.zero_()
    assert gap(net, refitted(net, data, at, 1e-10), data) <= FUNCTION


CASES = {
    "perceptron": (lambda: mlp(6, 8, 7, 5, 3), VECTORS, [1]),
    "perceptron, first layer": (lambda: mlp(6, 8, 7, 5, 3), VECTORS, [0]),
    "perceptron with GELU and norms": (
        lambda: mlp(6, 8, 7, 5, 3, act=nn.GELU, norm=True),
        VECTORS,
        [1, 2],
    ),
    "stage": (lambda: stages([4, 5, 6], [4]), IMAGES, [1]),
    "end of a stage": (lambda: stages([4, 5], [6]), IMAGES, [1]),
    "end of a stage and start of the next": (
        lambda: stages([4, 5], [6, 6]),
        IMAGES,
        [1, 2],
    ),
    "without norms": (lambda: stages([4, 5], [6], norm=False, hidden=(8,)), IMAGES, [1]),
    "into a linear layer": (lambda: stages([4], [6, 5], hidden=(8,)), IMAGES, [2]),
    "blocks": (lambda: residual((6, 3), (8, 2)), IMAGES, [2, 3, 5]),
    "blocks at the start": (lambda: residual((6, 3)), IMAGES, [1]),
    "plain in front of a block": (
        lambda: nn.Sequential(conv(3, 5), conv(5, 6), residual((6, 2), stem=6)[1], Pooled(6, 3)),
        IMAGES,
        [1],
    ),
    "inverted": (
        lambda: nn.Sequential(conv(3, 6), *[Inverted(6, 9, 4) for _ in range(3)], Pooled(6, 3)),
        IMAGES,
        [2],
    ),
    "tokens": (lambda: Tokens(depth=2), IMAGES, [2, 3]),
}


@pytest.mark.parametrize("name", some(CASES, *[*CASES][::2]))
def test_refitted_networks_are_nearer_than_their_mean_output(name):
    make, data, at = CASES[name]
    net = randomise(make())
    shorter = refitted(net, data, at)
    a = outputs(net, data)
    spread = float((a - a.mean(0)).norm() / a.norm())
    assert error(net, shorter, data) < spread
    kept = [x for i, x in enumerate(layers_of(network_of(net, data))) if i not in at]
    left = layers_of(network_of(shorter, data))
    assert [x.kind for x in left] == [x.kind for x in kept]
    assert [x.width for x in left][-1] == 3


def test_removing_blocks_that_add_nothing_changes_nothing():
    net = randomise(residual((6, 4)))
    for block in net[1][2:]:
        block.b[1].weight.data.zero_()
        block.b[1].bias.data.zero_()
    shorter = refitted(net, IMAGES, [3, 4], 1e-3)
    assert gap(net, shorter, IMAGES) <= FUNCTION


def test_fitting_in_order_makes_up_for_earlier_removals():
    """Two removals are fitted one on what the other left: no worse than each on the old values."""
    net = randomise(mlp(6, 12, 12, 12, 12, 3))
    both = refitted(net, VECTORS, [1, 3], rounds=0)
    z = values(trace(net), VECTORS)
    x = values(both, VECTORS)[unit(net, "5")].double()
    y = z[unit(net, "8")].double()
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    best = torch.as_tensor(np.linalg.lstsq(design, y, rcond=None)[0])  # of deficient rank
    assert unit(net, "8") in values(both, VECTORS)
    assert torch.allclose(values(both, VECTORS)[unit(net, "8")].double(), design @ best, atol=1e-2)


def test_ridge_draws_to_the_merged_weights():
    net = randomise(mlp(6, 8, 7, 5, 3))
    weights = {
        r: refitted(net, VECTORS, [1], r).get_submodule("4").weight.detach()
        for r in (1e-6, 1.0, 1e6)
    }

    limit = merged(net, VECTORS, [1], fitted_line).get_submodule("4").weight
    far = [float((w - limit).norm()) for w in weights.values()]
    assert far == sorted(far, reverse=True) and far[-1] < 1e-4 < far[0]


REFUSED = {
    "grown": (
        lambda: nn.Sequential(conv(3, 4), Grown(4, 1, 5), Pooled(9, 3)),
        [2],
        "no sum of a branch",
    ),
    "strided": (lambda: residual((6, 2), (8, 2)), [3], "another shape"),
    "strided first layer": (
        lambda: nn.Sequential(conv(3, 4, stride=2), conv(4, 4), Pooled(4, 3)),
        [0],
        "another shape",
    ),
    "gate": (
        lambda: nn.Sequential(
            conv(3, 4),
            Inverted(4, 4, 2).gate,
            Inverted(4, 4, 2).gate,
            Inverted(4, 4, 2).gate,
            Pooled(4, 3),
        ),
        [2],
        "no sum of a branch",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_whose_work_nothing_can_take_over_are_refused_with_the_reason(name):
    make, at, reason = REFUSED[name]
    with pytest.raises(PassError, match=reason) as caught:
        refitted(randomise(make()), IMAGES, at)
    assert "work nothing can take over" in caught.value.met
