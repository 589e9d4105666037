"""Networks of unlike kinds: fused into the anchor's structure, by targets and not by weights."""

import copy

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.errors import ArgumentError, FusionWarning, PairingError
from fxfuse.refit import AsMixed
from tests.support.nets import build, conv, data_shape, gap, mlp, outputs, randomise, residual
from tests.support.sweeps import some

IMAGES = torch.randn(60, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def unlike(net):
    """The same function of another kind: a leaky rectifier that does not leak."""
    other = copy.deepcopy(net)
    for parent in list(other.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.LeakyReLU(0.0))
    return other


def kinds():
    """A residual network and a plain one, of the same outputs."""
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4)
    plain = nn.Sequential(conv(3, 5), conv(5, 7, stride=2), *pooled)
    nets = residual((6, 1), (8, 1), stem=5, classes=4), plain
    return [randomise(net, seed).eval() for seed, net in enumerate(nets)]


@pytest.mark.parametrize("name", some(["plain", "residual", "grouped", "deep"], "residual"))
def test_a_permuted_copy_of_another_kind_comes_back(name):
    net, x = build(name)
    data = torch.randn(40, *data_shape(name), generator=torch.Generator().manual_seed(1))
    guest = fxfuse.permute(unlike(net), x, seed=3)
    with pytest.raises(PairingError, match="across=True"):
        fxfuse.fuse([net, guest], data)
    fused = fxfuse.fuse([net, guest], data, across=True)
    assert gap(net, fused, x) < 1e-4
    net.load_state_dict(fused.state_dict(), strict=True)
    heard = fused.meta["fxfuse"].guests
    assert [guest.features != {} for guest in heard] == [True]


def test_a_family_and_a_guest_that_agree_come_back():
    net = randomise(mlp(6, 9, 8, 4), 1)
    x = torch.randn(80, 6)
    nets = [unlike(fxfuse.permute(net, x, seed=2)), net, fxfuse.permute(net, x, seed=1)]
    fused = fxfuse.fuse(nets, x, across=True, anchor=1)
    report = fused.meta["fxfuse"]
    assert gap(net, fused, x) < 1e-4 and report.anchor == 1 and len(report.weights) == 3
    assert [s.couplings[0].kind for s in report.spaces] == ["absent", "absent"]
    assert [s.couplings[2].kind for s in report.spaces] == ["permutation", "permutation"]


def test_a_family_is_fused_as_ever():
    nets = [randomise(mlp(6, *hidden, 4), seed) for seed, hidden in enumerate([(9, 9), (7,)])]
    x = torch.randn(80, 6)
    fused = [fxfuse.fuse(nets, x, across=across) for across in (False, True)]
    assert gap(*fused, x) == 0.0 and fused[1].meta["fxfuse"].guests == ()


@pytest.mark.parametrize("anchor", [0, 1])
def test_the_result_is_the_anchors_and_nearer_to_the_ensemble(anchor):
    nets = kinds()
    fused = fxfuse.fuse(nets, IMAGES, across=True, anchor=anchor)
    nets[anchor].load_state_dict(copy.deepcopy(fused.state_dict()), strict=True)
    report = fused.meta["fxfuse"]
    (guest,) = report.guests
    assert report.nearness.fused < min(report.nearness.networks)
    assert len(guest.features) == 1 and guest.name in str(report)
    assert "+" not in str(report.alignment)


def test_what_a_guest_counts_follows_its_weight():
    nets = kinds()
    fused = [fxfuse.fuse(nets, IMAGES, across=True, anchor=0, weights=w) for w in ([1, 0], [0, 1])]
    assert gap(nets[0], fused[0], IMAGES) < 1e-5
    given, wanted = outputs(fused[1], IMAGES)[0], outputs(nets[1], IMAGES)[0]
    own = outputs(nets[0], IMAGES)[0]
    assert (given - wanted).norm() < 0.5 * (own - wanted).norm()


def test_auto_is_no_farther_off_than_the_anchor():
    report = fxfuse.fuse(kinds(), IMAGES, across=True, anchor=0, weights="auto").meta["fxfuse"]
    alone = [d for name, d in report.candidates.items() if name.endswith(" alone")]
    assert min(report.candidates.values()) <= min(alone)
    assert not any("average" in name for name in report.candidates)


def test_a_network_that_is_nearer_alone_is_named():
    net = randomise(mlp(6, 40, 40, 4), 1)
    nets = [unlike(net), randomise(mlp(6, 2, 4), 2)]
    with pytest.warns(FusionWarning, match="alone") as caught:
        x = torch.randn(8, 6)
        fxfuse.fuse(nets, x, across=True, anchor=0, weights=[0.01, 0.99])
    assert "Sequential 1" in str(caught[0].message)


@pytest.mark.parametrize(
    "options",
    [
        {"heads": fxfuse.heads.Separate()},
        {"method": fxfuse.Method(refit=AsMixed())},
        {"method": "hmt"},
    ],
)
def test_what_hears_no_guest_is_refused(options):
    with pytest.raises(ArgumentError, match="across=True"):
        fxfuse.fuse(kinds(), IMAGES, across=True, **options)
