"""Inserted layers: where they go, copies at another width, streams that get more units."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxfuse.alignment.layers import partition
from fxfuse.depth._insert import AbsentLayer, Streams, _start_of, insert_layers, resized_copy
from fxfuse.depth._neutral import Insertion
from fxfuse.errors import PassError
from fxfuse.graph.state import sizes_of
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.insertions import insert, layer_of, network, new_nodes
from tests.support.nets import (
    Concat,
    GroupedBottleneck,
    Inverted,
    Pooled,
    Residual,
    Tokens,
    conv,
    gap,
    mlp,
    randomise,
    residual,
    stages,
)
from tests.support.tolerances import FUNCTION

VECTORS, IMAGES = torch.randn(4, 6), torch.randn(4, 3, 8, 8)


# --- where they go --------------------------------------------------------------------------------


def test_several_insertions_behind_one_node_follow_each_other_in_order():
    into, template = (
        network(mlp(6, 5, 3), VECTORS),
        network(mlp(6, 7, 7, 7, 3), VECTORS, seed=1),
    )
    second, third = layer_of(template, "2"), layer_of(template, "4")
    wanted = [Insertion(template, layer, into, "_1") for layer in (second, third)]
    edited, layers = insert_layers(into, wanted)
    assert [str(n.target) for n in edited.graph.nodes if n.op == "call_module"][:6] == [
        "0",
        "1",
        *[str(n.target) for n in new_nodes(into, edited)],
    ]
    names = tuple(n.name for n in new_nodes(into, edited))
    first, second = names[:2], names[2:]
    assert layers == (
        AbsentLayer(first, "_1", first, name="2"),
        AbsentLayer(second, first[1], second, name="4"),
    )
    assert gap(into.module, edited, VECTORS) <= FUNCTION


def test_the_sum_of_a_block_and_what_follows_it_hold_the_value():
    template = network(residual((6, 2)), IMAGES, seed=1)
    into = network(residual((4, 1)), IMAGES)
    insertion = Insertion(template, layer_of(template, "1.1"), into, "relu")
    edited, (layer,) = insert_layers(into, [insertion])
    assert len(layer.carriers) == 2, "the sum and the activation behind it"
    assert layer.nodes == tuple(n.name for n in new_nodes(into, edited))
    assert layer.entry == "relu" and layer.zeroed and not layer.joins and not layer.whole
    assert all(n.meta["origin"][0] == "deepen" for n in new_nodes(into, edited))
    assert not any("inserted" in n.meta for n in edited.graph.nodes)


def test_an_insertion_reaches_every_reader():
    """The skip and the branch of the next block both read what was put in."""
    template = network(residual((6, 3)), IMAGES, seed=1)
    into = network(residual((6, 2)), IMAGES)
    edited = insert(into, template, "1.1", "relu")
    exit_node = new_nodes(into, edited)[-1]
    assert {u.name for u in exit_node.users} == {"_1_1_a_0", "_1_1_skip"}
    assert gap(into.module, edited, IMAGES) <= FUNCTION


def test_a_layer_can_be_inserted_in_front_of_a_segment():
    template = network(
        nn.Sequential(conv(3, 4), nn.MaxPool2d(2), conv(4, 4), conv(4, 4), Pooled(4, 3)),
        IMAGES,
    )
    into = network(
        nn.Sequential(conv(3, 5), nn.MaxPool2d(2), conv(5, 7), Pooled(7, 3)),
        IMAGES,
        seed=1,
    )
    edited = insert(into, template, "2.0", "_1")
    assert gap(into.module, edited, IMAGES) <= FUNCTION
    assert [n.name for n in edited.graph.nodes].index(new_nodes(into, edited)[0].name) == 5


def test_names_that_are_taken_are_not_overwritten():
    into, template = (
        network(mlp(6, 5, 4, 3), VECTORS),
        network(mlp(6, 7, 7, 7, 3), VECTORS, seed=1),
    )
    edited = insert(into, template, "2", "_1", times=3)
    names = [n for n, _ in edited.named_parameters()]
    assert len(set(names)) == len(names) == 12
    for name, tensor in into.module.state_dict().items():
        assert torch.equal(edited.state_dict()[name], tensor)


def test_the_path_of_an_inserted_layer_leads_into_no_other_layer():
    """The template's path is that of a pooling here, so another path is taken."""
    template = network(nn.Sequential(conv(3, 4), conv(4, 4), Pooled(4, 3)), IMAGES)
    into = network(nn.Sequential(conv(3, 5), nn.MaxPool2d(2), Pooled(5, 3)), IMAGES, seed=1)
    edited = insert(into, template, "1.0", "_0_2")
    called = [str(n.target) for n in edited.graph.nodes if n.op == "call_module"]
    assert not any(a.startswith(f"{b}.") for a in called for b in called)
    assert gap(into.module, edited, IMAGES) <= FUNCTION


def test_copies_share_no_weights_with_each_other_or_the_template():
    into, template = (
        network(mlp(6, 5, 3), VECTORS),
        network(mlp(6, 5, 5, 3), VECTORS, seed=1),
    )
    edited = insert(into, template, "2", "_1", times=2)
    pointers = [p.data_ptr() for p in edited.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert not set(pointers) & {p.data_ptr() for p in template.module.parameters()}


def test_template_and_network_are_left_as_they_were():
    into, template = (
        network(mlp(6, 5, 3), VECTORS),
        network(mlp(6, 7, 7, 3), VECTORS, seed=1),
    )
    states = [copy.deepcopy(n.module.state_dict()) for n in (into, template)]
    insert(into, template, "2", "_1")
    for kept, state in zip((into, template), states):
        assert all(torch.equal(t, state[k]) for k, t in kept.module.state_dict().items())


def test_the_global_random_state_is_left_as_it_was():
    into, template = (
        network(mlp(6, 5, 3), VECTORS),
        network(mlp(6, 7, 7, 3), VECTORS, seed=1),
    )
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    insert(into, template, "2", "_1")
    assert torch.rand(1) == expected


# --- copies at another width ---------------------------------------------------------------------


def plan(template, into, x=IMAGES, layer=-1, after=None):
    """Put a layer of the template's last hidden segment behind the other's."""
    template, into = network(template, x), network(into, x)
    copied = partition(template)[-2].layers[layer]
    return Insertion(template, copied, into, after or partition(into)[-2].layers[-1].nodes[-1])


def resized(insertion, path):
    width = Streams(insertion.into).width(insertion.after)
    return resized_copy(insertion, path, width)


def stack(make, width, blocks=1):
    return nn.Sequential(conv(3, width), *[make(width) for _ in range(blocks)], Pooled(width, 3))


def shapes(insertion, *paths):
    parts = [resized(insertion, path) for path in paths]
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
    assert resized(insertion, "1.b.0").groups == 9


def test_a_depthwise_convolution_on_the_stream_takes_its_width():
    class Depthwise(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a = nn.Conv2d(width, width, 3, padding=1, groups=width)

        def forward(self, x):
            return x + self.a(x)

    insertion = plan(stack(Depthwise, 6), stack(Depthwise, 4))
    part = resized(insertion, "1.a")
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
        resized(plan(stack(Grouped, 6), stack(Grouped, 4)), "1.a")


def test_parameters_without_a_module_are_resized_alike():
    class Scaled(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.gamma = nn.Conv2d(width, width, 1), nn.Parameter(torch.ones(width, 1, 1))
            self.register_buffer("shift", torch.ones(1, width, 1, 1))

        def forward(self, x):
            return x + self.gamma * (self.a(x) + self.shift)

    insertion = plan(stack(Scaled, 6), stack(Scaled, 4))
    gamma, shift = (resized(insertion, path) for path in ("1.gamma", "1.shift"))
    assert isinstance(gamma, nn.Parameter) and gamma.shape == (4, 1, 1)
    assert not isinstance(shift, nn.Parameter) and shift.shape == (1, 4, 1, 1)


@pytest.mark.parametrize("width", [8, 6])
def test_attention_keeps_its_heads_and_takes_the_streams_width(width):
    insertion = plan(Tokens(8, 2, 12), Tokens(width, 2, 10), layer=0)
    part = resized(insertion, "blocks.0.attention")
    assert (part.num_heads, part.embed_dim, part.head_dim) == (2, width, width // 2)
    assert part.in_proj_weight.shape == (3 * width, width)
    assert part.out_proj.weight.shape == (width, width)
    x = torch.randn(2, 5, width)
    assert part(x, x, x)[0].shape == x.shape


def test_a_copy_is_freshly_initialised_and_shares_nothing():
    insertion = plan(stack(lambda w: Residual(w, w), 6), stack(lambda w: Residual(w, w), 6))
    original = insertion.template.module.get_submodule("1.a.0").weight
    first, second = (resized(insertion, "1.a.0").weight for _ in range(2))
    assert first.shape == original.shape
    assert not torch.equal(first, original)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert float(first.std()) > 0.01


def test_initial_values_neither_depend_on_the_global_seed_nor_change_it():
    insertion = plan(mlp(6, 9, 7, 3), mlp(6, 5, 3), VECTORS)
    torch.manual_seed(1)
    first = resized(insertion, "2").weight
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, resized(insertion, "2").weight)


def test_a_copy_has_the_precision_of_its_template():
    template, into = (network(mlp(6, w, w, 3).double(), VECTORS.double()) for w in (7, 5))
    insertion = Insertion(template, partition(template)[0].layers[1], into, "_1")
    part = resized(insertion, "2")
    assert part.weight.dtype == part.bias.dtype == torch.float64


def test_the_template_is_left_as_it_was():
    insertion = plan(mlp(6, 9, 7, 3), mlp(6, 5, 3), VECTORS)
    before = insertion.template.module.get_submodule("2").weight.clone()
    resized(insertion, "2")
    assert torch.equal(insertion.template.module.get_submodule("2").weight, before)


# --- streams that get more units ------------------------------------------------------------------

WIDE_IMAGES = torch.randn(4, 3, 8, 8)


def dense_network(layers=2, width=4, growth=2, seed=1):
    blocks = [Concat(width + i * growth, growth) for i in range(layers)]
    last = width + layers * growth
    net = nn.Sequential(conv(3, width), *blocks, nn.BatchNorm2d(last), Pooled(last, 3))
    return Network.of("net", trace(randomise(net, seed)), (WIDE_IMAGES,))


@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 5))
def test_new_units_lie_behind_the_stream_and_are_read_with_zeros(layers, at, count):
    dense = dense_network(layers)
    nodes = ["_0_2", *[f"cat{f'_{i}' if i else ''}" for i in range(layers)]]
    node = nodes[min(at, layers)]
    edited = trace(dense.module)
    streams = Streams(dense)
    before = streams.width(node)
    assert streams.widen(edited, node, count)
    assert streams.width(node) == before + count
    head = edited.get_submodule(str(layers + 2)).fc.weight
    assert head.shape[1] == 4 + 2 * layers + count
    assert not head[:, before : before + count].any()
    rest = torch.cat([head[:, :before], head[:, before + count :]], 1)
    assert torch.equal(rest, dense.module.get_submodule(str(layers + 2)).fc.weight)


def test_units_added_twice_lie_in_the_order_in_which_they_were_added():
    dense = dense_network(2)
    edited, streams = trace(dense.module), Streams(dense)
    assert streams.widen(edited, "cat", 1) and streams.widen(edited, "cat", 2)
    assert streams.width("cat") == 9 and streams.width("cat_1") == 11
    assert edited.get_submodule("3").running_mean.shape == (11,)
    assert edited.get_submodule("3").num_features == 11
    assert edited.get_submodule("2").a.get_submodule("0").in_channels == 9


def test_layers_in_front_of_the_stream_stay_as_they_were():
    dense = dense_network(2)
    edited, streams = trace(dense.module), Streams(dense)
    streams.widen(edited, "cat", 3)
    for name, tensor in dense.module.state_dict().items():
        if name.startswith(("0.", "1.")):
            assert torch.equal(edited.state_dict()[name], tensor)


def test_the_widened_network_computes_the_same_whatever_the_new_units_hold():
    dense = dense_network(1)
    edited, streams = trace(dense.module), Streams(dense)
    streams.widen(edited, "cat", 2)

    class Fed(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Sequential(
                *[dense.module.get_submodule(n) for n in ("0.0", "0.1", "0.2")]
            )
            self.inside = dense.module.get_submodule("1.a.0"), dense.module.get_submodule("1.a.1")
            self.norm, self.head = edited.get_submodule("2"), edited.get_submodule("3").fc

        def forward(self, x):
            x = self.before(x)
            y = torch.relu(self.inside[1](self.inside[0](x)))
            x = torch.cat([x, y, torch.randn(4, 2, 8, 8)], 1)
            return self.head(self.norm(x).mean((2, 3)))

    assert gap(dense.module, Fed().eval(), WIDE_IMAGES) <= FUNCTION


def test_a_stream_that_cannot_move_cannot_be_widened():
    dense = dense_network(1)
    assert not Streams(dense).widen(trace(dense.module), "x", 2)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 11), st.integers(1, 6))
def test_the_first_start_of_a_run_is_found(units, start, length):
    units = np.array(units)
    run = units[start : start + length]
    if not len(run):
        return
    at = _start_of(run, units)
    assert at is not None and at <= start and np.array_equal(units[at : at + len(run)], run)
