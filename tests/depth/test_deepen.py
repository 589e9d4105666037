"""."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.alignment.align import align_networks
from fxfuse.alignment.layers import partition
from fxfuse.calibration.data import Calibration
from fxfuse.depth._neutral import Insertion
from fxfuse.depth.deepen import Absent, Deepen, Stamp, check_alignment, deepen, insert_layers
from fxfuse.errors import ArgumentError, FuseError, NotEquivalent, PairingError, PassError
from fxfuse.graph.trace import trace
from fxfuse.graph.verify import lint
from fxfuse.ir import Alignment
from fxfuse.spaces.network import Network
from tests.support.nets import (
    Functional,
    Gate,
    GroupedBottleneck,
    Inverted,
    Pooled,
    Residual,
    Tokens,
    conv,
    gap,
    mlp,
    outputs,
    randomise,
    residual,
    stages,
    values,
)
from tests.support.pairs import IMAGES, PAIRS, VECTORS, networks
from tests.support.tolerances import FUNCTION

VECTORS_TO_INSERT, IMAGES_TO_INSERT, TOKENS = (
    torch.randn(4, 6),
    torch.randn(4, 3, 8, 8),
    torch.randn(4, 5, 6),
)


def network(net, x, name="net", seed=0):
    return Network.of(name, trace(randomise(net, seed)), (x,))


def layer_of(found, name):
    layers = {layer.name: layer for s in partition(found) for layer in s.layers}
    return layers[name]


def insert(into, template, name, after, times=1):
    """Put a template's layer behind a node of another network; return the edited module."""
    layer = layer_of(template, name)
    return insert_layers(
        into.module, into.example, [Insertion(template, layer, into, after)] * times
    )


def inserted(module):
    return [n for n in module.graph.nodes if "inserted" in n.meta]


# --- plain layers ---------------------------------------------------------------------------------


@given(
    st.integers(2, 9),
    st.integers(2, 9),
    st.booleans(),
    st.booleans(),
    st.sampled_from([nn.ReLU, nn.ReLU6, nn.Hardtanh]),
    st.integers(0, 99),
)
def test_an_identity_linear_layer_keeps_the_function(width, other, norm, bias, act, seed):
    into = network(mlp(6, width, 3, norm=norm, act=act, bias=bias), VECTORS_TO_INSERT, seed=seed)
    template = network(mlp(6, other, other, 3, norm=norm, act=act, bias=bias), VECTORS_TO_INSERT)
    name, after = ("3", "_2") if norm else ("2", "_1")
    edited = insert(into, template, name, after)
    assert gap(into.module, edited, 3 * torch.randn(50, 6)) <= FUNCTION
    assert len(inserted(edited)) == 2 + norm


@given(
    st.integers(2, 9),
    st.integers(2, 9),
    st.booleans(),
    st.sampled_from([1, 3, 5]),
    st.booleans(),
    st.integers(0, 99),
)
def test_an_identity_convolution_keeps_the_function(width, other, norm, kernel, pool, seed):
    between = [nn.MaxPool2d(2)] if pool else []
    shallow = nn.Sequential(conv(3, width, norm=norm), *between, Pooled(width, 3))
    deep = nn.Sequential(
        conv(3, other, norm=norm), conv(other, 2 * other, kernel, norm), Pooled(2 * other, 3)
    )
    into, template = network(shallow, IMAGES_TO_INSERT, seed=seed), network(deep, IMAGES_TO_INSERT)
    after = "_1" if pool else "_0_2" if norm else "_0_1"
    edited = insert(into, template, "1.0", after)
    assert gap(into.module, edited, 3 * torch.randn(5, 3, 8, 8)) <= FUNCTION
    (layer,) = [m for n, m in edited.named_modules() if n == str(inserted(edited)[0].target)]
    assert (layer.in_channels, layer.out_channels) == (width, width)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_identities_may_be_grouped(groups):
    def net(layers):
        return nn.Sequential(
            conv(3, 8), *[conv(8, 8, groups=groups) for _ in range(layers)], Pooled(8, 3)
        )

    into, template = network(net(1), IMAGES_TO_INSERT), network(net(2), IMAGES_TO_INSERT, seed=1)
    assert gap(into.module, insert(into, template, "2.0", "_1_2"), IMAGES_TO_INSERT) <= FUNCTION


def test_identities_may_be_dilated():
    def net(layers):
        extra = [
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.ReLU())
            for _ in range(layers)
        ]
        return nn.Sequential(conv(3, 4), *extra, Pooled(4, 3))

    into, template = network(net(0), IMAGES_TO_INSERT), network(net(1), IMAGES_TO_INSERT, seed=1)
    assert gap(into.module, insert(into, template, "1.0", "_0_2"), IMAGES_TO_INSERT) <= FUNCTION


@pytest.mark.parametrize("affine", [True, False])
def test_an_inserted_norm_is_exactly_neutral(affine):
    def net(widths):
        return nn.Sequential(
            *[
                m
                for i, o in zip((6, *widths), widths)
                for m in (nn.Linear(i, o), nn.BatchNorm1d(o, eps=0.1, affine=affine), nn.ReLU())
            ],
            nn.Linear(widths[-1], 3),
        )

    into, template = (
        network(net([5]), VECTORS_TO_INSERT),
        network(net([5, 5]), VECTORS_TO_INSERT, seed=1),
    )
    edited = insert(into, template, "3", "_2")
    assert gap(into.module, edited, VECTORS_TO_INSERT) <= 1e-6


def test_identities_on_tokens_are_linear_layers():
    into, template = network(mlp(6, 5, 3), TOKENS), network(mlp(6, 7, 7, 3), TOKENS, seed=1)
    assert gap(into.module, insert(into, template, "2", "_1"), TOKENS) <= FUNCTION


# --- blocks ---------------------------------------------------------------------------------------

BLOCKS = {
    "residual": lambda w: Residual(w, w),
    "residual of another inner width": lambda w: Residual(w, w, inner=5),
    "bottleneck": lambda w: GroupedBottleneck(w, 8, 4),
    "inverted": lambda w: Inverted(w, 7),
    "inverted with a gate": lambda w: Inverted(w, 7, gate=3),
    "pre-activation": lambda w: PreActivation(w),
    "layer scale": lambda w: Scaled(w),
    "without norm": lambda w: Bare(w),
    "functional": lambda w: FunctionalBlock(w),
}


class PreActivation(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.a = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(torch.relu(self.norm(x)))))


class Scaled(nn.Module):
    """Any norm and any activation, and a scale for each channel at the end of the branch."""

    def __init__(self, width):
        super().__init__()
        self.a, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(1, width)
        self.gamma, self.drop = nn.Parameter(torch.ones(width, 1, 1)), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.gamma * nn.functional.gelu(self.norm(self.a(x))))


class Bare(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 5, 3, padding=1), nn.Conv2d(5, width, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.b(torch.tanh(self.a(x))) + x)


class FunctionalBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(width, width, 1, 1)),
            nn.Parameter(torch.randn(width)),
        )

    def forward(self, x):
        return x + nn.functional.conv2d(torch.sigmoid(x), self.weight, self.bias)


def stack(make, width, blocks):
    return nn.Sequential(conv(3, width), *[make(width) for _ in range(blocks)], Pooled(width, 3))


def last_block(found):
    return partition(found)[-2].layers[-1]


def deeper(name, width=6, other=4, blocks=2):
    """A network with one block, and itself with more of them put in from a wider one."""
    into = network(stack(BLOCKS[name], other, 1), IMAGES_TO_INSERT)
    template = network(stack(BLOCKS[name], width, 2), IMAGES_TO_INSERT, seed=1)
    layer = last_block(template)
    wanted = [Insertion(template, layer, into, last_block(into).nodes[-1])] * blocks
    return into, insert_layers(into.module, into.example, wanted), layer


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("width", [4, 6])
def test_a_block_that_adds_zero_keeps_the_function(name, width):
    into, edited, layer = deeper(name, width)
    assert gap(into.module, edited, 3 * torch.randn(5, 3, 8, 8)) <= FUNCTION
    assert len([n for n in inserted(edited) if n.op != "get_attr"]) == 2 * len(layer.nodes)
    lint(edited)


def gradients(module, x):
    module.zero_grad()
    outputs_of = module(x)
    (outputs_of * torch.linspace(-1, 1, outputs_of.numel()).view_as(outputs_of)).sum().backward()
    return {
        n: float(p.grad.abs().max()) for n, p in module.named_parameters() if p.grad is not None
    }


def new_parameters(into, edited):
    return [
        n for n, _ in edited.named_parameters() if n not in dict(into.module.named_parameters())
    ]


@pytest.mark.parametrize("name", BLOCKS)
def test_an_inserted_block_can_be_trained(name):
    """Its last writer gets a gradient at once, and after one step so does everything in it."""
    into, edited, _ = deeper(name, blocks=1)
    new = new_parameters(into, edited)
    first = gradients(edited, IMAGES_TO_INSERT)
    assert any(first[n] > 0 for n in new)
    train(edited, first, new)
    second = gradients(edited, IMAGES_TO_INSERT)
    assert all(second[n] > 0 for n in new if _matters(edited, n))


def train(module, grads, names):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in names and grads[name]:
                parameter -= 0.1 * parameter.grad / grads[name]


def _matters(module, name):
    """A bias before a norm that takes means off has no gradient; everything else has one."""
    return not name.endswith("bias")


@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_an_inserted_block_of_a_transformer_keeps_the_function_and_can_be_trained(name):
    into = network(Tokens(8, 2, 12, 1), IMAGES_TO_INSERT)
    template = network(Tokens(8, 2, 10, 2), IMAGES_TO_INSERT, seed=1)
    behind = layer_of(into, "blocks.0.attention").nodes[-1]
    edited = insert(into, template, f"blocks.0.{name}", behind)
    assert gap(into.module, edited, IMAGES_TO_INSERT) <= FUNCTION
    new = new_parameters(into, edited)
    first = gradients(edited, IMAGES_TO_INSERT)
    train(edited, first, new)
    second = gradients(edited, IMAGES_TO_INSERT)
    weights = [n for n in new if n.endswith("weight") and "norm" not in n]
    assert weights and all(second[n] > 0 for n in weights)


def test_zero_blocks_stay_zero_in_training_mode_but_for_statistics():
    into, edited, _ = deeper("residual")
    before = outputs(copy.deepcopy(into.module).train(), IMAGES_TO_INSERT)
    assert torch.allclose(outputs(edited.train(), IMAGES_TO_INSERT), before, rtol=1e-4, atol=1e-5)


# --- where they go --------------------------------------------------------------------------------


def test_several_insertions_behind_one_node_follow_each_other_in_order():
    into, template = (
        network(mlp(6, 5, 3), VECTORS_TO_INSERT),
        network(mlp(6, 7, 7, 7, 3), VECTORS_TO_INSERT, seed=1),
    )
    second, third = layer_of(template, "2"), layer_of(template, "4")
    wanted = [Insertion(template, layer, into, "_1") for layer in (second, third)]
    edited = insert_layers(into.module, into.example, wanted)
    assert [str(n.target) for n in edited.graph.nodes if n.op == "call_module"][:6] == [
        "0",
        "1",
        *[str(n.target) for n in inserted(edited)],
    ]
    first_exit = inserted(edited)[1].name
    marks = [Stamp(0, "_1", True, False)] * 2 + [Stamp(1, first_exit, True, False)] * 2
    assert [n.meta["inserted"] for n in inserted(edited)] == marks
    assert gap(into.module, edited, VECTORS_TO_INSERT) <= FUNCTION


def test_nodes_of_a_block_know_which_of_them_hold_the_value():
    _, edited, layer = deeper("residual", blocks=1)
    held = [n.name for n in inserted(edited) if n.meta["inserted"].carries]
    assert len(held) == 2, "the sum and the activation behind it"
    assert all(n.meta["origin"][0] == "deepen" for n in inserted(edited))


def test_an_insertion_reaches_every_reader():
    """The skip and the branch of the next block both read what was put in."""
    template = network(residual((6, 3)), IMAGES_TO_INSERT, seed=1)
    into = network(residual((6, 2)), IMAGES_TO_INSERT)
    edited = insert(into, template, "1.1", "relu")
    exit_node = inserted(edited)[-1]
    assert {u.name for u in exit_node.users} == {"_1_1_a_0", "_1_1_skip"}
    assert gap(into.module, edited, IMAGES_TO_INSERT) <= FUNCTION


def test_a_layer_can_be_put_in_front_of_a_segment():
    template = network(
        nn.Sequential(conv(3, 4), nn.MaxPool2d(2), conv(4, 4), conv(4, 4), Pooled(4, 3)),
        IMAGES_TO_INSERT,
    )
    into = network(
        nn.Sequential(conv(3, 5), nn.MaxPool2d(2), conv(5, 7), Pooled(7, 3)),
        IMAGES_TO_INSERT,
        seed=1,
    )
    edited = insert(into, template, "2.0", "_1")
    assert gap(into.module, edited, IMAGES_TO_INSERT) <= FUNCTION
    assert [n.name for n in edited.graph.nodes].index(inserted(edited)[0].name) == 5


def test_names_that_are_taken_are_not_overwritten():
    into, template = (
        network(mlp(6, 5, 4, 3), VECTORS_TO_INSERT),
        network(mlp(6, 7, 7, 7, 3), VECTORS_TO_INSERT, seed=1),
    )
    edited = insert(into, template, "2", "_1", times=3)
    names = [n for n, _ in edited.named_parameters()]
    assert len(set(names)) == len(names) == 12
    for name, tensor in into.module.state_dict().items():
        assert torch.equal(edited.state_dict()[name], tensor)


def test_an_inserted_layer_is_not_put_inside_a_module_that_is_called():
    """Where its path would lead into another layer (here: a pooling), it gets a path of its own."""
    template = network(nn.Sequential(conv(3, 4), conv(4, 4), Pooled(4, 3)), IMAGES_TO_INSERT)
    into = network(
        nn.Sequential(conv(3, 5), nn.MaxPool2d(2), Pooled(5, 3)), IMAGES_TO_INSERT, seed=1
    )
    edited = insert(into, template, "1.0", "_0_2")
    called = [str(n.target) for n in edited.graph.nodes if n.op == "call_module"]
    assert not any(a.startswith(f"{b}.") for a in called for b in called)
    assert gap(into.module, edited, IMAGES_TO_INSERT) <= FUNCTION


def test_copies_do_not_share_weights_with_each_other_nor_with_the_template():
    into, template = (
        network(mlp(6, 5, 3), VECTORS_TO_INSERT),
        network(mlp(6, 5, 5, 3), VECTORS_TO_INSERT, seed=1),
    )
    edited = insert(into, template, "2", "_1", times=2)
    pointers = [p.data_ptr() for p in edited.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert not set(pointers) & {p.data_ptr() for p in template.module.parameters()}


def test_template_and_network_are_left_as_they_were():
    into, template = (
        network(mlp(6, 5, 3), VECTORS_TO_INSERT),
        network(mlp(6, 7, 7, 3), VECTORS_TO_INSERT, seed=1),
    )
    states = [copy.deepcopy(n.module.state_dict()) for n in (into, template)]
    insert(into, template, "2", "_1")
    for found, state in zip((into, template), states):
        assert all(torch.equal(t, state[k]) for k, t in found.module.state_dict().items())
        assert not inserted(found.module)


def test_the_global_random_state_is_left_as_it_was():
    into, template = (
        network(mlp(6, 5, 3), VECTORS_TO_INSERT),
        network(mlp(6, 7, 7, 3), VECTORS_TO_INSERT, seed=1),
    )
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    insert(into, template, "2", "_1")
    assert torch.rand(1) == expected


# --- refusals -------------------------------------------------------------------------------------


def refused(into, template, name, after, x, level=2):
    with fxfuse.debug(level), pytest.raises(PassError) as caught:
        insert(network(into, x), network(template, x, seed=1), name, after)
    assert not isinstance(caught.value, NotEquivalent)
    assert f"'{name}'" in caught.value.where
    return caught.value


@pytest.mark.parametrize("act", [nn.GELU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.Softplus])
def test_an_activation_that_acts_twice_is_refused(act):
    error = refused(
        mlp(6, 5, 3, act=act), mlp(6, 7, 7, 3, act=act), "2", "_1", VECTORS_TO_INSERT, level=0
    )
    assert "activation '_3' changes the values behind '_1'" in error.met


def test_an_activation_behind_a_linear_layer_is_refused():
    """What a linear bottleneck hands on may be negative."""
    into = nn.Sequential(conv(3, 4, act=False), Pooled(4, 3))
    template = nn.Sequential(conv(3, 4, act=False), conv(4, 4), Pooled(4, 3))
    refused(into, template, "1.0", "_0_1", IMAGES_TO_INSERT, level=0)


def test_an_activation_behind_an_input_is_refused():
    refused(mlp(6, 5, 3), mlp(6, 6, 7, 3), "2", "input_1", VECTORS_TO_INSERT, level=0)


def test_a_layer_without_activation_may_follow_a_linear_one():
    into = network(nn.Sequential(conv(3, 4, act=False), Pooled(4, 3)), IMAGES_TO_INSERT)
    template = network(
        nn.Sequential(conv(3, 4, act=False), conv(4, 4, act=False), Pooled(4, 3)),
        IMAGES_TO_INSERT,
        seed=1,
    )
    assert gap(into.module, insert(into, template, "1.0", "_0_1"), IMAGES_TO_INSERT) <= FUNCTION


def test_a_convolution_that_changes_the_size_is_refused():
    into = nn.Sequential(conv(3, 4), Pooled(4, 3))
    for layer in (
        conv(4, 4, stride=2),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 2, padding=1), nn.ReLU()),
        nn.Sequential(nn.ConvTranspose2d(4, 4, 3, padding=1), nn.ReLU()),
    ):
        template = nn.Sequential(conv(3, 4), layer, Pooled(4, 3))
        error = refused(into, template, "1.0", "_0_2", IMAGES_TO_INSERT)
        assert "changes the size" in error.met


def test_a_norm_that_depends_on_its_input_is_refused_in_a_plain_layer():
    norm = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.ReLU())
    template = nn.Sequential(conv(3, 4), norm, Pooled(4, 3))
    error = refused(
        nn.Sequential(conv(3, 4), Pooled(4, 3)), template, "1.0", "_0_2", IMAGES_TO_INSERT
    )
    assert "depends on its input" in error.met


@pytest.mark.parametrize("block", [lambda: Gate(4, 2), lambda: Residual(4, 6)])
def test_a_block_that_is_no_sum_around_its_entry_is_refused(block):
    wide = {Gate: 4, Residual: 6}[type(block())]
    template = nn.Sequential(conv(3, 4), block(), Pooled(wide, 3))
    found = network(template, IMAGES_TO_INSERT)
    name = partition(found)[-2].layers[-1].name
    refused(nn.Sequential(conv(3, 4), Pooled(4, 3)), template, name, "_0_2", IMAGES_TO_INSERT)


def test_a_branch_that_cannot_be_set_to_zero_is_refused():
    class Powered(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return x + torch.exp(self.a(x))

    template = nn.Sequential(conv(3, 4), Powered(), Pooled(4, 3))
    with pytest.raises(PassError):
        insert(
            network(nn.Sequential(conv(3, 4), Pooled(4, 3)), IMAGES_TO_INSERT),
            network(template, IMAGES_TO_INSERT),
            "1.a",
            "_0_2",
        )


def test_a_layer_that_reads_the_input_beside_its_entry_is_refused():
    class Sized(nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(blocks))

        def forward(self, x):
            y = torch.relu(self.a(x))
            for block in self.blocks:
                y = y + block(y).view(x.shape[0], -1)
            return self.head(y)

    error = refused(Sized(0), Sized(1), "blocks.0", "relu", VECTORS_TO_INSERT, level=0)
    assert "reads the network's input beside its entry" in error.met


def balanced(*nets, data=VECTORS):
    found = networks(*nets, data=data)
    alignment = align_networks(found, Calibration(data), measure_all=False)
    return found, deepen(found, alignment)


def places(network):
    return Counter(space.signature for space in network.spaces)


def assert_same_structure_and_functions(before, after, data):
    first = after.networks[0].module.graph
    for network, old in zip(after.networks, before):
        own = network.module.graph
        assert [(n.op, n.name, str(n.target)) for n in own.nodes] == [
            (n.op, n.name, str(n.target)) for n in first.nodes
        ]
        assert places(network) == places(after.networks[0])
        assert set(network.module.state_dict()) == set(after.networks[0].module.state_dict())
        assert gap(old.module, network.module, data) <= FUNCTION
        assert network.name == old.name and network.example is old.example


@pytest.mark.parametrize("name", PAIRS)
def test_all_networks_get_one_structure_and_keep_their_functions(name):
    make, data = PAIRS[name]
    before, after = balanced(*make(), data=data)
    assert_same_structure_and_functions(before, after, data)


@given(
    st.lists(st.integers(3, 8), min_size=1, max_size=4),
    st.lists(st.integers(3, 8), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_perceptrons_of_any_widths_and_depths_can_be_balanced(a, b, norm, bias):
    nets = [mlp(6, *widths, 3, norm=norm, bias=bias) for widths in (a, b)]
    before, after = balanced(*nets)
    assert_same_structure_and_functions(before, after, VECTORS)
    depth = max(len(a), len(b)) + 1
    assert [sum(len(s.layers) for s in partition(n)) for n in after.networks] == [depth] * 2


shapes = st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=3), min_size=2, max_size=2)


@given(shapes, shapes, st.booleans())
def test_convolutional_networks_can_be_balanced_in_every_segment(a, b, norm):
    before, after = balanced(stages(*a, norm=norm), stages(*b, norm=norm), data=IMAGES)
    assert_same_structure_and_functions(before, after, IMAGES)


def test_widths_stay_as_they_were():
    _, after = balanced(mlp(6, 8, 8, 8, 3), mlp(6, 5, 4, 3))
    shapes = [
        [tuple(p.shape) for p in n.module.parameters() if p.dim() == 2] for n in after.networks
    ]
    assert shapes[0] == [(8, 6), (8, 8), (8, 8), (3, 8)]
    assert shapes[1] == [(5, 6), (5, 5), (4, 5), (3, 4)]


def test_names_and_states_are_those_of_the_network_with_most_layers():
    before, after = balanced(mlp(6, 5, 3), mlp(6, 8, 8, 8, 3))
    assert [set(n.module.state_dict()) for n in after.networks] == [
        set(before[1].module.state_dict())
    ] * 2


def test_what_is_absent_is_said_for_each_network():
    _, after = balanced(stages([4, 4, 4], [5]), stages([6], [7, 7]), data=IMAGES)
    ours, theirs = after.absent
    assert len(ours) == 1 and len(theirs) == 2
    assert len(ours[0].nodes) == len(theirs[0].nodes) == 3, "convolution, norm, activation"
    assert all(a.carriers == a.nodes and not a.inner for a in (*ours, *theirs))
    nodes = {n.name for n in after.networks[0].module.graph.nodes}
    assert all({*a.nodes, a.entry} <= nodes for a in (*ours, *theirs))


def test_absent_blocks_hand_their_entry_on_and_write_nothing_inside():
    before, after = balanced(residual((6, 3)), residual((6, 1)), data=IMAGES)
    assert not after.absent[0] and len(after.absent[1]) == 2
    lacking = after.networks[1]
    found = values(lacking.module, IMAGES)
    for absent in after.absent[1]:
        assert len(absent.carriers) == 2 and absent.inner
        entry = found[absent.entry]
        for name in absent.carriers:
            assert torch.allclose(found[name], entry, atol=1e-5)
        assert any(float(found[name].abs().max()) == 0 for name in absent.inner)


def test_carriers_hold_the_value_and_the_others_do_not():
    absent = Absent(("a", "b", "c"), "e", ("b", "c"))
    assert absent.inner == frozenset("a")


def test_the_networks_are_left_as_they_were():
    found = networks(mlp(6, 8, 8, 8, 3), mlp(6, 5, 3))
    states = [copy.deepcopy(n.module.state_dict()) for n in found]
    codes = [n.module.code for n in found]
    after = deepen(found, align_networks(found, Calibration(VECTORS)))
    with torch.no_grad():
        for network in after.networks[1:]:
            for parameter in network.module.parameters():
                parameter.zero_()
    assert codes == [n.module.code for n in found]
    assert all(torch.equal(t, states[1][k]) for k, t in found[1].module.state_dict().items())


def test_alignments_by_hand_are_followed():
    found = networks(mlp(6, 8, 8, 8, 3), mlp(6, 5, 5, 3))
    hidden, last = align_networks(found, Calibration(VECTORS)).segments
    absent = []
    for row in (("0", "2", None), ("0", None, "2"), (None, "0", "2")):
        hand = dataclasses.replace(hidden, slots=(hidden.slots[0], row))
        alignment = Alignment((hand, last), ("net 0", "net 1"))
        if row[0] is None:
            with pytest.raises(PassError, match="no neutral form"):
                deepen(found, alignment)
            continue
        after = deepen(found, alignment)
        assert_same_structure_and_functions(found, after, VECTORS)
        absent.append(after.absent[1][0].nodes[0])
    assert absent == ["_4", "_2"]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s[::-1],
        lambda s: s[:1],
        lambda s: (s[0], s[0]),
        lambda s: (dataclasses.replace(s[0], slots=(s[0].slots[0], ("0", "2", None))), s[1]),
        lambda s: (dataclasses.replace(s[0], slots=(s[0].slots[0], ("2", None, "0"))), s[1]),
        lambda s: (dataclasses.replace(s[0], slots=(("0", "x", "4"), s[0].slots[1])), s[1]),
    ],
)
def test_alignments_of_other_networks_are_refused(change):
    found = networks(mlp(6, 8, 8, 8, 3), mlp(6, 5, 3))
    alignment = align_networks(found, Calibration(VECTORS))
    layers = [{x.name: x for s in partition(n) for x in s.layers} for n in found]
    check_alignment(alignment, layers)
    wrong = dataclasses.replace(alignment, segments=tuple(change(alignment.segments)))
    with pytest.raises(ArgumentError, match="an alignment of the layers") as caught:
        check_alignment(wrong, layers)
    assert "argument `alignment`" in caught.value.where


def test_an_alignment_of_another_number_of_networks_is_refused():
    found = networks(mlp(6, 8, 8, 8, 3), mlp(6, 5, 3), mlp(6, 5, 3))
    alignment = align_networks(found[:2], Calibration(VECTORS))
    with pytest.raises(ArgumentError):
        deepen(found, alignment)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
def test_an_activation_that_acts_twice_is_refused_naming_the_layer(swapped):
    nets = [mlp(6, 8, 8, 8, 3, act=nn.GELU), mlp(6, 5, 3, act=nn.GELU)]
    with pytest.raises(PassError, match="no neutral form") as caught:
        balanced(*(nets[::-1] if swapped else nets))
    assert caught.value.where == "layer '2'"


def test_an_expanding_layer_behind_a_linear_one_is_refused_naming_it():
    def net(expansions):
        hidden = [conv(4, 4) for _ in range(expansions)]
        return nn.Sequential(conv(3, 4, act=False), *hidden, conv(4, 4, act=False), Pooled(4, 3))

    with pytest.raises(PassError, match="changes the values behind") as caught:
        balanced(net(2), net(0), data=IMAGES)
    assert caught.value.where == "layer '1.0'"


def test_dropout_behind_one_layer_alone_makes_another_structure():
    spelled = mlp(6, 5, 5, 3)
    dropping = nn.Sequential(*spelled[:4], nn.Dropout(), spelled[4])
    with pytest.raises(PairingError):
        balanced(dropping, mlp(6, 5, 5, 3))


def test_averaging_and_maximum_pooling_are_not_the_same_structure():
    a = nn.Sequential(conv(3, 4), nn.MaxPool2d(2), conv(4, 4), conv(4, 4), Pooled(4, 3))
    b = nn.Sequential(conv(3, 4), nn.AvgPool2d(2), conv(4, 4), Pooled(4, 3))
    with pytest.raises(PairingError, match="differ beside their aligned layers") as caught:
        balanced(a, b, data=IMAGES)
    assert "_1" in caught.value.where


def test_what_a_graph_does_not_say_about_itself_is_caught_by_the_outputs():
    """Two networks that differ in nothing but the axis of a function."""

    class Normalised(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.a, self.b, self.dim = nn.Linear(6, 5), nn.Linear(5, 3), dim

        def forward(self, x):
            return self.b(F.softmax(self.a(x), self.dim))

    tokens = torch.randn(4, 5, 6)
    with fxfuse.debug(0), pytest.raises(FuseError):
        balanced(Normalised(1), Normalised(2), data=tokens)


def test_one_module_used_twice_is_not_two_modules():
    class Shared(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = self.a if shared else nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.relu(self.b(torch.relu(self.a(x)))))

    with pytest.raises(PairingError, match="differ beside their aligned layers"):
        balanced(Shared(True), Shared(False))
    before, after = balanced(Shared(True), Shared(True))
    assert_same_structure_and_functions(before, after, VECTORS)


def test_functions_and_modules_are_one_structure_where_they_hold_no_flags():
    class Spelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(F.relu(self.a(x)))

    before, after = balanced(Spelled(), mlp(6, 8, 8, 3))
    assert_same_structure_and_functions(before, after, VECTORS)
    before, after = balanced(mlp(6, 5, 3), nn.Sequential(Spelled()))
    assert_same_structure_and_functions(before, after, VECTORS)


def test_live_flags_stay_live():
    before, after = balanced(Functional(), Functional())
    for network in after.networks:
        module = network.module
        assert not torch.equal(outputs(module.train(), VECTORS), outputs(module, VECTORS))
        assert torch.equal(outputs(module.eval(), VECTORS), outputs(module, VECTORS))


@pytest.mark.parametrize("name", ["perceptrons", "residual", "tokens"])
def test_inserted_layers_can_be_trained(name):
    make, data = PAIRS[name]
    _, after = balanced(*make(), data=data)
    for network, absent in zip(after.networks, after.absent):
        network.module.zero_grad()
        out = network.module(data)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads = {n: p.grad for n, p in network.module.named_parameters()}
        for layer in absent:
            names = [t for n in layer.nodes for t in network.book.tensors.get(n, ()) if t in grads]
            assert any(float(grads[t].abs().max()) > 0 for t in names)


def test_buffers_that_are_no_state_stay_so():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
            self.register_buffer("scale", torch.rand(6), persistent=False)

        def forward(self, x):
            return x + self.b(torch.relu(self.a(x)) * self.scale)

    def net(depth):
        return nn.Sequential(nn.Linear(6, 4), *[Scaled() for _ in range(depth)], nn.Linear(4, 3))

    before, after = balanced(net(2), net(3))
    assert_same_structure_and_functions(before, after, VECTORS)
    assert set(after.networks[0].module.state_dict()) == set(net(3).state_dict())


def test_layers_that_change_what_they_hand_on_are_inserted_on_request_only():
    """The identity and ReLU in front of the first layer clip the inputs; the error says so."""
    nets, x = [randomise(mlp(6, 6, 6, 3)), randomise(mlp(6, 6, 3), 1)], torch.randn(40, 6)
    alignment = fxfuse.align(nets, x, pairs=[[("2", "0")]])
    with pytest.raises(PassError, match="no neutral form"):
        fxfuse.balance(nets, x, alignment=alignment)
    found = [Network.of(str(i), trace(n), (x,)) for i, n in enumerate(nets)]
    balanced = Deepen(approximate=True)(found, alignment, Calibration(x))
    clipped = outputs(nets[1], x.relu())
    assert torch.allclose(outputs(balanced.networks[1].module, x), clipped, atol=1e-5)
    wanted = float((clipped - outputs(nets[1], x)).norm() / outputs(nets[1], x).norm())
    assert balanced.errors == (0.0, pytest.approx(wanted, rel=1e-4))
    same = Deepen(approximate=True)(found, fxfuse.align(nets, x), Calibration(x))
    assert max(same.errors) < 1e-5
