"""Blocks that no rule makes neutral are made so by trying, or are refused."""

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.errors import PassError
from tests.support.nets import gap, randomise
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A block that combines what it reads with a branch in some way."""

    def __init__(self, way, width=8):
        super().__init__()
        self.a, self.b, self.way = nn.Linear(width, 7), nn.Linear(7, width), way
        self.shift = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.way(self, x, self.b(torch.relu(self.a(x))))


def zeroed_part(block, x, y):
    y[:, 0] = 0.0
    return x + y


SETTLED = {  # an added constant is taken off by a bias, a gate opened or closed
    "adds a constant": lambda block, x, y: x + (y + 1.5),
    "adds a parameter": lambda block, x, y: x + (y + block.shift),
    "one minus": lambda block, x, y: x + (1 - y),
    "behind the sum": lambda block, x, y: x + y + 1.5,
    "subtracts": lambda block, x, y: x - 2 * (y - 1),
    "multiplies": lambda block, x, y: x * (1 + y),
    "gate": lambda block, x, y: x * torch.sigmoid(y),
    "highway": lambda block, x, y: (1 - torch.sigmoid(y)) * x + torch.sigmoid(y) * torch.tanh(y),
    "writes": zeroed_part,
}
REFUSED = {
    "softmax": lambda block, x, y: x + y.softmax(-1),
    "floor": lambda block, x, y: x + y.clamp(min=0.1),
    "a part": lambda block, x, y: x + torch.cat([y[:, :2], y[:, 2:].sigmoid()], 1),
}


def nets(way):
    def net(depth):
        blocks = [Block(way) for _ in range(depth)]
        return nn.Sequential(nn.Linear(6, 8), *blocks, nn.Linear(8, 3))

    return [randomise(net(depth), seed) for seed, depth in enumerate((3, 1))]


QUICK = "one minus", "highway"


@pytest.mark.parametrize("way", some(SETTLED, *QUICK))
def test_a_block_gets_values_with_which_it_does_nothing(way):
    deep, shallow = nets(SETTLED[way])
    balanced = fxfuse.balance([deep, shallow], X)
    assert gap(deep, balanced[0], 3 * X) < FUNCTION and gap(shallow, balanced[1], 3 * X) < FUNCTION
    fused = fxfuse.fuse([shallow, fxfuse.permute(balanced[1], X, seed=1)], X)
    assert gap(shallow, fused, 3 * X) < FUNCTION


@pytest.mark.parametrize("way", some(SETTLED | REFUSED, "softmax"))
def test_such_a_block_is_passed_by_when_networks_are_fused(way):
    deep, shallow = nets((SETTLED | REFUSED)[way])
    assert gap(deep, fxfuse.fuse([deep, shallow], X, weights=[1, 0]), 3 * X) < FUNCTION


@pytest.mark.parametrize("way", some(REFUSED, "softmax"))
def test_where_nothing_does_nothing_the_advice_works(way):
    deep, shallow = nets(REFUSED[way])
    with pytest.raises(PassError) as caught:
        fxfuse.balance([deep, shallow], X)
    options = eval(f"dict({caught.value.do.partition(': ')[2]})", {"fxfuse": fxfuse})
    balanced = fxfuse.balance([deep, shallow], X, **options)
    assert gap(shallow, balanced[1], 3 * X) < FUNCTION
