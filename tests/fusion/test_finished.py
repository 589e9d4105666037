"""A fusion that ends in a descent: nearer to the ensemble, and the models are left alone."""

import pytest
import torch

import fxfuse
from fxfuse.errors import ArgumentError
from fxfuse.refit import Finish
from tests.support.nets import mlp, outputs, randomise

X = torch.randn(240, 6, generator=torch.Generator().manual_seed(0))


def pair():
    return [randomise(mlp(6, *hidden, 4), seed) for seed, hidden in enumerate([(9, 9), (7,)])]


@pytest.mark.parametrize("options", [{"weights": "auto"}, {"weights": [0.2, 0.8], "anchor": 0}])
def test_a_finish_comes_nearer_to_the_ensemble(options):
    nets = pair()
    before = [{n: t.clone() for n, t in net.state_dict().items()} for net in nets]
    fused = fxfuse.fuse(nets, X, finish=Finish(steps=60), **options)
    report = fused.meta["fxfuse"]
    assert report.finished.after < report.finished.before and "finished by 60 steps" in str(report)
    assert (
        report.nearness.fused == pytest.approx(report.finished.after) and report.nearness.held_out
    )
    for net, state in zip(nets, before):
        assert all(torch.equal(state[name], t) for name, t in net.state_dict().items())
    nets[0].load_state_dict(fused.state_dict(), strict=True)


def test_networks_that_agree_come_back():
    net = randomise(mlp(6, 9, 4), 1)
    fused = fxfuse.fuse([net, fxfuse.permute(net, X, seed=1)], X, finish=Finish(steps=8))
    far = (outputs(fused, X)[0] - outputs(net, X)[0]).norm() / outputs(net, X)[0].norm()
    assert far < 1e-3


@pytest.mark.parametrize("options", [{"heads": fxfuse.heads.Separate()}, {"method": "hmt"}])
def test_where_there_is_no_mean_of_outputs_it_is_refused(options):
    with pytest.raises(ArgumentError, match="a finish with"):
        fxfuse.fuse(pair(), X, finish=Finish(steps=3), **options)
