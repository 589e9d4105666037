"""A descent behind the closed form: downhill, never worse, the same again; nothing else moves."""

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.calibration.data import Calibration
from fxfuse.errors import ArgumentError
from fxfuse.graph.modes import eval_mode
from fxfuse.refit import Finish
from tests.support.graphs import PLAIN, inputs
from tests.support.nets import mlp, outputs, randomise, residual

X = torch.randn(160, 6, generator=torch.Generator().manual_seed(0))
DATA, HELD = X[:120], X[120:]


def state_of(net):
    return {name: t.clone() for name, t in net.state_dict().items()}


def finished(net, teacher, x=DATA, held=HELD, **options):
    """Finish a copy of a state; return the network and what it came to."""

    def far():
        with torch.no_grad(), eval_mode(net):
            return float((net(held) - teacher(held)).norm())

    def wanted(batch):
        with torch.no_grad():
            return [teacher(*batch)]

    return net, Finish(**options)(net, wanted, far, Calibration(x))


def student():
    return randomise(mlp(6, 8, 4), 1).eval()


TEACHER = randomise(mlp(6, 20, 4), 2).eval()


def test_it_comes_nearer_and_says_how_near():
    net, done = finished(student(), TEACHER, steps=40, rate=0.01)
    assert done.after < 0.9 * done.before and 0 < done.kept <= done.steps == 40
    assert done.after == pytest.approx(float((net(HELD) - TEACHER(HELD)).norm()), rel=1e-5)


def test_steps_are_the_same_again_and_follow_the_seed():
    nets = [finished(student(), TEACHER, steps=9, seed=seed)[0] for seed in (0, 0, 1)]
    a, b, c = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_outputs_that_do_not_fit_in_memory_are_made_anew(monkeypatch):
    kept = finished(student(), TEACHER, steps=9)[0]
    monkeypatch.setattr("fxfuse.refit.finish.MEMORY", 0)
    assert torch.equal(outputs(kept, X)[0], outputs(finished(student(), TEACHER, steps=9)[0], X)[0])


def test_batches_that_are_one_sample_are_not_cut():
    nets = [randomise(PLAIN["Sums"](), seed) for seed in (1, 2)]
    data = [inputs("Sums", seed, nodes) for seed, nodes in enumerate((12, 20, 9, 15, 30))]
    fused = fxfuse.fuse(nets, data, finish=Finish(steps=8))
    assert fused.meta["fxfuse"].finished.steps == 8


def test_what_comes_no_nearer_is_taken_back():
    net = student()
    before = state_of(net)
    _, done = finished(net, TEACHER, steps=20, rate=1e3)
    assert done.kept == 0 and done.after == done.before
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


@pytest.mark.parametrize("options", [{"batch": 7}, {"rate": 0.01}])
def test_every_option_matters(options):
    plain, other = (finished(student(), TEACHER, steps=9, **o)[0] for o in ({}, options))
    assert not torch.equal(outputs(plain, X)[0], outputs(other, X)[0])


def test_statistics_modes_and_flags_stay():
    images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    net, teacher = (randomise(residual((6, 1), classes=4), seed) for seed in (1, 2))
    net.train()
    frozen = next(net.parameters()).requires_grad_(False)
    before = state_of(net)
    finished(net, teacher.eval(), images[:30], images[30:], steps=8)
    after, parameters = net.state_dict(), dict(net.named_parameters())
    assert all(torch.equal(t, after[name]) for name, t in before.items() if name not in parameters)
    assert (
        net.training and not frozen.requires_grad and all(p.grad is None for p in net.parameters())
    )


def test_seconds_end():
    _, done = finished(student(), TEACHER, seconds=0.05)
    assert done.steps > 0


@pytest.mark.parametrize(
    "options", [{}, {"steps": 3, "seconds": 1.0}, {"steps": 0}, {"seconds": 1.0, "rate": -1.0}]
)
def test_what_is_no_duration_is_refused(options):
    with pytest.raises(ArgumentError, match="a finish of"):
        Finish(**options)


def test_outputs_that_are_no_scores_are_met_by_their_squares():
    class Two(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            y = self.net(x)
            return y[:, :1], y[:, 1:]

    net, teacher = Two(student()), Two(TEACHER)

    def far():
        with torch.no_grad():
            return sum(float((a - b).norm()) for a, b in zip(net(HELD), teacher(HELD)))

    done = Finish(steps=40)(
        net, lambda batch: [t.detach() for t in teacher(*batch)], far, Calibration(DATA)
    )
    assert done.after < done.before
