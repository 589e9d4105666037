"""Moment matching: norms and contractions get the moments of the parents, or keep the function."""

import torch

import fxfuse
from fxfuse.calibration.run import working_batch
from fxfuse.coupling.transport import Transport
from fxfuse.refit.moments import AsMixed, MatchMoments, ResetNorms
from tests.support.nets import build, gap, outputs, randomise, stages
from tests.support.problems import network
from tests.support.tolerances import FUNCTION


def images(count=40):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def test_moments_of_norm_outputs_match_the_mean_of_the_parents():
    nets, x = [randomise(stages([6, 6], [8]), s) for s in (1, 2)], images(64)
    refits = MatchMoments(), AsMixed()
    methods = [fxfuse.Method(coupling=Transport(), refit=refit) for refit in refits]
    fused, plain = (fxfuse.fuse(nets, x, method=method) for method in methods)
    spreads = []
    for net in (*nets, fused, plain):
        recorded = {}
        norm = dict(net.named_modules())["0.1.1"]
        handle = norm.register_forward_hook(lambda m, i, o, r=recorded: r.update(out=o))
        outputs(net.eval(), x)
        handle.remove()
        spreads.append(recorded["out"].transpose(0, 1).flatten(1).std(1).sort().values)
    wanted = (spreads[0].mean() + spreads[1].mean()) / 2
    assert abs(float(spreads[2].mean() / wanted) - 1) < 0.02
    assert float(spreads[3].mean() / wanted) < 0.95, "nothing was lost, so nothing is shown"


def test_without_moments_the_norms_keep_the_mixed_function():
    net, x = build("residual")
    method = fxfuse.Method(refit=AsMixed())
    fused = fxfuse.fuse([net, fxfuse.permute(net, x, seed=1)], images(), method=method)
    assert gap(net, fused, images()) < FUNCTION


def test_norms_without_affine_parameters_are_settled_too():
    net = randomise(stages([5], [6]))
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight = module.bias = None
            module.affine = False
    fused = fxfuse.fuse([net, fxfuse.permute(net, images(2), seed=1)], images())
    assert gap(net, fused, images()) < FUNCTION


def test_few_samples_are_settled_when_the_frontier_is_small(monkeypatch):
    monkeypatch.setattr("fxfuse.refit.moments.FRONTIER_BYTES", 1 << 16)
    monkeypatch.setattr("fxfuse.calibration.run.CACHED_BYTES", 1 << 14)
    net, x = build("batch norm")
    networks = [network(net, x)]
    samples = MatchMoments().samples(networks)
    assert samples % working_batch(networks) == 0 and samples < 100
    data = images(100)
    assert gap(net, fxfuse.fuse([net, fxfuse.permute(net, x, seed=1)], data), data) < FUNCTION


def fused_by(refit, nets, x):
    return fxfuse.fuse(
        nets, x, method=fxfuse.Method(coupling=Transport(), refit=refit)
    ).state_dict()


def test_reset_norms_get_the_moments_that_they_are_asked_for():
    nets, x = [randomise(stages([6, 6], [8]), s) for s in (1, 2)], images(64)
    reset, matched, plain = (
        fused_by(refit, nets, x) for refit in (ResetNorms(), MatchMoments(), AsMixed())
    )
    norms = [name for name in reset if name.endswith("running_var")]
    assert norms and all(torch.allclose(reset[n], matched[n], rtol=1e-4) for n in norms)
    affine = norms[0].replace("running_var", "weight")
    assert not torch.allclose(reset[affine], plain[affine], rtol=0.02)


def test_without_norms_there_is_nothing_to_reset():
    nets, x = [randomise(stages([6, 6], [8], norm=False), s) for s in (1, 2)], images(64)
    reset, matched, plain = (
        fused_by(refit, nets, x) for refit in (ResetNorms(), MatchMoments(), AsMixed())
    )
    assert all(torch.equal(reset[name], plain[name]) for name in plain)
    assert not all(torch.allclose(reset[name], matched[name]) for name in plain)
