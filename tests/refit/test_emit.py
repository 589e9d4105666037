"""Emission: mixing and settling, against what the formulas say."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

import fxfuse
from fxfuse.calibration.data import Calibration
from fxfuse.coupling.measure import View, measure, measuring_batch, measuring_points
from fxfuse.coupling.mixing import Couplings
from fxfuse.coupling.plans import two_maps
from fxfuse.coupling.problem import absent_tensors
from fxfuse.coupling.transport import Transport
from fxfuse.ir import Coupling
from fxfuse.refit.emit import outputs_to_settle
from fxfuse.refit.moments import MatchMoments, frontier_samples
from tests.support.nets import build, gap, outputs, randomise, residual, stages
from tests.support.problems import network, problem_of
from tests.support.tolerances import FUNCTION


def images(count=40):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def test_a_tensor_is_mixed_as_the_formula_says():
    nets, x = [randomise(stages([5, 6], [7]), s) for s in (1, 2)], images()
    problem = problem_of(nets, x, weights=(0.3, 0.7))
    rng = np.random.default_rng(0)
    couplings, maps = {}, {}
    for name, spaces in problem.spaces.items():
        for k in (0, 1):
            p, u = (rng.random((spaces[k].size,) * 2) for _ in range(2))
            maps[name, k] = (p, u)
            couplings[name, k] = Coupling(csr_array(p), csr_array(u))
    weights = [n.state_dict()["0.1.0.weight"].numpy() for n in nets]
    (first, second) = [s.name for s in problem.networks[0].spaces][:2]
    expected = sum(
        share * np.einsum("Oo,oihw,iI->OIhw", maps[second, k][0], weights[k], maps[first, k][1])
        for k, share in enumerate((0.3, 0.7))
    )
    mixed = Couplings(problem, couplings).mix("0.1.0.weight", weights)
    assert np.allclose(mixed, expected, rtol=1e-5, atol=1e-6)


def test_a_network_without_a_block_adds_nothing_to_the_stream_and_shares_no_inside():
    """The zeros that silence the block count, its other tensors belong to the other network."""
    nets, x = (
        [randomise(residual((6, 3), (8, 1)), 1), randomise(residual((6, 1), (8, 1)), 2)],
        images(),
    )
    problem = problem_of(nets, x, weights=(0.4, 0.6))
    gone = absent_tensors(problem.networks[1], problem.absent[1])
    assert gone and not absent_tensors(problem.networks[0], problem.absent[0])
    inside = [n for n in gone if n.endswith("weight")]
    shares = {name: problem.shares(name) for name in inside}
    assert {tuple(s) for s in shares.values()} == {(1.0, 0.0)}
    silent = {t for a in problem.absent[1] for t in a.zeroed}
    assert silent and all(problem.shares(name) == [0.4, 0.6] for name in silent)
    assert problem.shares("0.0.weight") == [0.4, 0.6]


def test_the_joint_pass_measures_what_numpy_measures():
    nets, x = [randomise(stages([5], [6]), s) for s in (1, 2)], images(70)
    problem, data = problem_of(nets, x), Calibration(x)
    nodes = outputs_to_settle(problem.networks[0])
    found = measure(problem, data, View(), nodes, 70)
    point = next(iter(measuring_points(problem.networks[0]) & set(nodes)))
    for k, net in enumerate(nets):
        recorded = {}
        net[0][0][1].register_forward_hook(lambda m, i, o, r=recorded: r.update(out=o))
        outputs(net, x)
        expected = recorded["out"].transpose(0, 1).flatten(1).double().numpy()
        first = next(n for n in nodes if n in problem.networks[0].norms)
        assert np.allclose(found.outputs[first][k].mean, expected.mean(1), atol=1e-5)
        assert np.allclose(found.outputs[first][k].spread, expected.std(1), atol=1e-5)
    assert point


def test_moments_of_norm_outputs_match_the_mean_of_the_parents():
    nets, x = [randomise(stages([6, 6], [8]), s) for s in (1, 2)], images(64)
    refits = MatchMoments(), MatchMoments(keep=True)
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
    method = fxfuse.Method(refit=MatchMoments(keep=True))
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
    found = network(net, x)
    assert frontier_samples([found]) % measuring_batch([found]) == 0
    data = images(100)
    assert frontier_samples([found]) < 100
    assert gap(net, fxfuse.fuse([net, fxfuse.permute(net, x, seed=1)], data), data) < FUNCTION


class Masked(torch.nn.Module):
    """A masked autoencoder: output `i` depends on inputs before `i` only."""

    def __init__(self, width=8, scale=1.0):
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(width, 6))
        self.last = torch.nn.Parameter(torch.randn(6, width))
        degree, place = torch.arange(width) % 5, torch.arange(6)
        self.register_buffer("ins", (degree[:, None] >= place).float())
        self.register_buffer("outs", (place[:, None] > degree).float())
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x):
        hidden = torch.tanh(torch.nn.functional.linear(x * self.scale, self.first * self.ins))
        return torch.nn.functional.linear(hidden, self.last * self.outs)


@pytest.mark.parametrize("width", [1.0, 1.5, math.inf])
@pytest.mark.parametrize("name", ["best", "otfusion", "git_rebasin", "clafusion"])
def test_masks_are_moved_but_never_averaged(name, width):
    torch.manual_seed(0)
    nets, x = [Masked(8), Masked(8)], torch.randn(64, 6)
    if width > 1 and name != "best":
        pytest.skip("only couplings of whole spaces can be widened")
    fused = getattr(fxfuse.presets, name)(nets, x, width=width)
    assert all(set(m.unique().tolist()) <= {0.0, 1.0} for m in (fused.ins, fused.outs))
    slopes = torch.autograd.functional.jacobian(lambda v: fused(v[None])[0], x[0])
    assert slopes.triu().abs().max() <= 1e-6 * slopes.abs().max()


def test_a_buffer_that_is_no_statistic_is_the_anchors():
    nets = [Masked(8, 0.5), Masked(8, 1.5)]
    for anchor in (0, 1):
        fused = fxfuse.fuse(nets, torch.randn(64, 6), anchor=anchor)
        assert torch.equal(fused.scale, nets[anchor].scale)


def test_couplings_made_of_plans_are_used_by_default():
    assert fxfuse.Method().coupling.maps is two_maps
