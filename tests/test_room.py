"""Room goes to the deepest spaces, within the multiply-adds of an evenly wider network."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import mlp, randomise, residual
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxfuse
from fxfuse.network import Network
from fxfuse.room import deepest_first, evenly
from fxfuse.tracing import trace

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(net, x):
    return Network.of("net", trace(net.eval()), (x,))


def everyone(base, more=1.0):
    """Let every space have so many times its units that could have places of their own."""
    return {s.name: [(1, u) for u in range(int(s.size * more))] for s in base.spaces}


def counts(found):
    return {name: len(owners) for name, owners in found.items()}


def multiply_adds(net, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return counter.get_total_flops()


@given(st.lists(st.integers(2, 12), min_size=1, max_size=4), st.floats(1.0, 3.0))
@settings(max_examples=30, deadline=None)
def test_no_more_multiply_adds_than_an_evenly_wider_network(widths, width):
    base = network(mlp(6, *widths, 3), X)
    unlike = everyone(base)
    found = counts(deepest_first(base, width, unlike))
    wide = [w + n for w, n in zip(widths, found.values())]
    even = [w + n for w, n in zip(widths, counts(evenly(base, width, unlike)).values())]
    assert multiply_adds(mlp(6, *wide, 3), X) <= multiply_adds(mlp(6, *even, 3), X)
    gaps = [name for name, n in found.items() if n < len(unlike[name])]
    begun = [name for name, n in found.items() if n]
    order = list(found)
    assert not gaps or all(order.index(name) >= order.index(gaps[-1]) for name in begun)


@given(st.floats(1.0, 3.0))
@settings(max_examples=10, deadline=None)
def test_one_more_unit_would_not_fit(width):
    base = network(mlp(6, 8, 9, 7, 3), X)
    unlike = everyone(base)
    found = counts(deepest_first(base, width, unlike))
    if found == counts(unlike):
        return
    name = [n for n in found if found[n] < len(unlike[n])][-1]
    sizes = {s.name: s.size + found[s.name] + (s.name == name) for s in base.spaces}
    limit = [round(s.size * min(width, 2.0)) for s in base.spaces]
    assert multiply_adds(mlp(6, *sizes.values(), 3), X) > multiply_adds(mlp(6, *limit, 3), X)


def test_what_some_spaces_cannot_use_others_get():
    base = network(mlp(6, 8, 8, 8, 3), X)
    unlike = everyone(base)
    first, *rest = unlike
    alone = {first: [], **{name: unlike[name] for name in rest}}
    shared, given = deepest_first(base, 1.5, alone), evenly(base, 1.5, alone)
    assert sum(map(len, shared.values())) > sum(map(len, given.values()))


def test_a_stream_is_half_as_deep_as_the_last_layer():
    base = network(residual((6, 3)).eval(), IMAGES)
    stream = max(base.spaces, key=lambda s: len(s.axes)).name
    inner = [s.name for s in base.spaces if s.name != stream]
    found = deepest_first(base, 1.6, everyone(base))
    full = {name for name, owners in found.items() if len(owners) == base.spaces[name].size}
    assert inner[-1] in full and not found[inner[0]]


@pytest.mark.parametrize("smaller", [1, 2])
def test_the_network_that_needs_least_room_comes_first(smaller):
    base = network(mlp(6, 8, 8, 8, 3), X)
    needs = {k: 3 if k == smaller else 8 for k in (1, 2)}
    unlike = {s.name: [(k, u) for k in (1, 2) for u in range(needs[k])] for s in base.spaces}
    for width, whole in ((1.2, False), (1.7, True)):
        found = [k for owners in deepest_first(base, width, unlike).values() for k, _ in owners]
        assert found.count(smaller) == 9 if whole else set(found) == {smaller}


@pytest.mark.parametrize("room", [evenly, deepest_first])
@pytest.mark.parametrize("width", [3.0, 7.5, math.inf])
def test_with_room_for_all_everybody_gets_some(room, width):
    base = network(residual((6, 2), (8, 2)).eval(), IMAGES)
    unlike = everyone(base, 2.0)
    assert counts(room(base, width, unlike)) == counts(unlike)


def test_deeper_room_is_nearer_to_the_mean():
    """Late units that are apart are read by none but their own network: early ones are common."""
    nets = [randomise(mlp(6, 16, 16, 16, 3), seed) for seed in (1, 2)]
    fused = fxfuse.fuse(nets, X, width=1.5)
    assert isinstance(fused.get_submodule("4"), nn.Linear)
    sizes = [m.out_features for m in fused.modules() if isinstance(m, nn.Linear)]
    assert sizes[2] == 32 and sizes[0] < sizes[1] < 32
