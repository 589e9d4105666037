"""Products whose factors are written with other sizes: the same function, and the same fusion."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse.calibration.data import analyse_alike
from fxfuse.coupling.factors import factors_alike
from fxfuse.coupling.problem import Problem
from fxfuse.depth.deepen import Balanced
from tests.support.nets import gap, outputs, randomise
from tests.support.sweeps import some

TOKENS = torch.randn(48, 5, 6, generator=torch.Generator().manual_seed(0))
FRESH = torch.randn(9, 5, 6, generator=torch.Generator().manual_seed(1))


class Attends(nn.Module):
    """Attention, with queries and keys in layers of their own, behind norms, or in one layer."""

    def __init__(self, kind, width=8):
        super().__init__()
        self.e, self.v, self.h = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.kind = kind
        if kind == "packed":
            self.qk = nn.Linear(8, 2 * width)
        else:
            self.q, self.k = nn.Linear(8, width), nn.Linear(8, width)
        self.norm = nn.LayerNorm(width) if kind == "a norm" else nn.Identity()

    def forward(self, x):
        x = self.e(x)
        q, k = self.qk(x).chunk(2, -1) if self.kind == "packed" else (self.q(x), self.k(x))
        q = F.normalize(q, dim=-1) if self.kind == "no size" else self.norm(q)
        return self.h(x + (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ self.v(x))


def rescaled(net, queries, keys):
    """Scale queries and keys, in place; return the network."""
    with torch.no_grad():
        if net.kind == "packed":
            factors = torch.tensor([queries, keys]).repeat_interleave(len(net.qk.bias) // 2)
            net.qk.weight.mul_(factors[:, None])
            net.qk.bias.mul_(factors)
            return net
        sides = [net.norm if net.kind == "a norm" else net.q, net.k]
        for part, factor in zip(sides, (queries, keys)):
            part.weight.mul_(factor)
            part.bias.mul_(factor)
    return net


CASES = [(kind, width) for kind in ("apart", "packed", "a norm") for width in (8, 16)]


@pytest.mark.parametrize("kind, width", some(CASES, ("apart", 16), ("packed", 8)))
def test_factors_of_two_sizes_come_back(kind, width):
    net = randomise(Attends(kind), 1)
    other = Attends(kind, width).eval()
    wide = fxfuse.net2wider(net, TOKENS[:2], like=other) if width > 8 else net
    other.load_state_dict(wide.state_dict())
    other = rescaled(other, 1 / 8, 8.0)
    state = {name: t.clone() for name, t in other.state_dict().items()}
    assert gap(net, other, FRESH) < 1e-5
    for anchor in (0, 1):
        assert gap(net, fxfuse.fuse([net, other], TOKENS, anchor=anchor), FRESH) < 1e-4
    assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())


def problem_of(*nets):
    networks = analyse_alike(nets, TOKENS[:4], ["a", "b"])
    return Problem.of(Balanced(tuple(networks), ((), ()), (0.0, 0.0)), 0, (0.5, 0.5))


def test_networks_that_differ_little_or_whose_factor_has_no_size_stay():
    for kind, factor in (("apart", 1.3), ("no size", 8.0)):
        net = randomise(Attends(kind), 1)
        other = rescaled(randomise(Attends(kind), 1), 1 / factor, factor)
        before = problem_of(net, other)
        assert factors_alike(before) is before
    assert outputs(other, FRESH).isfinite().all()
