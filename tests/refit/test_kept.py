"""Values kept while units are measured give the network that running the parents anew gives."""

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.coupling import measure
from fxfuse.refit import LeastSquares, sweep
from tests.support.nets import gap, mlp, randomise
from tests.support.tolerances import FUNCTION

ANEW = fxfuse.Method(refit=LeastSquares(frontier=0))  # nothing can be kept


class Reached(Exception):
    """The networks are run for the refit."""


def refuse(*_):
    raise Reached


def drawn(*nets):
    return [randomise(net, seed) for seed, net in enumerate(nets, 1)]


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


CASES = {
    "plain": lambda: (mlp(6, 8, 8, 8, 3), mlp(6, 5, 5, 3), normal(60, 6)),
    "norms": lambda: (mlp(6, 5, 3, norm=True), mlp(6, 8, 8, 3, norm=True), normal(60, 6)),
}


@pytest.fixture
def cut(monkeypatch):
    """Run some samples at a time, and tell units apart by fewer than there are."""
    monkeypatch.setattr("fxfuse.calibration.run.BATCH_SAMPLES", 16)
    monkeypatch.setattr(measure, "ENOUGH_SAMPLES", 16)
    monkeypatch.setattr(measure, "ENOUGH_POSITIONS", 1)


@pytest.mark.parametrize("name", CASES)
def test_the_networks_run_once_and_the_result_is_the_same(name, cut, monkeypatch):
    *nets, x = CASES[name]()
    nets = drawn(*nets)
    anew = fxfuse.fuse(nets, x, method=ANEW)
    monkeypatch.setattr(sweep, "Parents", refuse)
    assert gap(anew, fxfuse.fuse(nets, x), x) < FUNCTION
    with pytest.raises(Reached):
        fxfuse.fuse(nets, x, method=ANEW)


class AlongTokens(nn.Module):
    """Mixes along tokens, beside channels."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x):
        x = self.embed(x).transpose(1, 2)
        return self.out((x + self.down(torch.tanh(self.up(x)))).mean(2))


def test_rows_of_units_are_matched_whether_values_are_kept_or_not():
    nets, x = drawn(AlongTokens(), AlongTokens()), normal(60, 4, 6)
    anew = fxfuse.fuse(nets, x, method=ANEW)
    assert gap(anew, fxfuse.fuse(nets, x), x) < FUNCTION
    assert gap(nets[0], fxfuse.fuse([nets[0], fxfuse.permute(nets[0], x, seed=1)], x), x) < FUNCTION
