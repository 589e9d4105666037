"""Units with places of their own: which get them, and what a fused network with them computes.

With places for all units it computes the mean of the networks, with none it is the plain fusion.
"""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxfuse
from fxfuse.coupling.transport import LayerByLayer
from fxfuse.coupling.zipit import Zip
from fxfuse.errors import ArgumentError
from fxfuse.graph.trace import trace
from fxfuse.refit.moments import MatchMoments
from fxfuse.refit.sweep import LeastSquares
from fxfuse.spaces.network import Network
from fxfuse.width.budget import deepest_first, evenly
from tests.support.nets import (
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
from tests.support.sweeps import crossed
from tests.support.tolerances import FUNCTION


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


VECTORS, FEW_IMAGES = drawn(40, 6), drawn(12, 3, 8, 8)
X, IMAGES = drawn(60, 6), drawn(24, 3, 8, 8)

# --- which units get places -------------------------------------------------------------------


def network(net, x):
    return Network.of("net", trace(net.eval()), (x,))


def all_units(base, more=1.0):
    """In each space, candidates of another network: `more` times as many units as the base has."""
    return {s.name: [(1, u) for u in range(int(s.size * more))] for s in base.spaces}


def counts(places):
    return {name: len(owners) for name, owners in places.items()}


def multiply_adds(net, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return counter.get_total_flops()


@given(st.lists(st.integers(2, 12), min_size=1, max_size=4), st.floats(1.0, 3.0))
@example([5], 1.5)  # both round halves to the even number
@settings(max_examples=30, deadline=None)
def test_no_more_multiply_adds_than_an_evenly_wider_network(widths, width):
    base = network(mlp(6, *widths, 3), VECTORS)
    candidates = all_units(base)
    gained = counts(deepest_first(base, width, candidates))
    wide = [w + n for w, n in zip(widths, gained.values())]
    even = [w + n for w, n in zip(widths, counts(evenly(base, width, candidates)).values())]
    assert multiply_adds(mlp(6, *wide, 3), VECTORS) <= multiply_adds(mlp(6, *even, 3), VECTORS)
    incomplete = [name for name, n in gained.items() if n < len(candidates[name])]
    begun, order = [name for name, n in gained.items() if n], list(gained)
    deepest = order.index(incomplete[-1]) if incomplete else 0
    assert all(order.index(name) >= deepest for name in begun)


@given(st.floats(1.0, 3.0))
@settings(max_examples=10, deadline=None)
def test_one_more_unit_would_not_fit(width):
    base = network(mlp(6, 8, 9, 7, 3), VECTORS)
    candidates = all_units(base)
    gained = counts(deepest_first(base, width, candidates))
    if gained == counts(candidates):
        return
    name = [n for n in gained if gained[n] < len(candidates[n])][-1]
    sizes = {s.name: s.size + gained[s.name] + (s.name == name) for s in base.spaces}
    limit = [s.size + round(s.size * (min(width, 2.0) - 1)) for s in base.spaces]
    assert multiply_adds(mlp(6, *sizes.values(), 3), VECTORS) > multiply_adds(
        mlp(6, *limit, 3), VECTORS
    )


def test_places_that_one_space_does_not_use_go_to_the_others():
    base = network(mlp(6, 8, 8, 8, 3), VECTORS)
    candidates = all_units(base)
    first, *rest = candidates
    others = {first: [], **{name: candidates[name] for name in rest}}
    by_depth, by_factor = deepest_first(base, 1.5, others), evenly(base, 1.5, others)
    assert sum(map(len, by_depth.values())) > sum(map(len, by_factor.values()))


def test_a_stream_is_half_as_deep_as_the_last_layer():
    base = network(residual((6, 3)).eval(), FEW_IMAGES)
    stream = max(base.spaces, key=lambda s: len(s.axes)).name
    inner = [s.name for s in base.spaces if s.name != stream]
    places = deepest_first(base, 1.6, all_units(base))
    full = {name for name, owners in places.items() if len(owners) == base.spaces[name].size}
    assert inner[-1] in full and not places[inner[0]]


@pytest.mark.parametrize("smaller", [1, 2])
def test_the_network_with_the_fewest_units_comes_first(smaller):
    base = network(mlp(6, 8, 8, 8, 3), VECTORS)
    needs = {k: 3 if k == smaller else 8 for k in (1, 2)}
    candidates = {s.name: [(k, u) for k in (1, 2) for u in range(needs[k])] for s in base.spaces}
    for width, whole in ((1.2, False), (1.7, True)):
        places = deepest_first(base, width, candidates)
        owners = [k for of_space in places.values() for k, _ in of_space]
        assert owners.count(smaller) == 9 if whole else set(owners) == {smaller}


@pytest.mark.parametrize("room", [evenly, deepest_first])
@pytest.mark.parametrize("width", [3.0, 7.5, math.inf])
def test_with_room_for_all_every_unit_gets_a_place(room, width):
    base = network(residual((6, 2), (8, 2)).eval(), FEW_IMAGES)
    candidates = all_units(base, 2.0)
    assert counts(room(base, width, candidates)) == counts(candidates)


def test_the_fused_network_grows_most_in_its_deepest_layers():
    nets = [randomise(mlp(6, 16, 16, 16, 3), seed) for seed in (1, 2)]
    fused = fxfuse.fuse(nets, VECTORS, width=1.5)
    assert isinstance(fused.get_submodule("4"), nn.Linear)
    sizes = [m.out_features for m in fused.modules() if isinstance(m, nn.Linear)]
    assert sizes[2] == 32 and sizes[0] < sizes[1] < 32


# --- what the fused network computes ----------------------------------------------------------

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


@pytest.mark.parametrize(("name", "refit"), crossed(PAIRS, [LeastSquares(), MatchMoments()]))
def test_with_places_for_all_units_the_outputs_are_the_mean(name, refit):
    nets, x = pair(name)
    shares = [0.5, 0.3, 0.2][: len(nets)]
    shares = [s / sum(shares) for s in shares]
    method = fxfuse.Method(refit=refit)
    fused = fxfuse.fuse(nets, x, weights=shares, width=float("inf"), method=method)
    assert relative(outputs(fused, x), mean_of(nets, x, shares)) < FUNCTION
    assert not fused.meta["fxfuse"].narrow


@settings(max_examples=12)
@given(
    st.lists(st.integers(2, 9), min_size=1, max_size=3),
    st.lists(st.integers(2, 9), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_networks_of_any_widths_and_depths_fit_side_by_side(first, second, seed):
    nets = [randomise(mlp(6, *widths, 3), seed + i) for i, widths in enumerate((first, second))]
    fused = fxfuse.fuse(nets, X, width=100.0)
    assert relative(outputs(fused, X), mean_of(nets, X)) < FUNCTION


def test_the_network_grows_with_the_width_until_all_units_have_places():
    nets, x = pair("residual")
    plain, same = fxfuse.fuse(nets, x), fxfuse.fuse(nets, x, width=1.0)
    assert not moved(plain, same)
    sizes = [size(fxfuse.fuse(nets, x, width=width)) for width in (1.5, 2.0, 9.0)]
    sizes = [size(same), *sizes]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3  # two of one width fill twice of it


def test_the_units_least_alike_get_the_places():
    nets = [randomise(mlp(12, 8, 3), seed) for seed in (1, 2)]
    for net, reads in zip(nets, ([0, 1, 2, 3, 4, 5, 6, 7], [8, 4, 9, 0, 2, 10, 6, 7])):
        net[0].weight.data = torch.eye(12)[reads]
        net[0].bias.data.zero_()
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    fused = fxfuse.fuse(nets, x, width=11 / 8)
    assert fused.get_submodule("0").out_features == 11
    assert relative(outputs(fused, x), mean_of(nets, x)) < FUNCTION


def test_an_evenly_wider_network_loads_into_its_class_and_trains():
    nets, x = pair("depths")
    fused = fxfuse.fuse(nets, x, width=1.5, method=fxfuse.Method(room=evenly))
    wide = mlp(6, 12, 12, 12, 3)
    assert fused.get_submodule("0").out_features == 12
    wide.load_state_dict(fused.state_dict())
    assert gap(fused, wide, x) == 0
    fused.train()(x).sum().backward()
    assert all(p.grad is not None for p in fused.parameters())


@pytest.mark.parametrize(("width", "room"), crossed([1.3, 1.5, 1.7, 1.9], [evenly, deepest_first]))
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


def test_spaces_under_norms_keep_their_width_and_those_inside_blocks_grow():
    nets = [randomise(Tokens(depth=d), d) for d in (3, 2)]
    x = torch.randn(8, *IMAGES.shape[1:])
    fused = fxfuse.fuse(nets, x, width=2.0)
    assert size(fused) > size(fxfuse.fuse(nets, x))
    assert bool(outputs(fused, x).isfinite().all())


@pytest.mark.parametrize("coupling", [Zip()])
def test_other_couplings_give_places_too(coupling):
    nets, x = pair("stages")
    method = fxfuse.Method(coupling=coupling)
    fused = fxfuse.fuse(nets, x, width=9.0, method=method, anchor=0)
    assert relative(outputs(fused, x), mean_of(nets, x)) < FUNCTION


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0.5}, "width 0.5"),
        ({"width": float("nan")}, "width nan"),
        ({"width": 2.0, "method": fxfuse.Method(coupling=LayerByLayer())}, "every layer by itself"),
    ],
)
def test_impossible_widths_are_refused(options, words):
    nets = [randomise(nn.Sequential(*mlp(6, 5, 5, 3)), s) for s in (1, 2)]
    with pytest.raises(ArgumentError, match=words) as caught:
        fxfuse.fuse(nets, X, **options)
    assert all([caught.value.met, caught.value.where, caught.value.expected, caught.value.do])
