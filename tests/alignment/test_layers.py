"""Chains, layers and segments: what belongs together, how it is named, and of which kind it is."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxfuse.alignment.chain import data_graph
from fxfuse.alignment.layers import chain_of, describe, module_path, partition
from fxfuse.errors import ModelError
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.nets import (
    NETS,
    Block,
    Concat,
    Functional,
    Gate,
    GroupedBottleneck,
    Inverted,
    Pooled,
    Residual,
    Tokens,
    build,
    conv,
    mlp,
    random_nets,
    randomise,
    residual,
    stages,
)

IMAGE, VECTOR = (2, 3, 8, 8), (2, 6)


def network(net, shape=IMAGE):
    return Network.of("net", trace(net), (torch.randn(shape),))


def cut(net, shape=IMAGE):
    return partition(network(net, shape))


def names(net, shape=IMAGE):
    return [[layer.name for layer in segment.layers] for segment in cut(net, shape)]


def layers(net, shape=IMAGE):
    return [layer for segment in cut(net, shape) for layer in segment.layers]


def kinds(net, shape=IMAGE):
    return [layer.kind for layer in layers(net, shape)]


# --- segments -------------------------------------------------------------------------------------


def test_a_perceptron_is_its_hidden_layers_and_its_output():
    assert names(mlp(6, 8, 8, 7, 3), VECTOR) == [["0", "2", "4"], ["6"]]


def test_convolutions_between_poolings_form_a_segment():
    net = stages([4, 4], [5, 5], [6], hidden=(7, 7))
    assert names(net) == [
        ["0.0.0", "0.1.0"],
        ["0.3.0", "0.4.0"],
        ["0.6.0"],
        ["2.0", "2.2"],
        ["2.4"],
    ]
    assert [s.resolution for s in cut(net)] == [(8, 8), (4, 4), (2, 2), (), ()]
    assert [s.label for s in cut(net)][:1] == ["8x8 positions"]


def test_residual_stages_are_segments_and_the_stem_joins_the_first():
    net = residual((6, 3), (8, 2), (10, 1))
    assert names(net) == [["0.0", "1.0", "1.1", "1.2"], ["2.0", "2.1"], ["3.0"], ["4.fc"]]
    assert [layer.branched for layer in cut(net)[0].layers] == [False, True, True, True]


def test_a_stem_in_front_of_a_pooling_is_a_segment_of_its_own():
    net = nn.Sequential(conv(3, 6), nn.MaxPool2d(2), Residual(6, 6), Pooled(6, 3))
    assert names(net) == [["0.0"], ["2"], ["3.fc"]]


def test_attention_and_mlp_are_two_layers_of_one_segment():
    assert names(Tokens(depth=2)) == [
        ["embed"],
        ["blocks.0.attention", "blocks.0.mlp", "blocks.1.attention", "blocks.1.mlp"],
        ["head"],
    ]


@pytest.mark.parametrize("name", NETS)
def test_the_output_layer_is_a_segment_of_its_own(name):
    net, x = build(name)
    segments = partition(Network.of("net", trace(net), (x,)))
    assert len(segments[-1].layers) == 1
    assert segments[-1].layers[0].width == 3


def test_a_network_without_parameters_has_no_segments():
    assert cut(nn.Sequential(nn.ReLU(), nn.Flatten())) == ()


def test_convolutions_never_share_a_segment_with_linear_layers():
    flat = nn.Sequential(conv(3, 4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), mlp(4, 4, 3))
    assert [s.layers[0].layout for s in cut(flat)] == [(4, 1), (2, 1), (2, 1)]


@given(random_nets())
def test_every_layer_holds_parameters_and_every_contraction_lies_in_one_layer(net):
    traced = network(net)
    segments = partition(traced)
    inside = [n for s in segments for layer in s.layers for n in layer.producers]
    assert sorted(inside) == sorted(traced.weights)
    nodes = [n for s in segments for layer in s.layers for n in layer.nodes]
    assert len(nodes) == len(set(nodes))
    order = {n.name: i for i, n in enumerate(traced.module.graph.nodes)}
    assert nodes == sorted(nodes, key=order.get)
    for segment in segments:
        assert len({(layer.layout, layer.resolution) for layer in segment.layers}) == 1
        assert all(layer.producers for layer in segment.layers)


# --- layers ---------------------------------------------------------------------------------------


def test_the_norm_activation_and_dropout_behind_a_layer_belong_to_it():
    net = nn.Sequential(*conv(3, 4), nn.Dropout(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3))
    first, last = layers(net)
    assert first.nodes == ("_0", "_1", "_2", "_3")
    assert (first.entry, first.merge, first.pre_activation) == ("input_1", "_0", "_1")
    assert (last.nodes, last.entry) == (("_6",), "_5")


def test_the_pre_activation_of_a_block_is_its_sum():
    block = layers(residual((6, 1)))[1]
    assert block.branched and block.entry == "_0_2"
    assert (block.pre_activation, block.merge, block.nodes[-1]) == ("add", "add", "relu")
    assert block.producers == ("_1_0_a_0", "_1_0_b_0")
    assert block.width == 6 and block.resolution == (8, 8)


def test_the_pre_activation_of_a_plain_layer_lies_behind_its_norm():
    with_norm, without = layers(conv(3, 4))[0], layers(conv(3, 4, norm=False))[0]
    assert (with_norm.pre_activation, without.pre_activation) == ("_1", "_0")


def test_an_activation_before_the_convolution_belongs_to_the_layer_before():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), Pooled(4, 3)
    )
    assert [layer.nodes for layer in layers(net)][:2] == [("_0", "_1", "_2"), ("_3",)]


# --- names ----------------------------------------------------------------------------------------


def test_layers_are_named_by_the_module_around_their_contractions():
    net = nn.Sequential(
        conv(3, 6), GroupedBottleneck(6, 8, 4), Concat(6, 2), Gate(8, 4), Pooled(8, 3)
    )
    assert [layer.name for layer in layers(net)] == ["0.0", "1", "2.a.0", "3", "4.fc"]


def test_a_block_without_a_module_of_its_own_is_named_by_its_first_and_last_contraction():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.c(x + self.b(torch.relu(self.a(x))))

    assert names(Flat(), VECTOR) == [["a..b"], ["c"]]


def test_a_module_called_twice_gives_two_layers_with_two_names():
    shared = nn.Linear(6, 6)
    hidden, last = names(
        nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(6, 3)), VECTOR
    )
    assert len({*hidden, *last}) == 3 and hidden[0] == "0"


@given(random_nets())
def test_names_are_unique(net):
    unique = {layer.name for layer in layers(net)}
    assert len(unique) == len(layers(net))


def test_parameters_used_by_functions_name_their_layer():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 6))
            self.inner = nn.Linear(5, 3)

        def forward(self, x):
            return self.inner(torch.relu(F.linear(x, self.weight)))

    first, last = layers(Bare(), VECTOR)
    assert first.name and last.name == "inner"
    assert first.producers == ("linear",)


def test_a_node_belongs_to_the_module_it_was_called_in():
    nodes = network(residual((6, 1))).module.graph.nodes
    paths = {n.name: module_path(n) for n in nodes}
    assert paths["_1_0_a_0"] == "1.0.a.0"
    assert paths["add"] == paths["relu"] == "1.0"


# --- kinds ----------------------------------------------------------------------------------------

WIDTHS = {
    "linear": (lambda w: mlp(6, w, 3), VECTOR),
    "conv": (lambda w: nn.Sequential(conv(3, w), Pooled(w, 3)), IMAGE),
    "residual": (lambda w: residual((w, 2), (2 * w, 2), stem=w), IMAGE),
    "grouped": (lambda w: nn.Sequential(GroupedBottleneck(3, w, 2), Pooled(3, 3)), IMAGE),
    "inverted": (lambda w: nn.Sequential(Inverted(3, w, gate=w // 2), Pooled(3, 3)), IMAGE),
    "concat": (lambda w: nn.Sequential(Concat(3, w), Pooled(3 + w, 3)), IMAGE),
    "gate": (lambda w: nn.Sequential(conv(3, w), Gate(w, w // 2), Pooled(w, 3)), IMAGE),
    "tokens": (lambda w: Tokens(width=w, heads=w // 4), IMAGE),
    "wide heads": (lambda w: Tokens(width=w, heads=2), IMAGE),
    "stages": (lambda w: stages([w, w], [2 * w], hidden=(w,)), IMAGE),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_kinds_do_not_depend_on_widths(name):
    make, shape = WIDTHS[name]
    assert kinds(make(4), shape) == kinds(make(8), shape)


def test_layers_of_one_structure_have_one_kind():
    stem, *blocks, output = kinds(residual((6, 3), (8, 3)))
    assert blocks[0] == blocks[1] == blocks[2] == blocks[4] == blocks[5]
    assert len({stem, *blocks, output}) == 4, "stem, block, downsampling block, output"


BLOCKS = [
    lambda: conv(4, 4),
    lambda: conv(4, 4, act=False),
    lambda: conv(4, 4, 5),
    lambda: conv(4, 4, 1),
    lambda: conv(4, 4, groups=2),
    lambda: conv(4, 4, groups=4),
    lambda: conv(4, 4, stride=2),
    lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.ReLU()),
    lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU()),
    lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.LeakyReLU(0.1)),
    lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.LeakyReLU(0.2)),
    lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)),
    lambda: Residual(4, 4),
    lambda: Residual(4, 4, groups=2),
    lambda: Residual(4, 6),
    lambda: GroupedBottleneck(4, 4, 2),
    lambda: Inverted(4, 6),
    lambda: Inverted(4, 6, gate=2),
    lambda: Concat(4, 4),
    lambda: Gate(4, 2),
]


def test_every_other_difference_makes_another_kind():
    nets = [nn.Sequential(make(), Pooled(4, 3)) for make in BLOCKS if _keeps_width(make)]
    first = [kinds(net, (2, 4, 8, 8))[0] for net in nets]
    assert len(set(first)) == len(first) >= 17


def _keeps_width(make):
    return make()(torch.zeros(2, 4, 8, 8)).shape[1] == 4


class Subtracting(nn.Module):
    """Two branches whose order matters."""

    def __init__(self, swapped):
        super().__init__()
        self.a, self.b, self.swapped = nn.Linear(6, 6), nn.Linear(6, 6), swapped
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        a, b = torch.relu(self.a(x)), torch.tanh(self.b(x))
        return self.head(b - a if self.swapped else a - b)


def test_the_order_of_operands_counts_where_it_matters():
    assert kinds(Subtracting(False), VECTOR)[0] != kinds(Subtracting(True), VECTOR)[0]


class Adding(Subtracting):
    def forward(self, x):
        a, b = torch.relu(self.a(x)), torch.tanh(self.b(x))
        return self.head(b + a if self.swapped else a + b)


def test_the_order_of_summands_does_not_count():
    assert kinds(Adding(False), VECTOR) == kinds(Adding(True), VECTOR)


# --- spellings ------------------------------------------------------------------------------------


def test_functions_and_modules_are_the_same_kinds_of_layers():
    spelled = mlp(6, 8, 7, 3)
    spelled = nn.Sequential(*spelled[:2], nn.Dropout(), *spelled[2:4], nn.Dropout(), spelled[4])
    assert kinds(Functional(), VECTOR) == kinds(spelled, VECTOR)


class FunctionalConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Linear(64, 3),
        )
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        x = F.relu(self.norm(self.a(x)))
        x = F.conv2d(x, self.weight, padding=1).relu()
        x = F.max_pool2d(x, 2)
        return self.b(x.flatten(1))


def test_functions_with_parameters_are_the_same_kinds_too():
    modules = nn.Sequential(
        *conv(3, 4, bias=True),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    ours, theirs = cut(FunctionalConvolutions()), cut(modules)
    assert [[x.kind for x in s.layers] for s in ours] == [
        [x.kind for x in s.layers] for s in theirs
    ]
    assert [s.resolution for s in ours] == [s.resolution for s in theirs]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (lambda x: x.relu(), lambda x: F.relu(x, inplace=True)),
        (lambda x: x + 1, lambda x: torch.add(x, 1)),
        (lambda x: x.flatten(1), lambda x: x.reshape(2, -1)),
        (lambda x: x.mean((1,), keepdim=True), lambda x: torch.mean(x, 1, True)),
        (lambda x: x @ x.mT, lambda x: torch.matmul(x, x.transpose(0, 1))),
    ],
)
def test_spellings_of_one_operator_are_described_alike(a, b):
    class Spelled(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    def described(function):
        traced = network(Spelled(function), VECTOR)
        steps = [describe(traced, n) for n in traced.module.graph.nodes]
        return [s for s in steps if s != "[]"]

    assert described(a) == described(b)


def test_tracing_twice_gives_the_same_plan():
    assert cut(residual((6, 2))) == cut(residual((6, 2)))


# --- the data graph -------------------------------------------------------------------------------


@given(random_nets(), st.integers(1, 3))
def test_all_data_flows_from_the_source_to_the_output(net, batch):
    graph = data_graph(network(net, (batch, 3, 8, 8)))
    assert all(graph.in_degree(n) for n in graph if n != "source")
    sinks = [n for n in graph if not graph.out_degree(n)]
    assert [n.op for n in sinks] == ["output"]


def test_sizes_parameters_and_dead_ends_carry_no_data():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

        def forward(self, x):
            self.b(x)
            return self.a(x).view(x.shape[0], 2, 4)

    graph = data_graph(network(Sized(), VECTOR))
    assert {str(n) for n in graph} == {"source", "x", "a", "view", "output"}


def test_a_block_on_tokens_is_two_layers_on_the_same_positions():
    block = nn.Sequential(nn.Linear(6, 8), Block(8, 2, 12), nn.Linear(8, 3))
    blocks = layers(randomise(block), (2, 5, 6))
    assert [layer.branched for layer in blocks] == [False, True, True, False]
    assert all(layer.layout == (3, 2) and layer.resolution == (5,) for layer in blocks)


class First(nn.Module):
    """Uses one of several tensors that a module returns."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.inner(x)[0].mean(1))


def test_a_layer_of_several_outputs_ends_in_the_one_that_is_used():
    traced = network(First(nn.LSTM(6, 6, batch_first=True)), (2, 4, 6))
    (first,), (head,) = (s.layers for s in partition(traced))
    assert first.name == "inner" and first.width == 6 and first.resolution == (4,)
    assert first.pre_activation == first.nodes[-1] != first.merge and head.name == "head"
    assert chain_of(traced)[:2] == ("x", "inner") and chain_of(traced)[-1] == "output"


class Constant(nn.Module):
    def __init__(self, computed):
        super().__init__()
        self.weight, self.computed = nn.Parameter(torch.ones(3)), computed

    def forward(self, x):
        return self.weight * 2 if self.computed else self.weight


@pytest.mark.parametrize("computed", [True, False])
def test_an_output_that_ignores_the_input_is_refused(computed):
    with pytest.raises(ModelError, match="does not depend on the input"):
        cut(Constant(computed))
