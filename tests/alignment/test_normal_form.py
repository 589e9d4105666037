"""What counts when structures are compared, and which nodes of two networks correspond."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxfuse.alignment.layers import partition
from fxfuse.alignment.normal_form import NormalForm, correspondence, first_difference
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.nets import Pooled, conv, mlp, randomise

IMAGES, VECTORS = torch.randn(2, 3, 8, 8), torch.randn(2, 6)


def network(net, x=IMAGES):
    return Network.of("net", trace(randomise(net)), (x,))


def form(net, x=IMAGES):
    return NormalForm(network(net, x))


class Spelled(nn.Module):
    """A convolution, a head, and how one gets from the one to the other."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.conv, self.fc, self.spelled = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.fc(self.spelled(self, self.conv(x)))


POOLED = [
    lambda net, x: x.mean((2, 3)),
    lambda net, x: x.mean((-2, -1), keepdim=True).squeeze(-1).squeeze(-1),
    lambda net, x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    lambda net, x: F.adaptive_avg_pool2d(x, (1, 1)).view(x.size(0), -1),
    lambda net, x: torch.flatten(F.avg_pool2d(x, 6), 1),
    lambda net, x: x.flatten(2).mean(2),
    lambda net, x: x.reshape(x.shape[0], 4, -1).mean(-1),
    lambda net, x: F.dropout(x, 0.5, net.training).mean([2, 3]),
]


@pytest.mark.parametrize("at", range(1, len(POOLED)))
def test_pooling_to_one_value_and_reshaping_are_spelled_in_many_ways(at):
    first, other = (form(Spelled(POOLED[i])) for i in (0, at))
    assert correspondence(first, other) is not None
    assert [s.layers[0].kind for s in partition(first.network)] == [
        s.layers[0].kind for s in partition(other.network)
    ]


@pytest.mark.parametrize(
    "other",
    [
        lambda net, x: x.amax((2, 3)),
        lambda net, x: x.sum((2, 3)),
        lambda net, x: x.relu().mean((2, 3)),
        lambda net, x: x.mean((2, 3)) + x.mean((2, 3)),
        lambda net, x: F.avg_pool2d(x, 6, padding=1, count_include_pad=False).flatten(1),
    ],
)
def test_other_functions_do_not_correspond(other):
    assert correspondence(form(Spelled(POOLED[0])), form(Spelled(other))) is None


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (conv(3, 4), conv(3, 4, norm=False)),
        (conv(3, 4), conv(3, 4, norm=False, bias=False)),
        (conv(3, 4, bias=True), conv(3, 4)),
        (conv(3, 4), nn.Sequential(*conv(3, 4), nn.Dropout2d(), nn.Identity())),
    ],
)
def test_norms_that_can_be_folded_biases_and_idle_nodes_do_not_count(a, b):
    ours, theirs = (nn.Sequential(net, Pooled(4, 3)) for net in (a, b))
    assert correspondence(form(ours), form(theirs)) is not None


def test_a_norm_in_front_of_a_convolution_counts():
    a = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), Pooled(4, 3))
    b = nn.Sequential(nn.Conv2d(3, 4, 3), Pooled(4, 3))
    ours, theirs = form(a), form(b)
    assert correspondence(ours, theirs) is None
    norm, _ = first_difference(ours, theirs)
    assert norm.name == "_0"


def test_branches_may_be_written_in_any_order():
    class Two(nn.Module):
        def __init__(self, swapped):
            super().__init__()
            self.a, self.b, self.swapped = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), swapped

        def forward(self, x):
            if self.swapped:
                b, a = torch.tanh(self.b(x)), torch.relu(self.a(x))
            else:
                a, b = torch.relu(self.a(x)), torch.tanh(self.b(x))
            return (b + a).mean((2, 3))

    ours, theirs = form(Two(False)), form(Two(True))
    pairs = correspondence(ours, theirs)
    assert {b.target: a.target for b, a in pairs.items() if b.op == "call_module"} == {
        "a": "a",
        "b": "b",
    }


def test_the_first_differences_of_both_are_named():
    ours, theirs = form(mlp(6, 5, 3), VECTORS), form(mlp(6, 5, 3, act=nn.GELU), VECTORS)
    assert [n.name for n in first_difference(ours, theirs)] == ["_1", "_1"]


# --- norms of their own ---------------------------------------------------------------------------


class PreNorm(nn.Module):
    def __init__(self, width, norm):
        super().__init__()
        self.body = nn.Sequential(norm(width), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1))

    def forward(self, x):
        return x + self.body(x)


class NormInside(nn.Module):
    def __init__(self, width, norm):
        super().__init__()
        self.a, self.norm = nn.Conv2d(width, width, 3, 1, 1), norm(width)
        self.b = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.b(torch.relu(self.norm(self.a(x))))


class PostNorm(PreNorm):
    def __init__(self, width, norm):
        super().__init__(width, nn.Identity)
        self.norm = norm(width)

    def forward(self, x):
        return self.norm(x + self.body(x))


def group_norm(width):
    return nn.GroupNorm(2, width)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, group_norm])
@pytest.mark.parametrize(("block", "depth"), [(PreNorm, 1), (PreNorm, 2), (NormInside, 2)])
def test_a_norm_behind_the_last_block_is_no_part_of_it(block, depth, norm):
    blocks = [block(4, norm) for _ in range(depth)]
    net = nn.Sequential(nn.Conv2d(3, 4, 1), *blocks, norm(4), nn.ReLU(), Pooled(4, 3))
    _, *layers = partition(network(net))[0].layers
    assert len({layer.kind for layer in layers}) == 1
    assert all(layer.nodes[-1] == layer.merge for layer in layers)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, group_norm])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_norm_behind_every_block_is_part_of_each(depth, norm):
    blocks = [PostNorm(4, norm) for _ in range(depth)]
    net = nn.Sequential(nn.Conv2d(3, 4, 1), *blocks, Pooled(4, 3))
    _, *layers = partition(network(net))[0].layers
    assert len({layer.kind for layer in layers}) == 1
    assert all(layer.nodes[-1] != layer.merge for layer in layers)
