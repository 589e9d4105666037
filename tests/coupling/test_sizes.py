"""Products of two activations: a wider copy of a network folds back, whatever its units' size."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import fxfuse
from fxfuse.coupling.plans import one_partner
from tests.support.nets import gap, outputs, randomise
from tests.support.sweeps import some

TOKENS = torch.randn(48, 5, 6, generator=torch.Generator().manual_seed(0))
FRESH = torch.randn(9, 5, 6, generator=torch.Generator().manual_seed(1))


class Product(nn.Module):
    """Three maps of one stream, and a function of what they give."""

    def __init__(self, function, features=8):
        super().__init__()
        self.e = nn.Linear(6, 8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.h, self.function = nn.Linear(features, 3), function

    def forward(self, x):
        x = self.e(x)
        return self.h(self.function(x, self.q(x), self.k(x), self.v(x)))


class Packed(nn.Module):
    def __init__(self, whole):
        super().__init__()
        self.e, self.h = nn.Linear(6, 8), nn.Linear(8, 3)
        self.a = nn.MultiheadAttention(8, 2, batch_first=True)
        self.whole = whole

    def forward(self, x):
        x = self.e(x)
        if self.whole:
            return self.h(x + self.a(x, x, x, need_weights=False)[0])
        y = F.linear(x, self.a.in_proj_weight, self.a.in_proj_bias)
        parts = y.reshape(x.shape[0], x.shape[1], 3, 2, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return self.h(x + self.a.out_proj(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)))


class Factors(nn.Module):
    """A factorisation machine."""

    def __init__(self):
        super().__init__()
        self.v, self.l = nn.Parameter(torch.zeros(6, 8)), nn.Linear(6, 3)

    def forward(self, x):
        return self.l(x) + ((x @ self.v) ** 2 - x**2 @ self.v**2).sum(-1, keepdim=True)


class Form(nn.Module):
    """Quadratic forms."""

    def __init__(self, equation):
        super().__init__()
        self.a, self.b, self.h = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(5, 3)
        self.w, self.equation = nn.Parameter(torch.zeros(5, 8, 8)), equation

    def forward(self, x):
        a = torch.relu(self.a(x))
        b = a if self.equation == "bti,oij,btj->bto" else torch.tanh(self.b(x)) + 0 * a[..., :1]
        return self.h(torch.einsum(self.equation, a, self.w, b))


def attention(x, q, k, v):
    return x + (q @ k.mT).softmax(-1) @ v


def scaled(x, q, k, v):
    return x + (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def normalised(x, q, k, v):
    return x + (4 * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v


def linear(x, q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return x + q @ (k.mT @ v) / (q @ k.sum(1)[..., None])


def gated(x, q, k, v):
    return x + torch.sigmoid(q) * k + v


def distances(x, q, k, v):
    return torch.exp(-(q - k).square().sum(-1, keepdim=True) / 9)


KINDS = {
    **{f.__name__: lambda f=f: Product(f) for f in (attention, scaled, normalised, linear, gated)},
    "distances": lambda: Product(distances, 1),
    "packed": lambda: Packed(True),
    "unpacked": lambda: Packed(False),
    "factors": Factors,
    "form": lambda: Form("bti,oij,btj->bto"),
    "form of two": lambda: Form("...i,oij,...j->...o"),
}
QUICK = [(name, 2.0) for name in [*KINDS][::2]] + [("scaled", 1.5), ("packed", 1.5)]


@pytest.mark.parametrize(("name", "factor"), some(product(KINDS, [2.0, 1.5]), *QUICK))
def test_a_wider_copy_folds_back_and_a_narrower_one_unfolds(name, factor):
    net = randomise(KINDS[name](), 1)
    wide = fxfuse.net2wider(net, TOKENS[:2], factor=factor)
    first = next(iter(net.state_dict()))
    shuffled = fxfuse.permute(wide, TOKENS[:2], seed=1)
    assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in net.parameters())
    for nets, anchor in (([shuffled, net], 1), ([shuffled, net], 0), ([net, wide], 1)):
        fused = fxfuse.fuse(nets, TOKENS, anchor=anchor)
        assert fused.state_dict()[first].shape == nets[anchor].state_dict()[first].shape
        assert gap(net, fused, FRESH) < 1e-5


def test_networks_of_one_width_are_mixed_as_they_are():
    nets = [randomise(KINDS["scaled"](), seed) for seed in (1, 2)]
    maps = fxfuse.fuse(nets, TOKENS).meta["fxfuse"].maps
    assert all(m.data.max() <= 1 for m in maps.values())
    assert outputs(fxfuse.fuse(nets, TOKENS), FRESH).isfinite().all()


@given(arrays(float, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.floats(0, 9)))
def test_each_unit_of_the_larger_side_has_one_partner(cost):
    plan = one_partner(cost).toarray()
    larger = plan if cost.shape[0] >= cost.shape[1] else plan.T
    assert ((larger > 0).sum(1) == 1).all() and ((larger > 0).sum(0) >= 1).all()
    assert plan.sum() == pytest.approx(1) and np.ptp(larger.sum(1)) < 1e-12
