"""Heads that read through a map: each way against the map applied by hand, and when it is taken."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FUNCTION
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Gate, Residual, Shuffle, conv, mlp, outputs, randomise
from scipy.sparse import csr_array
from torch import nn

import fxfuse
from fxfuse.cutting import Head
from fxfuse.errors import PairingError
from fxfuse.grafting import Crossing, folded, head_spaces, in_front, permuted, reads_alike
from fxfuse.heads import Separate
from fxfuse.tracing import trace


def crossing(module, read, shape, dim=1):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return Crossing(Head("head", trace(randomise(module)), (), None), value, (), dim, read)


def by_hand(cross):
    """What the head makes of the value with the map applied densely."""
    moved = cross.value.movedim(cross.dim, -1) @ torch.tensor(cross.read.toarray().T).float()
    return outputs(cross.head.module, moved.movedim(-1, cross.dim))


def soft(own, fused, seed=0):
    dense = np.random.default_rng(seed).random((own, fused))
    return csr_array(dense / dense.sum(1, keepdims=True))


def permutation(size, seed=0):
    order = np.random.default_rng(seed).permutation(size)
    return csr_array((np.ones(size), (np.arange(size), order)))


class Around(nn.Module):
    """Both a contraction and a skip read the input."""

    def __init__(self, width):
        super().__init__()
        self.a = nn.Linear(width, width)

    def forward(self, x):
        return x + self.a(x)


def pooled(*parts, width):
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


LINEAR = {  # everything that reads the value is linear in its units
    "linear": (lambda: mlp(6, 5, 3), (4, 8), 1),
    "convolution": (lambda: pooled(conv(6, 5), width=5), (4, 8, 4, 4), 1),
    "average in between": (lambda: pooled(width=6), (4, 8, 4, 4), 1),
    "tokens": (lambda: mlp(6, 5, 3), (4, 7, 8), 2),
    "several readers": (lambda: Two(6), (4, 8), 1),
}
OTHERS = {  # something else than contractions reads it, or it lies there in several places
    "skip": (lambda: nn.Sequential(Around(6), nn.Linear(6, 3)), (4, 8), 1),
    "block": (lambda: pooled(Residual(6, 6), width=6), (4, 8, 4, 4), 1),
    "activation": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 3)), (4, 8), 1),
    "maximum": (lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), pooled(width=6)), (4, 8, 4, 4), 1),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)), (4, 8), 1),
    "gate": (lambda: pooled(Gate(6, 4), width=6), (4, 8, 4, 4), 1),
    "groups": (lambda: pooled(conv(6, 6, groups=2), width=6), (4, 8, 4, 4), 1),
    "shuffle": (lambda: pooled(Shuffle(2), conv(6, 6, groups=2), width=6), (4, 8, 4, 4), 1),
    "flatten": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 3)), (4, 8, 2, 2), 1),
    "middle axis": (lambda: nn.Sequential(Middle(), nn.Linear(6, 3)), (4, 8, 5), 1),
    "odd axis": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(60, 3)), (4, 5, 8, 2), 2),
}


class Two(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, 3), nn.Linear(width, 3, bias=False)

    def forward(self, x):
        return torch.relu(self.a(x)) * self.b(x)


class Middle(nn.Module):
    def forward(self, x):
        return torch.tanh(x).transpose(1, 2)


@pytest.mark.parametrize("name", LINEAR)
def test_a_map_is_folded_into_what_reads_linearly(name):
    make, shape, dim = LINEAR[name]
    cross = crossing(make(), soft(6, 8), shape, dim)
    module = folded(cross, head_spaces(cross))
    assert reads_alike(cross, module)
    assert (outputs(module, cross.value) - by_hand(cross)).abs().max() < FUNCTION
    assert len(list(module.graph.nodes)) == len(list(cross.head.module.graph.nodes))


@pytest.mark.parametrize("name", OTHERS)
def test_a_map_is_not_folded_into_what_reads_otherwise(name):
    make, shape, dim = OTHERS[name]
    cross = crossing(make(), soft(6, 8), shape, dim)
    module = folded(cross, head_spaces(cross))
    assert module is None or not reads_alike(cross, module)


@settings(max_examples=20)
@given(st.sampled_from(sorted(LINEAR | OTHERS)), st.integers(0, 99))
def test_a_map_in_front_is_the_map_applied_by_hand(name, seed):
    make, shape, dim = (LINEAR | OTHERS)[name]
    cross = crossing(make(), soft(6, 8, seed), shape, dim)
    expected = by_hand(cross)
    state = torch.get_rng_state()
    module = in_front(cross)
    assert torch.equal(state, torch.get_rng_state())
    assert (outputs(module, cross.value) - expected).abs().max() < FUNCTION
    assert "unproject.weight" in module.state_dict()


@pytest.mark.parametrize("name", ["skip", "block", "norm", "gate", "flatten", "activation"])
def test_a_permutation_moves_the_units_of_the_head(name):
    make, shape, dim = OTHERS[name]
    cross = crossing(make(), permutation(6), [6 if n == 8 else n for n in shape], dim)
    module = permuted(cross, head_spaces(cross))
    assert reads_alike(cross, module)
    assert (outputs(module, cross.value) - by_hand(cross)).abs().max() < FUNCTION


def test_a_permutation_across_groups_is_noticed():
    make, shape, dim = OTHERS["groups"]
    cross = crossing(make(), permutation(6, seed=1), (4, 6, 4, 4), dim)
    assert permuted(cross, head_spaces(cross)) is None
    within = csr_array((np.ones(6), (np.arange(6), [2, 0, 1, 3, 5, 4])))
    cross = crossing(make(), within, (4, 6, 4, 4), dim)
    assert reads_alike(cross, permuted(cross, head_spaces(cross)))


def test_only_permutations_are_moved():
    cross = crossing(mlp(6, 5, 3), soft(6, 6), (4, 6))
    assert permuted(cross, head_spaces(cross)) is None


# --- what crosses the cut -------------------------------------------------------------------------


def images(count=48):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class Crosses(nn.Module):
    """Cut behind `a`: what crosses is `a`'s output beside what `beside` makes of the input."""

    def __init__(self, beside, width=6, others=3):
        super().__init__()
        self.a, self.b = conv(3, width, act=False), conv(width + others, 5)
        self.fc = nn.Linear(5, 3)
        self.beside = beside

    def forward(self, x):
        x = F.leaky_relu(self.beside(self.a(x), x), 0.1)
        return self.fc(self.b(x).mean((2, 3)))


def joined(y, x):
    return torch.cat([x, y], 1)


def beside(count):
    return lambda y, x: torch.cat([x[:, :count], y], 1)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1, 0]])
def test_units_beside_ones_that_stay_cross_the_cut(weights):
    x = images()
    net = randomise(Crosses(joined))
    pair = [net, fxfuse.permute(net, x[:2], seed=2)]
    fused = fxfuse.fuse(pair, x, heads=Separate(after="a"), weights=weights)
    for y in outputs(fused, x):
        assert (y - outputs(net, x)).abs().max() < FUNCTION * y.abs().max()
    narrow = randomise(Crosses(joined, width=4), 3)
    fused = fxfuse.fuse([net, narrow], x, heads=Separate(after="a"), weights=[1, 0], anchor=0)
    y = outputs(fused, x)[0]
    assert (y - outputs(net, x)).abs().max() < FUNCTION * y.abs().max()


def test_different_numbers_of_positions_that_stay_are_refused():
    nets = [randomise(Crosses(beside(n), others=n), n) for n in (1, 2)]
    with pytest.raises(PairingError, match="positions that must stay"):
        fxfuse.fuse(nets, images(), heads=Separate(after="a"))


class Folded(nn.Module):
    """What crosses the cut behind `a` has its units laid out along two axes."""

    def __init__(self, width):
        super().__init__()
        self.a, self.fc, self.half = nn.Linear(6, width), nn.Linear(width, 3), width // 2

    def forward(self, x):
        x = torch.relu(self.a(x).unflatten(-1, (2, self.half)))
        return self.fc(x.flatten(1))


def test_units_along_two_axes_stay_or_are_refused():
    x = torch.randn(40, 6)
    net, wider = randomise(Folded(8)), randomise(Folded(12), 1)
    fused = fxfuse.fuse([net, net], x, heads=Separate(after="a"))
    assert all(torch.allclose(y, net(x), atol=1e-5) for y in fused(x))
    two = [Separate(after="a"), Separate()]
    for heads in two:
        alike = fxfuse.fuse([net, fxfuse.permute(net, x[:2])], x, heads=heads)
        assert torch.allclose(alike(x)[0], net(x), atol=1e-4)
    assert len(fxfuse.fuse([net, wider], x, heads=Separate())(x)) == 2
