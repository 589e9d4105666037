"""Runs of layers that are neutral only as a whole; single layers are tested with the rewrites."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.alignment.layers import partition
from fxfuse.depth._neutral import Insertion, Room, _find, resized_copy
from fxfuse.errors import PassError
from fxfuse.graph.state import sizes_of
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.nets import (
    Concat,
    Gate,
    GroupedBottleneck,
    Inverted,
    Pooled,
    Residual,
    Tokens,
    conv,
    gap,
    mlp,
    randomise,
    stages,
)
from tests.support.tolerances import FUNCTION

SIZED_IMAGES, VECTORS = torch.randn(2, 3, 8, 8), torch.randn(2, 6)


def sized_network(net, x):
    return Network.of("net", trace(randomise(net)), (x,))


def plan(template, into, x=SIZED_IMAGES, layer=-1, after=None):
    """Put a layer of the template's last hidden segment behind the other's."""
    template, into = sized_network(template, x), sized_network(into, x)
    found = partition(template)[-2].layers[layer]
    return Insertion(template, found, into, after or partition(into)[-2].layers[-1].nodes[-1])


def stack(make, width, blocks=1):
    return nn.Sequential(conv(3, width), *[make(width) for _ in range(blocks)], Pooled(width, 3))


def shapes(insertion, *paths):
    parts = [resized_copy(insertion, path) for path in paths]
    for part in parts:
        assert all(getattr(part, k) == v for k, v in sizes_of(part).items())
    return [tuple(part.weight.shape) for part in parts]


def test_a_plain_layer_takes_the_width_of_the_stream_on_both_sides():
    insertion = plan(mlp(6, 9, 7, 3), mlp(6, 5, 3), VECTORS)
    assert shapes(insertion, "2") == [(5, 5)]
    insertion = plan(stages([9, 7], norm=True), stages([5]))
    insertion = Insertion(
        insertion.template, partition(insertion.template)[0].layers[1], insertion.into, "_0_0_2"
    )
    assert shapes(insertion, "0.1.0", "0.1.1") == [(5, 5, 3, 3), (5,)]


def test_a_block_takes_the_width_of_the_stream_and_keeps_its_own_inside():
    insertion = plan(
        stack(lambda w: Residual(w, w, inner=9), 6), stack(lambda w: Residual(w, w), 4)
    )
    assert shapes(insertion, "1.a.0", "1.a.1", "1.b.0", "1.b.1") == [
        (9, 4, 3, 3),
        (9,),
        (4, 9, 3, 3),
        (4,),
    ]


def test_groups_inside_a_block_stay():
    insertion = plan(
        stack(lambda w: GroupedBottleneck(w, 8, 4), 6), stack(lambda w: Residual(w, w), 4)
    )
    assert shapes(insertion, "1.a.0", "1.b.0", "1.c.0") == [
        (8, 4, 1, 1),
        (8, 2, 3, 3),
        (4, 8, 1, 1),
    ]


def test_channels_of_a_depthwise_convolution_inside_a_block_stay():
    insertion = plan(stack(lambda w: Inverted(w, 9, gate=4), 6), stack(lambda w: Residual(w, w), 4))
    assert shapes(insertion, "1.b.0", "1.gate.down", "1.c.0") == [
        (9, 1, 3, 3),
        (4, 9, 1, 1),
        (4, 9, 1, 1),
    ]
    assert resized_copy(insertion, "1.b.0").groups == 9


def test_a_depthwise_convolution_on_the_stream_takes_its_width():
    class Depthwise(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a = nn.Conv2d(width, width, 3, padding=1, groups=width)

        def forward(self, x):
            return x + self.a(x)

    insertion = plan(stack(Depthwise, 6), stack(Depthwise, 4))
    part = resized_copy(insertion, "1.a")
    assert tuple(part.weight.shape) == (4, 1, 3, 3)
    assert (part.groups, part.in_channels, part.out_channels) == (4, 4, 4)
    assert part(torch.zeros(1, 4, 5, 5)).shape == (1, 4, 5, 5)


def test_a_grouped_convolution_on_a_stream_of_another_width_is_refused():
    class Grouped(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a = nn.Conv2d(width, width, 3, padding=1, groups=2)

        def forward(self, x):
            return x + self.a(x)

    assert shapes(plan(stack(Grouped, 6), stack(Grouped, 6)), "1.a") == [(6, 3, 3, 3)]
    with pytest.raises(PassError, match="a stream of 6 units, to be rebuilt for 4"):
        resized_copy(plan(stack(Grouped, 6), stack(Grouped, 4)), "1.a")


def test_parameters_without_a_module_are_resized_alike():
    class Scaled(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.gamma = nn.Conv2d(width, width, 1), nn.Parameter(torch.ones(width, 1, 1))
            self.register_buffer("shift", torch.ones(1, width, 1, 1))

        def forward(self, x):
            return x + self.gamma * (self.a(x) + self.shift)

    insertion = plan(stack(Scaled, 6), stack(Scaled, 4))
    gamma, shift = (resized_copy(insertion, path) for path in ("1.gamma", "1.shift"))
    assert isinstance(gamma, nn.Parameter) and gamma.shape == (4, 1, 1)
    assert not isinstance(shift, nn.Parameter) and shift.shape == (1, 4, 1, 1)


def test_attention_keeps_its_heads_and_takes_the_streams_width():
    insertion = plan(Tokens(8, 2, 12), Tokens(8, 2, 10), layer=0)
    part = resized_copy(insertion, "blocks.0.attention")
    assert part.num_heads == 2 and part.embed_dim == 8
    assert part.in_proj_weight.shape == (24, 8) and part.out_proj.weight.shape == (8, 8)


def test_a_copy_is_freshly_initialised_and_shares_nothing():
    insertion = plan(stack(lambda w: Residual(w, w), 6), stack(lambda w: Residual(w, w), 6))
    original = insertion.template.module.get_submodule("1.a.0").weight
    first, second = (resized_copy(insertion, "1.a.0").weight for _ in range(2))
    assert first.shape == original.shape
    assert not torch.equal(first, original)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert float(first.std()) > 0.01


def test_initial_values_do_not_depend_on_nor_move_the_global_seed():
    insertion = plan(mlp(6, 9, 7, 3), mlp(6, 5, 3), VECTORS)
    torch.manual_seed(1)
    first = resized_copy(insertion, "2").weight
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, resized_copy(insertion, "2").weight)


def test_precision_and_trainability_come_along():
    template, into = (sized_network(mlp(6, w, w, 3).double(), VECTORS.double()) for w in (7, 5))
    template.module.get_submodule("2").weight.requires_grad_(False)
    insertion = Insertion(template, partition(template)[0].layers[1], into, "_1")
    part = resized_copy(insertion, "2")
    assert part.weight.dtype == part.bias.dtype == torch.float64


def test_the_template_is_left_as_it_was():
    insertion = plan(mlp(6, 9, 7, 3), mlp(6, 5, 3), VECTORS)
    before = insertion.template.module.get_submodule("2").weight.clone()
    resized_copy(insertion, "2")
    assert torch.equal(insertion.template.module.get_submodule("2").weight, before)


WIDE_IMAGES = torch.randn(4, 3, 8, 8)


def dense_network(layers=2, width=4, growth=2, seed=1):
    dense = [Concat(width + i * growth, growth) for i in range(layers)]
    last = width + layers * growth
    net = nn.Sequential(conv(3, width), *dense, nn.BatchNorm2d(last), Pooled(last, 3))
    return Network.of("net", trace(randomise(net, seed)), (WIDE_IMAGES,))


@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 5))
def test_new_places_lie_behind_the_stream_and_are_read_with_zeros(layers, at, count):
    found = dense_network(layers)
    nodes = ["_0_2", *[f"cat{f'_{i}' if i else ''}" for i in range(layers)]]
    node = nodes[min(at, layers)]
    edited = trace(found.module)
    room = Room(found)
    before = room.width(node)
    assert room.add(edited, node, count)
    assert room.width(node) == before + count
    head = edited.get_submodule(str(layers + 2)).fc.weight
    assert head.shape[1] == 4 + 2 * layers + count
    assert not head[:, before : before + count].any()
    rest = torch.cat([head[:, :before], head[:, before + count :]], 1)
    assert torch.equal(rest, found.module.get_submodule(str(layers + 2)).fc.weight)


def test_room_made_twice_lies_in_the_order_in_which_it_was_made():
    found = dense_network(2)
    edited, room = trace(found.module), Room(found)
    assert room.add(edited, "cat", 1) and room.add(edited, "cat", 2)
    assert room.width("cat") == 9 and room.width("cat_1") == 11
    assert edited.get_submodule("3").running_mean.shape == (11,)
    assert edited.get_submodule("3").num_features == 11
    assert edited.get_submodule("2").a.get_submodule("0").in_channels == 9


def test_what_lies_before_the_stream_is_left_alone():
    found = dense_network(2)
    edited, room = trace(found.module), Room(found)
    room.add(edited, "cat", 3)
    for name, tensor in found.module.state_dict().items():
        if name.startswith(("0.", "1.")):
            assert torch.equal(edited.state_dict()[name], tensor)


def test_the_widened_network_computes_the_same_with_anything_in_the_new_places():
    found = dense_network(1)
    edited, room = trace(found.module), Room(found)
    room.add(edited, "cat", 2)

    class Fed(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Sequential(
                *[found.module.get_submodule(n) for n in ("0.0", "0.1", "0.2")]
            )
            self.inside = found.module.get_submodule("1.a.0"), found.module.get_submodule("1.a.1")
            self.norm, self.head = edited.get_submodule("2"), edited.get_submodule("3").fc

        def forward(self, x):
            x = self.before(x)
            y = torch.relu(self.inside[1](self.inside[0](x)))
            x = torch.cat([x, y, torch.randn(4, 2, 8, 8)], 1)
            return self.head(self.norm(x).mean((2, 3)))

    assert gap(found.module, Fed().eval(), WIDE_IMAGES) <= FUNCTION


def test_a_stream_that_cannot_move_gets_no_room():
    found = dense_network(1)
    assert not Room(found).add(trace(found.module), "x", 2)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 11), st.integers(1, 6))
def test_a_run_is_found_where_it_first_begins(units, start, length):
    units = np.array(units)
    run = units[start : start + length]
    if not len(run):
        return
    at = _find(units, run)
    assert at is not None and at <= start and np.array_equal(units[at : at + len(run)], run)


IMAGES = torch.randn(16, 3, 8, 8)


ACTS = [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU, nn.LeakyReLU]


def step(inputs, outputs, act=None, kernel=1, groups=1, norm=True):
    parts = [nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, groups=groups, bias=not norm)]
    return nn.Sequential(*parts, *[nn.BatchNorm2d(outputs)] * norm, *[act() for _ in [1] if act])


def inverted(inputs, inner, outputs, act, gate=False, norm=True):
    """Expand, depthwise, maybe gate, project: no skip, no activation at the end."""
    return nn.Sequential(
        step(inputs, inner, act, norm=norm),
        step(inner, inner, act, 3, inner, norm=norm),
        *[Gate(inner, 3)] * gate,
        step(inner, outputs, norm=norm),
    )


def pair(act, gate=False, norm=True, inner=11, deep=9):
    """Two networks of which one has a whole inverted bottleneck more, and other widths."""
    first = nn.Sequential(
        step(3, 5, act, norm=norm),
        inverted(5, 8, 6, act, gate, norm),
        inverted(6, inner, deep, act, gate, norm),
        step(deep, 12, act, norm=norm),
        Pooled(12, 3),
    )
    second = nn.Sequential(
        step(3, 4, act, norm=norm),
        inverted(4, 7, 7, act, gate, norm),
        step(7, 10, act, norm=norm),
        Pooled(10, 3),
    )
    return [randomise(first, 1), randomise(second, 2)]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gate", [False, True])
def test_a_run_that_one_network_lacks_is_carried_through(act, gate):
    nets = pair(act, gate)
    for net, balanced in zip(nets, fxfuse.balance(nets, IMAGES)):
        assert gap(net, balanced, IMAGES) <= FUNCTION
    fused = fxfuse.fuse(nets, IMAGES)
    pair(act, gate)[0].load_state_dict(fused.state_dict(), strict=True)
    assert torch.isfinite(fused(IMAGES)).all()


def test_biases_carry_as_well_as_norms():
    nets = pair(nn.SiLU, norm=False)
    for net, balanced in zip(nets, fxfuse.balance(nets, IMAGES)):
        assert gap(net, balanced, IMAGES) <= FUNCTION


@given(st.sampled_from(ACTS), st.booleans(), st.integers(0, 99))
def test_inputs_four_times_as_far_out_as_the_examples_still_pass(act, gate, seed):
    nets = pair(act, gate)
    after = fxfuse.balance(nets, IMAGES)[1]
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    assert gap(nets[1], after, x.clamp(-2, 2)) <= FUNCTION


def test_all_weight_on_either_network_gives_a_network_of_its_own_path():
    nets = pair(nn.SiLU)
    fused = fxfuse.fuse(nets, IMAGES, weights=[1, 0])
    assert gap(nets[0], fused, IMAGES) <= FUNCTION


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh])
def test_activations_without_a_straight_line_are_refused(act):
    with pytest.raises(PassError, match="nowhere a straight line"):
        fxfuse.balance(pair(act), IMAGES)


def test_a_run_narrower_than_the_stream_is_refused():
    with pytest.raises(PassError, match="narrower"):
        fxfuse.balance(pair(nn.SiLU, inner=5), IMAGES)


def test_the_settings_of_a_gate_without_a_bias_are_refused():
    nets = pair(nn.SiLU, gate=True)
    for net in nets:
        for part in net.modules():
            if isinstance(part, Gate):
                part.up.bias = None
    with pytest.raises(PassError, match="no bias to open it"):
        fxfuse.balance(nets, IMAGES)


def test_the_models_are_left_as_they_were():
    nets = pair(nn.SiLU)
    before = [{k: v.clone() for k, v in n.state_dict().items()} for n in nets]
    fxfuse.balance(nets, IMAGES)
    for net, state in zip(nets, before):
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
