"""A contraction fitted at some positions, and the sweep over all of them.

A fit is checked on the whole values. The sweep has to come nearer to the parents than moments
alone, never much further away, and to be exact where it must be.
"""

import math
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.calibration.moments import Moments
from fxfuse.calibration.positions import Positions
from fxfuse.calibration.rows import input_rows, output_rows
from fxfuse.calibration.spill import SpillStore, _memory_of
from fxfuse.coupling.transport import Transport
from fxfuse.graph.trace import trace
from fxfuse.refit._targets import Goal, aims_of
from fxfuse.refit.moments import MatchMoments
from fxfuse.refit.sweep import Fit, LeastSquares, moments_of_rows
from fxfuse.spaces.network import Network
from tests.support.nets import (
    Concat,
    GroupedBottleneck,
    Inverted,
    Pooled,
    Residual,
    Tokens,
    conv,
    fitted,
    gap,
    mlp,
    moved,
    outputs,
    randomise,
    residual,
    stages,
)
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION

RIDGES = (1e-6, 1e-2)


KINDS = {
    "bias": lambda: conv(3, 4, norm=False, act=False),
    "norm": lambda: conv(3, 4, act=False),
    "neither": lambda: nn.Conv2d(3, 4, 3, padding=1, bias=False),
    "groups": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "relu": lambda: conv(3, 4, norm=False),
}


def case(kind, seed=0, count=40):
    """Return a network whose first contraction is to be fitted, its aim and an input."""
    width = 6 if kind == "groups" else 4
    net = randomise(nn.Sequential(KINDS[kind](), nn.Conv2d(width, 2, 1)), seed)
    inputs = next(p for p in net.parameters() if p.dim() == 4).shape[1] * (1 + (kind == "groups"))
    x = torch.randn(count, inputs, 6, 6, generator=torch.Generator().manual_seed(seed + 50))
    network = Network.of("net", trace(net.eval()), (x[:2],))
    aim = next(iter(aims_of(network)[1].values()))
    return network, aim, x + 0.5


def value_at(network, x, name):
    seen = {}
    for part, module in network.module.named_modules():
        if part.replace(".", "_") == name.strip("_"):
            module.register_forward_hook(lambda m, i, out: seen.update(value=out.clone()))
    outputs(network.module, x)
    return seen["value"]


def fit_of(network, aim, x, wanted, activated=None):
    at = torch.arange(len(x) * 36)
    rows = [None if t is None else output_rows(t, 1, at) for t in (wanted, activated)]
    goal = Goal(Positions([at], [len(at) * 3 // 4], 0, [at]), [], *rows)
    return Fit(network, aim, goal, input_rows(x, aim.producer.affine, at), None, torch.relu, RIDGES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_within_reach_is_reached(kind):
    network, aim, x = case(kind)
    other, _, _ = case(kind, seed=1)
    wanted = value_at(other, x, aim.at)
    activated = wanted.relu() if aim.activation else None
    fit_of(network, aim, x, wanted, activated)(1)
    error = value_at(network, x, aim.at) - wanted
    assert float(error.square().mean() / wanted.var()) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_is_met_changes_nothing(kind):
    network, aim, x = case(kind)
    wanted = value_at(network, x, aim.at)
    state = {k: t.clone() for k, t in network.module.state_dict().items()}
    activated = wanted.relu() if aim.activation else None
    correction = fit_of(network, aim, x, wanted, activated)(1)
    assert correction.weight is None
    assert torch.allclose(value_at(network, x, aim.at), wanted, atol=1e-5)
    if aim.producer.norm is None:  # which takes what its contraction is scaled by
        weight = state[aim.producer.weight]
        assert torch.allclose(network.module.state_dict()[aim.producer.weight], weight, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bias", "norm", "groups"])
def test_units_get_the_mean_of_what_is_wanted_and_the_activated_their_spread(kind):
    network, aim, x = case(kind)
    wanted = torch.randn(value_at(network, x, aim.at).shape) * 3 + 2
    fit_of(network, aim, x, wanted)(1)
    given = value_at(network, x, aim.at).movedim(1, 0).flatten(1)
    assert torch.allclose(given.mean(1), wanted.movedim(1, 0).flatten(1).mean(1), atol=1e-4)


def test_steps_follow_the_gradient_of_what_the_activations_lack():
    gradients = []
    for steps in (0, 1, 3):
        network, aim, x = case("relu", count=200)
        aim = replace(aim, needs_spread=False)
        others = [case("relu", seed=s)[0] for s in (1, 2)]
        values = [value_at(o, x, aim.at) for o in others]
        activated = sum(v.relu() for v in values) / 2
        fit_of(network, aim, x, sum(values) / 2, activated)(steps)
        lacking, at = value_at(network, x, aim.at).relu() - activated, torch.arange(200 * 36)
        left = output_rows(lacking, 1, at)
        reads = input_rows(x, aim.producer.affine, at)[0]
        gradients.append(float(((reads - reads.mean(0)).T @ (left - left.mean(0))).norm()))
    assert gradients[0] > gradients[1] > gradients[2]


@given(st.integers(1, 50), st.integers(1, 4), st.integers(0, 99))
def test_moments_of_rows_are_those_of_units(count, units, seed):
    rows = torch.randn(count, units, generator=torch.Generator().manual_seed(seed)) * 3 + 5
    moments, expected = moments_of_rows(rows), Moments()
    expected.add(rows.T)
    for name in ("mean", "spread", "rms"):
        assert np.allclose(getattr(moments, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


MOMENTS = fxfuse.Method(refit=MatchMoments())


def body(*parts, width):
    return nn.Sequential(conv(3, 6), *parts, Pooled(width, 3))


PAIRS = {
    "plain": (lambda: mlp(6, 16, 12, 3), lambda: mlp(6, 12, 3)),
    "no biases": (lambda: mlp(6, 16, 12, 3, bias=False), lambda: mlp(6, 12, 3, bias=False)),
    "stages": (
        lambda: stages([6, 6], [8], norm=False, hidden=(7,)),
        lambda: stages([5], [8], norm=False, hidden=(9,)),
    ),
    "residual": (
        lambda: residual((6, 3), (8, 2)),
        lambda: residual((4, 1), (6, 2), stem=4),
    ),
    "grouped": (
        lambda: body(GroupedBottleneck(6, 8, 2), GroupedBottleneck(6, 8, 2), width=6),
        lambda: body(GroupedBottleneck(6, 8, 2), width=6),
    ),
    "concat": (lambda: body(Concat(6, 3), Concat(9, 5), width=14),) * 2,
    "gate": (
        lambda: body(Inverted(6, 9, gate=4), Inverted(6, 9, gate=4), width=6),
        lambda: body(Inverted(6, 9, gate=4), width=6),
    ),
    "tokens": (lambda: Tokens(depth=3), lambda: Tokens(12, 3, 16, depth=1)),
}


def pair_of(name, seed=0):
    return [randomise(make(), seed + i) for i, make in enumerate(PAIRS[name], 1)]


def draw(name, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if name in ("plain", "no biases"):
        return torch.randn(count, 6, generator=generator)
    small = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(small, size=8, mode="bilinear") * 1.5


def error(nets, fused, x, weights=None):
    """Mean squared error against the weighted mean of the parents' outputs, of its variance."""
    weights = weights or [1 / len(nets)] * len(nets)
    target = sum(w * outputs(n, x) for w, n in zip(weights, nets))
    return float(((outputs(fused, x) - target) ** 2).mean() / target.var(0).mean())


@pytest.mark.parametrize("name", some(PAIRS, "plain", "gate"))
def test_new_data_see_less_error_than_with_moments_alone_even_from_30_samples(name):
    nets, new = pair_of(name), draw(name, 500, 99)
    errors = {}
    for count in (30, 200):
        x = draw(name, count)
        errors[count] = error(nets, fxfuse.fuse(nets, x), new)
        assert errors[count] < 0.9 * error(nets, fxfuse.fuse(nets, x, method=MOMENTS), new), count
    assert errors[200] < 1.1 * errors[30]


def test_three_networks_of_three_depths_and_widths():
    kinds = ((6, 3), (8, 2)), ((4, 1), (6, 2)), ((5, 2), (7, 1))
    nets = [randomise(residual(*k, stem=k[0][0]), i) for i, k in enumerate(kinds, 1)]
    x, new, weights = draw("residual", 200), draw("residual", 500, 99), [0.5, 0.3, 0.2]
    swept, settled = (
        error(nets, fxfuse.fuse(nets, x, weights=weights, method=method), new, weights)
        for method in (None, MOMENTS)
    )
    assert swept < 0.8 * settled and swept < 0.7


@pytest.mark.parametrize("name", ["plain", "stages", "residual", "grouped", "gate", "tokens"])
def test_all_weight_on_the_anchor_gives_the_anchor(name):
    nets, x = pair_of(name), draw(name, 60)
    fused = fxfuse.fuse(nets, x, weights=[1, 0], anchor=0)
    assert gap(nets[0], fused, x) < FUNCTION


def test_layers_reported_cover_the_contractions_and_the_divergence_is_what_it_says():
    nets, x = pair_of("residual"), draw("residual", 150)
    fused = fxfuse.fuse(nets, x, weights=[0.7, 0.3])
    report = fused.meta["fxfuse"]
    assert len(report.layers) == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in fused.modules())
    assert all(-1 < layer.explained <= 1 and layer.ridge > 0 for layer in report.layers)
    x = fitted(x)
    mean = (0.7 * outputs(nets[0], x) + 0.3 * outputs(nets[1], x)).log_softmax(1)
    expected = (mean.exp() * (mean - outputs(fused.eval(), x).log_softmax(1))).sum(1).mean()
    assert report.divergence == pytest.approx(float(expected), rel=1e-3)
    assert f"{report.divergence:.3f} nats" in str(report)


def test_the_report_warns_of_what_is_poorly_explained():
    nets = [randomise(stages([6], [8, 8], [8]), s) for s in (1, 2)]
    method = fxfuse.Method(coupling=Transport())  # means of units that have nothing in common
    report = fxfuse.fuse(nets, torch.randn(60, 3, 8, 8), method=method).meta["fxfuse"]
    assert report.poor and str(report).count("\n  ") == len(report.poor)
    same = fxfuse.fuse([nets[0]] * 2, torch.randn(60, 3, 8, 8)).meta["fxfuse"]
    assert not same.poor and "warning" not in str(same)
    assert all(layer.explained > 1 - 1e-6 and math.isinf(layer.ridge) for layer in same.layers)


def test_norms_get_the_statistics_of_what_they_read():
    nets, x = pair_of("residual"), draw("residual", 100)
    fused, read = fxfuse.fuse(nets, x).eval(), {}
    norms = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_hook(lambda m, inputs, out: read.update({m: inputs[0]}))
    outputs(fused, x)
    for norm in norms:
        flat = read[norm].transpose(0, 1).flatten(1)
        scale = float(flat.std(1, correction=0).max())
        assert torch.allclose(norm.running_mean, flat.mean(1), atol=1e-4 * scale)
        assert torch.allclose(norm.running_var.sqrt(), flat.std(1, correction=0), atol=1e-4 * scale)


def test_with_little_room_for_products_few_positions_are_fitted():
    nets, x = pair_of("residual"), draw("residual", 60)
    fused = [
        fxfuse.fuse(nets, x, method=fxfuse.Method(refit=LeastSquares(gram=gram)))
        for gram in (0, 8 * 150**2)
    ]
    plain, some = ([layer.ridge for layer in f.meta["fxfuse"].layers] for f in fused)
    assert all(math.isinf(ridge) for ridge in plain) and not all(map(math.isinf, some))
    new = draw("residual", 200, 9)
    assert error(nets, fused[1], new) < error(nets, fused[0], new)


@pytest.mark.parametrize("choice", [{"ridges": (0.5,)}, {"rows": 2}, {"steps": 0}])
def test_each_option_changes_the_result(choice):
    nets, x = pair_of("residual"), draw("residual", 60)
    other = fxfuse.fuse(nets, x, method=fxfuse.Method(refit=LeastSquares(**choice)))
    assert moved(fxfuse.fuse(nets, x), other)


def test_networks_of_other_widths_run_on_the_same_batches(monkeypatch):
    monkeypatch.setattr("fxfuse.calibration.run.BATCH_BYTES", 1 << 13)
    nets = [randomise(stages([c], [c], [8]), c) for c in (4, 12)]
    for anchor in (0, 1):
        fused = fxfuse.fuse(nets, draw("stages", 30), anchor=anchor)
        assert fused.meta["fxfuse"].layers


def test_one_sample_and_units_that_never_vary_do_no_harm():
    nets = pair_of("stages")
    for net in nets:
        net[0][0][0].bias.data[:3] = -100.0
    for count in (1, 2, 5):
        fused = fxfuse.fuse(nets, draw("stages", count))
        assert bool(outputs(fused, draw("stages", 50, 9)).isfinite().all())
    x, new = draw("stages", 200), draw("stages", 500, 99)
    assert error(nets, fxfuse.fuse(nets, x), new) < error(
        nets, fxfuse.fuse(nets, x, method=MOMENTS), new
    )


class Sequence(nn.Module):
    """Linear layers on sequences whose samples are the second axis."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x):
        x = torch.relu(self.a(x.transpose(0, 1)))
        x = x + torch.relu(self.b(self.norm(x)))
        return self.head(x.mean(0))


def test_sequences_in_front_of_samples_are_taken_as_they_are():
    nets = [randomise(Sequence(w), w) for w in (8, 6)]
    x, new = torch.randn(60, 5, 6), torch.randn(300, 5, 6)
    method = fxfuse.Method(refit=MatchMoments())
    assert error(nets, fxfuse.fuse(nets, x), new) < error(
        nets, fxfuse.fuse(nets, x, method=method), new
    )


def test_projections_beside_a_block_are_refitted_without_its_branch():
    nets = [randomise(body(Residual(6, w), width=w), w) for w in (8, 10)]
    x, new = draw("residual", 200), draw("residual", 500, 99)
    swept, settled = (
        error(nets, fxfuse.fuse(nets, x, method=method), new) for method in (None, MOMENTS)
    )
    assert swept < 0.8 * settled


@pytest.mark.parametrize("name", some(PAIRS, "plain", "grouped"))
def test_values_that_lie_in_a_file_give_the_same_network_bit_for_bit(name, monkeypatch):
    monkeypatch.setattr("fxfuse.calibration.run.CACHED_BYTES", 1 << 12)
    nets, x = pair_of(name), draw(name, 60)
    plain = fxfuse.fuse(nets, x)
    files, real = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **k: files.append(real(**k)) or files[-1])
    for budget in (0, 1 << 14):
        other = fxfuse.fuse(nets, x, method=fxfuse.Method(refit=LeastSquares(frontier=budget)))
        states = plain.state_dict(), other.state_dict()
        assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states)))
        assert plain.meta["fxfuse"].divergence == other.meta["fxfuse"].divergence
    assert files and all(file.closed for file in files)


def test_what_is_in_memory_at_rest_is_within_the_budget(monkeypatch):
    monkeypatch.setattr("fxfuse.calibration.run.CACHED_BYTES", 1 << 12)
    nets, x, most = pair_of("residual"), draw("residual", 60), [0, 0]
    put, take, resting = SpillStore.put, SpillStore.take, {}

    def seen_put(store, values, elsewhere=()):
        waiting = put(store, values, elsewhere)
        resting[waiting] = _memory_of(waiting.values, elsewhere)
        in_memory = {
            a: p.nbytes() for w, m in resting.items() if not w.places for a, p in m.items()
        }
        in_file = [piece for w, memory in resting.items() if w.places for piece in memory]
        most[0], most[1] = max(most[0], sum(in_memory.values())), max(most[1], len(in_file))
        return waiting

    def seen_take(store, waiting):
        resting.pop(waiting)
        return take(store, waiting)

    monkeypatch.setattr(SpillStore, "put", seen_put)
    monkeypatch.setattr(SpillStore, "take", seen_take)
    for budget in (1 << 14, 1 << 18):
        most[0] = 0
        resting.clear()
        fxfuse.fuse(nets, x, method=fxfuse.Method(refit=LeastSquares(frontier=budget)))
        assert 0 < most[0] <= budget and most[1] == 0


def test_the_file_is_closed_after_an_error(monkeypatch):
    files, real = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **k: files.append(real(**k)) or files[-1])
    monkeypatch.setattr("fxfuse.refit.sweep.Fit.__call__", lambda *a: 1 / 0)
    nets, x = pair_of("residual"), draw("residual", 60)
    with pytest.raises(ZeroDivisionError):
        fxfuse.fuse(nets, x, method=fxfuse.Method(refit=LeastSquares(frontier=0)))
    assert files and all(file.closed for file in files)


class Routed(nn.Module):
    """Experts that read the samples that a router gives them, a few or none of a batch."""

    def __init__(self):
        super().__init__()
        self.a, self.r, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = torch.tanh(self.a(x))
        out, best = torch.zeros_like(x), self.r(x).argmax(1)
        for i, expert in enumerate(self.experts):
            rows = torch.where(best == i)[0]
            out = out.index_add(0, rows, expert(x[rows]))
        return self.c(out)


class Projected(nn.Module):
    """Divides a weight by what it makes of a vector, which no sample has a part in."""

    def __init__(self):
        super().__init__()
        self.a, self.u, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("v", torch.ones(8))

    def forward(self, x):
        size = (self.u.weight @ self.v).norm() + 1
        return self.c(torch.relu(self.a(x)) @ (self.u.weight / size).T)


@pytest.mark.parametrize("kind", [Routed, Projected])
def test_contractions_of_few_samples_or_of_none_stay_as_they_were_mixed(kind):
    net, x = randomise(kind(), 1), torch.randn(40, 6)
    fused = fxfuse.fuse([net, fxfuse.permute(net, x[:4], seed=3)], x)
    assert gap(net, fused, torch.randn(30, 6)) < 1e-5


class Rounded(nn.Module):
    """Its last layers read a constant, but for the rounding of `z + (code - z)`."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
        self.code = nn.Parameter(torch.randn(8))

    def forward(self, x):
        z = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(z + (self.code - z)))) + z[:, :3]


def test_rounding_noise_is_no_spread_to_be_corrected():
    nets = [randomise(Rounded(), seed) for seed in (0, 1)]
    fused = fxfuse.fuse(nets, torch.randn(40, 6), weights=[1, 0])
    for name, tensor in nets[0].state_dict().items():
        assert torch.allclose(fused.state_dict()[name], tensor, atol=1e-4), name
