"""Room for units: the mean of the networks where there is enough, the plain fusion at none."""

import pytest
import torch
from conftest import FUNCTION
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import (
    PaddedShortcut,
    Tokens,
    conv,
    gap,
    mlp,
    moved,
    outputs,
    randomise,
    residual,
    stages,
)
from torch import nn

import fxfuse
from fxfuse.errors import ArgumentError
from fxfuse.layerwise import LayerByLayer
from fxfuse.refit import MatchMoments
from fxfuse.room import deepest_first, evenly
from fxfuse.zipping import Zip

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PAIRS = {
    "depths": lambda: ([mlp(6, 8, 8, 8, 3), mlp(6, 5, 5, 3)], X),
    "residual": lambda: ([residual((6, 4), (8, 2)), residual((6, 2), (7, 1))], IMAGES),
    "stages": lambda: ([stages([6], [8, 8], [8]), stages([5], [7], [8, 8])], IMAGES),
    "three": lambda: ([mlp(6, 7, 7, 3), mlp(6, 5, 3), mlp(6, 4, 4, 3)], X),
}


def pair(name):
    nets, x = PAIRS[name]()
    return [randomise(net, seed) for seed, net in enumerate(nets)], x


def mean_of(nets, x, shares=None):
    shares = shares or [1 / len(nets)] * len(nets)
    return sum(w * outputs(net, x) for w, net in zip(shares, nets))


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def size(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("choices", [{}, {"refit": MatchMoments()}], ids=["default", "moments"])
def test_with_room_for_all_the_outputs_are_the_mean(name, choices):
    nets, x = pair(name)
    shares = [0.5, 0.3, 0.2][: len(nets)]
    shares = [s / sum(shares) for s in shares]
    method = fxfuse.Method(**choices)
    fused = fxfuse.fuse(nets, x, weights=shares, width=float("inf"), method=method)
    assert relative(outputs(fused, x), mean_of(nets, x, shares)) < FUNCTION
    assert not fused.meta["fxfuse"].narrow


@settings(max_examples=12)
@given(
    st.lists(st.integers(2, 9), min_size=1, max_size=3),
    st.lists(st.integers(2, 9), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_any_widths_and_depths_fit_side_by_side(first, second, seed):
    nets = [randomise(mlp(6, *widths, 3), seed + i) for i, widths in enumerate((first, second))]
    fused = fxfuse.fuse(nets, X, width=100.0)
    assert relative(outputs(fused, X), mean_of(nets, X)) < FUNCTION


def test_between_nothing_and_all_the_network_grows():
    nets, x = pair("residual")
    plain, same = fxfuse.fuse(nets, x), fxfuse.fuse(nets, x, width=1.0)
    assert not moved(plain, same)
    sizes = [size(fxfuse.fuse(nets, x, width=width)) for width in (1.0, 1.25, 1.5, 2.0, 9.0)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4  # two of one width fill twice of it


def test_units_that_are_alike_share_a_place_before_those_that_are_not():
    nets = [randomise(mlp(12, 8, 3), seed) for seed in (1, 2)]
    for net, reads in zip(nets, ([0, 1, 2, 3, 4, 5, 6, 7], [8, 4, 9, 0, 2, 10, 6, 7])):
        net[0].weight.data = torch.eye(12)[reads]
        net[0].bias.data.zero_()
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    fused = fxfuse.fuse(nets, x, width=11 / 8)
    assert fused.get_submodule("0").out_features == 11
    assert relative(outputs(fused, x), mean_of(nets, x)) < FUNCTION


def test_a_network_that_is_evenly_wider_still_loads_and_trains():
    nets, x = pair("depths")
    fused = fxfuse.fuse(nets, x, width=1.5, method=fxfuse.Method(room=evenly))
    wide = mlp(6, 12, 12, 12, 3)
    assert fused.get_submodule("0").out_features == 12
    wide.load_state_dict(fused.state_dict())
    assert gap(fused, wide, x) == 0
    fused.train()(x).sum().backward()
    assert all(p.grad is not None for p in fused.parameters())


@pytest.mark.parametrize("width", [1.3, 1.5, 1.7, 1.9])
@pytest.mark.parametrize("room", [evenly, deepest_first])
def test_sizes_that_come_in_equal_parts_are_rounded_not_left_as_they_were(width, room):
    nets = [
        randomise(nn.Sequential(conv(3, 8), PaddedShortcut(8, 16), PaddedShortcut(16, 32)), s)
        for s in (1, 2)
    ]
    nets = [
        nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)) for net in nets
    ]
    fused = fxfuse.fuse(nets, IMAGES, width=width, method=fxfuse.Method(room=room))
    assert not fused.meta["fxfuse"].narrow


def test_norms_over_units_keep_their_width_and_what_is_inside_grows():
    nets = [randomise(Tokens(depth=d), d) for d in (3, 2)]
    x = torch.randn(8, *IMAGES.shape[1:])
    fused = fxfuse.fuse(nets, x, width=2.0)
    assert size(fused) > size(fxfuse.fuse(nets, x))
    assert bool(outputs(fused, x).isfinite().all())


@pytest.mark.parametrize("coupling", [Zip()])
def test_other_couplings_leave_room_too(coupling):
    nets, x = pair("stages")
    method = fxfuse.Method(coupling=coupling)
    fused = fxfuse.fuse(nets, x, width=9.0, method=method, anchor=0)
    assert relative(outputs(fused, x), mean_of(nets, x)) < FUNCTION


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0.5}, "width 0.5"),
        ({"width": float("nan")}, "width nan"),
        ({"width": 2.0, "heads": fxfuse.heads.Separate()}, "different tasks"),
        ({"width": 2.0, "method": fxfuse.Method(coupling=LayerByLayer())}, "every layer by itself"),
    ],
)
def test_widths_that_cannot_be_are_refused(options, words):
    nets = [randomise(nn.Sequential(*mlp(6, 5, 5, 3)), s) for s in (1, 2)]
    with pytest.raises(ArgumentError, match=words) as caught:
        fxfuse.fuse(nets, X, **options)
    assert all([caught.value.met, caught.value.where, caught.value.expected, caught.value.do])
