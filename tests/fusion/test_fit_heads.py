"""Heads behind a trunk that is not their own: refitted to what their networks give, or left."""

import sys

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.refit.moments import Outcome
from tests.support.nets import Tokens, mlp, outputs, randomise, residual, stages
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION

APART = sys.modules["fxfuse.fusion._apart"]


def unlike():
    """Two networks of one structure that have nothing in common."""
    return [randomise(residual((6, 2), (8, 1)), seed) for seed in (1, 2)]


def images(count, seed=5):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def as_taken_over(graft, own, *_):
    """A head as it reads the trunk, without a fit."""
    return graft.module, Outcome()


def missed(nets, fused, x):
    """Squared error of each head, relative to the variance of what its network gives."""
    pairs = zip((outputs(n, x) for n in nets), outputs(fused, x), strict=True)
    return [float((a - b).square().mean() / a.var(0).mean()) for a, b in pairs]


NETS = {  # networks, their inputs, layers to cut behind
    "residual": (unlike, images, ["0.0", "1.0", None]),
    "plain": (
        lambda: [randomise(stages([5, 6], [7], hidden=(6,)), s) for s in (1, 2)],
        images,
        ["0.0", "0.3"],
    ),
    "tokens": (lambda: [randomise(Tokens(depth=2), s) for s in (1, 2)], images, ["blocks.0"]),
    "linear": (
        lambda: [randomise(mlp(6, 8, 8, 8, 3), s) for s in (1, 2)],
        lambda count, seed=5: torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)),
        ["0", "2", None],
    ),
}


@pytest.mark.parametrize("name", some(NETS, "plain"))
def test_a_fit_brings_every_head_nearer_to_its_network_on_other_samples(name, monkeypatch):
    make, draw, cuts = NETS[name]
    nets, x, others = make(), draw(256), draw(128, seed=6)
    for after in cuts:
        heads = fxfuse.heads.Separate(after=after)
        fitted = missed(nets, fxfuse.fuse(nets, x, heads=heads), others)
        with monkeypatch.context() as patch:
            patch.setattr(APART, "refitted", as_taken_over)
            plain = missed(nets, fxfuse.fuse(nets, x, heads=heads), others)
        assert max(fitted) < max(plain) and sum(fitted) < 0.9 * sum(plain)


def test_norms_in_a_head_have_the_statistics_of_what_they_read():
    nets, x = unlike(), images(128)
    fused = fxfuse.fuse(nets, x, heads=fxfuse.heads.Separate(after="0.0"))
    head = fused.get_submodule("heads.1")
    seen = {}
    for name, part in head.named_modules():
        if isinstance(part, nn.BatchNorm2d):
            part.register_forward_pre_hook(lambda m, i, name=name: seen.update({name: i[0]}))
    outputs(fused, x)
    for name, value in seen.items():
        mean, norm = value.mean((0, 2, 3)), head.get_submodule(name)
        spread = norm.running_var.sqrt()
        assert ((norm.running_mean - mean).abs() < 0.02 * spread).all()
        assert (norm.running_var / value.var((0, 2, 3)) - 1).abs().max() < 0.05


def test_a_refit_that_keeps_the_function_keeps_that_of_heads(monkeypatch):
    nets, x = unlike(), images(64)
    for after in ("0.0", "1.0"):
        heads = fxfuse.heads.Separate(after=after)
        kept = fxfuse.presets.average(nets, x, heads=heads)
        with monkeypatch.context() as patch:
            patch.setattr(APART, "refitted", as_taken_over)
            plain = fxfuse.presets.average(nets, x, heads=heads)
        assert max(map(gap, outputs(plain, x), outputs(kept, x))) < FUNCTION


def gap(a, b):
    return float((a - b).abs().max() / a.abs().max())


def test_the_report_says_how_far_each_head_is_from_its_network():
    nets, x = unlike(), images(64)
    fused = fxfuse.fuse(nets, x, heads=fxfuse.heads.Separate(after="1.0"))
    report = fused.meta["fxfuse"]
    for net, given, distance in zip(nets, outputs(fused, x), report.apart, strict=True):
        p, q = outputs(net, x).double().log_softmax(1), given.double().log_softmax(1)
        assert abs(float((p.exp() * (p - q)).sum(1).mean()) - distance) < 1e-4
    assert str(report).count(" nats") >= 2 and "heads.1." in report.layers[-1].node
