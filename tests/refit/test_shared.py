"""Weights that several nodes use: one correction that all uses want together."""

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.calibration.least_squares import InputSums, Sums
from fxfuse.refit._shared import Use, best_joint_correction
from tests.support.nets import gap, outputs, randomise

TOKENS = torch.randint(0, 20, (160, 5), generator=torch.Generator().manual_seed(0))
FRESH = torch.randint(0, 20, (30, 5), generator=torch.Generator().manual_seed(1))


class Language(nn.Module):
    """Tied: the rows of one weight are looked up, and tell the next token."""

    def __init__(self, tied=True):
        super().__init__()
        self.e, self.h = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.a, self.b, self.n = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)
        if tied:
            self.h.weight = self.e.weight

    def forward(self, i):
        x = self.e(i)
        return self.h(self.n(x + self.b(torch.relu(self.a(x)))))


class Repeated(nn.Module):
    """One layer is used three times."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x)
        for _ in range(3):
            x = x + torch.tanh(self.b(x))
        return self.h(x)


X = torch.randn(160, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("make", "x"), [(Language, TOKENS), (Repeated, X)])
def test_copies_and_a_lone_network_come_back(make, x):
    nets = [randomise(make(), seed) for seed in (1, 2)]
    copies = [nets[0], fxfuse.permute(nets[0], x, seed=1)]
    assert gap(nets[0], fxfuse.fuse(copies, x), x) < 1e-5
    lone = fxfuse.fuse(nets, x, weights=[1, 0], anchor=0)
    assert gap(nets[0], lone, x) < 1e-5
    nets[1].load_state_dict(fxfuse.fuse(nets, x).state_dict())


def test_an_axis_that_is_looked_up_and_read_counts_as_written():
    spaces = fxfuse.find_spaces(randomise(Language()), TOKENS[:2])
    assert not any(axis.reads for _, axis in spaces.on("e.weight"))
    apart = fxfuse.find_spaces(randomise(Language(False)), TOKENS[:2])
    assert [axis.reads for _, axis in apart.on("h.weight")] == [True]


def test_rows_that_are_looked_up_keep_their_size():
    """Networks that agree in few units count in few of them, and do not shrink the others."""
    nets = [randomise(Language(), seed) for seed in (1, 2)]
    fused = fxfuse.fuse(nets, TOKENS)
    sizes = [float(net.get_parameter("e.weight").norm()) for net in (*nets, fused)]
    assert sizes[2] > 0.8 * min(sizes[:2])


def test_all_uses_are_fitted_together():
    nets = [randomise(Language(), seed) for seed in (1, 2)]
    fused = fxfuse.fuse(nets, TOKENS)
    assert fused.get_parameter("h.weight") is fused.get_parameter("e.weight")
    assert "h" in {layer.node for layer in fused.meta["fxfuse"].layers}
    assert outputs(fused, FRESH).isfinite().all()


@pytest.mark.parametrize("centred", [False, True])
def test_a_joint_correction_is_the_stacked_least_squares(centred):
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(4, 3, generator=generator).double()
    uses, rows, wanted = [], [], []
    for scale in (1.0, 5.0):
        x = torch.randn(1, 60, 4, generator=generator).double()
        r = scale * (x @ planted + 0.3 * torch.randn(1, 60, 3, generator=generator))
        r = r + centred * 2.0
        sums = Sums(InputSums(centred))
        sums.inputs.add(x)
        sums.add(x, r)
        uses.append(Use(sums, sums, scale**2))
        middle = (x.mean(1), r.mean(1)) if centred else (0, 0)
        rows.append((x[0] - middle[0]) / scale / 60**0.5)
        wanted.append((r[0] - middle[1]) / scale / 60**0.5)
    stay = 0.2
    rows.append(stay**0.5 * torch.eye(4).double())
    wanted.append(torch.zeros(4, 3).double())
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution
    found = best_joint_correction(uses, stay, [1e-9])
    assert found.ridge == 1e-9
    assert torch.allclose(found.weight[0], expected, atol=1e-6)
