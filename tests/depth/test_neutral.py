"""Values that make layers neutral: of plain layers, of blocks, and of runs of layers."""

import copy
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.alignment.layers import partition
from fxfuse.depth._insert import insert_layers
from fxfuse.depth._neutral import Insertion
from fxfuse.errors import NotEquivalent, PassError
from fxfuse.graph.verify import lint
from tests.support.insertions import insert, layer_of, network, new_nodes
from tests.support.nets import (
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
)
from tests.support.sweeps import crossed, some
from tests.support.tolerances import FUNCTION

VECTORS, IMAGES = torch.randn(4, 6), torch.randn(4, 3, 8, 8)
TOKENS = torch.randn(4, 5, 6)


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
    into = network(mlp(6, width, 3, norm=norm, act=act, bias=bias), VECTORS, seed=seed)
    template = network(mlp(6, other, other, 3, norm=norm, act=act, bias=bias), VECTORS)
    name, after = ("3", "_2") if norm else ("2", "_1")
    edited = insert(into, template, name, after)
    assert gap(into.module, edited, 3 * torch.randn(50, 6)) <= FUNCTION
    assert len(new_nodes(into, edited)) == 2 + norm


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
    into, template = network(shallow, IMAGES, seed=seed), network(deep, IMAGES)
    after = "_1" if pool else "_0_2" if norm else "_0_1"
    edited = insert(into, template, "1.0", after)
    assert gap(into.module, edited, 3 * torch.randn(5, 3, 8, 8)) <= FUNCTION
    (layer,) = [m for n, m in edited.named_modules() if n == str(new_nodes(into, edited)[0].target)]
    assert (layer.in_channels, layer.out_channels) == (width, width)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_identities_may_be_grouped(groups):
    def net(layers):
        return nn.Sequential(
            conv(3, 8), *[conv(8, 8, groups=groups) for _ in range(layers)], Pooled(8, 3)
        )

    into, template = network(net(1), IMAGES), network(net(2), IMAGES, seed=1)
    assert gap(into.module, insert(into, template, "2.0", "_1_2"), IMAGES) <= FUNCTION


def test_identities_may_be_dilated():
    def net(layers):
        extra = [
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.ReLU())
            for _ in range(layers)
        ]
        return nn.Sequential(conv(3, 4), *extra, Pooled(4, 3))

    into, template = network(net(0), IMAGES), network(net(1), IMAGES, seed=1)
    assert gap(into.module, insert(into, template, "1.0", "_0_2"), IMAGES) <= FUNCTION


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
        network(net([5]), VECTORS),
        network(net([5, 5]), VECTORS, seed=1),
    )
    edited = insert(into, template, "3", "_2")
    assert gap(into.module, edited, VECTORS) <= 1e-6


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


def last_block(network):
    return partition(network)[-2].layers[-1]


def deeper(name, width=6, other=4, blocks=2):
    """A network with one block, and itself with more of them put in from a wider one."""
    into = network(stack(BLOCKS[name], other, 1), IMAGES)
    template = network(stack(BLOCKS[name], width, 2), IMAGES, seed=1)
    layer = last_block(template)
    wanted = [Insertion(template, layer, into, last_block(into).nodes[-1])] * blocks
    return into, insert_layers(into, wanted)[0], layer


@pytest.mark.parametrize(("name", "width"), crossed(BLOCKS, [4, 6]))
def test_a_block_that_adds_zero_keeps_the_function(name, width):
    into, edited, layer = deeper(name, width)
    assert gap(into.module, edited, 3 * torch.randn(5, 3, 8, 8)) <= FUNCTION
    assert len([n for n in new_nodes(into, edited) if n.op != "get_attr"]) == 2 * len(layer.nodes)
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
    first = gradients(edited, IMAGES)
    assert any(first[n] > 0 for n in new)
    train(edited, first, new)
    second = gradients(edited, IMAGES)
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
    into = network(Tokens(8, 2, 12, 1), IMAGES)
    template = network(Tokens(8, 2, 10, 2), IMAGES, seed=1)
    behind = layer_of(into, "blocks.0.attention").nodes[-1]
    edited = insert(into, template, f"blocks.0.{name}", behind)
    assert gap(into.module, edited, IMAGES) <= FUNCTION
    new = new_parameters(into, edited)
    first = gradients(edited, IMAGES)
    train(edited, first, new)
    second = gradients(edited, IMAGES)
    weights = [n for n in new if n.endswith("weight") and "norm" not in n]
    assert weights and all(second[n] > 0 for n in weights)


def test_zero_blocks_add_nothing_in_training_mode_either():
    into, edited, _ = deeper("residual")
    before = outputs(copy.deepcopy(into.module).train(), IMAGES)
    assert torch.allclose(outputs(edited.train(), IMAGES), before, rtol=1e-4, atol=1e-5)


# --- refusals -------------------------------------------------------------------------------------


def refused(into, template, name, after, x, level=2):
    with fxfuse.debug(level), pytest.raises(PassError) as caught:
        insert(network(into, x), network(template, x, seed=1), name, after)
    assert not isinstance(caught.value, NotEquivalent)
    assert f"'{name}'" in caught.value.where
    return caught.value


@pytest.mark.parametrize("act", [nn.GELU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.Softplus])
def test_an_activation_that_is_not_idempotent_is_refused(act):
    error = refused(mlp(6, 5, 3, act=act), mlp(6, 7, 7, 3, act=act), "2", "_1", VECTORS, level=0)
    assert "activation '_3' changes the values behind '_1'" in error.met


def test_an_activation_behind_a_linear_layer_is_refused():
    """What a linear bottleneck passes on may be negative."""
    into = nn.Sequential(conv(3, 4, act=False), Pooled(4, 3))
    template = nn.Sequential(conv(3, 4, act=False), conv(4, 4), Pooled(4, 3))
    refused(into, template, "1.0", "_0_1", IMAGES, level=0)


def test_an_activation_behind_an_input_is_refused():
    refused(mlp(6, 5, 3), mlp(6, 6, 7, 3), "2", "input_1", VECTORS, level=0)


def test_a_layer_without_activation_may_follow_a_linear_one():
    into = network(nn.Sequential(conv(3, 4, act=False), Pooled(4, 3)), IMAGES)
    template = network(
        nn.Sequential(conv(3, 4, act=False), conv(4, 4, act=False), Pooled(4, 3)),
        IMAGES,
        seed=1,
    )
    assert gap(into.module, insert(into, template, "1.0", "_0_1"), IMAGES) <= FUNCTION


def test_a_convolution_that_changes_the_size_is_refused():
    into = nn.Sequential(conv(3, 4), Pooled(4, 3))
    for layer in (
        conv(4, 4, stride=2),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 2, padding=1), nn.ReLU()),
        nn.Sequential(nn.ConvTranspose2d(4, 4, 3, padding=1), nn.ReLU()),
    ):
        template = nn.Sequential(conv(3, 4), layer, Pooled(4, 3))
        error = refused(into, template, "1.0", "_0_2", IMAGES)
        assert "changes the size" in error.met


def test_a_norm_that_depends_on_its_input_is_refused_in_a_plain_layer():
    norm = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.ReLU())
    template = nn.Sequential(conv(3, 4), norm, Pooled(4, 3))
    error = refused(nn.Sequential(conv(3, 4), Pooled(4, 3)), template, "1.0", "_0_2", IMAGES)
    assert "depends on its input" in error.met


@pytest.mark.parametrize("block", [lambda: Gate(4, 2), lambda: Residual(4, 6)])
def test_a_block_that_is_no_sum_around_its_entry_is_refused(block):
    wide = {Gate: 4, Residual: 6}[type(block())]
    template = nn.Sequential(conv(3, 4), block(), Pooled(wide, 3))
    name = last_block(network(template, IMAGES)).name
    refused(nn.Sequential(conv(3, 4), Pooled(4, 3)), template, name, "_0_2", IMAGES)


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
            network(nn.Sequential(conv(3, 4), Pooled(4, 3)), IMAGES),
            network(template, IMAGES),
            "1.a",
            "_0_2",
        )


def test_a_layer_that_reads_the_input_besides_its_entry_is_refused():
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

    error = refused(Sized(0), Sized(1), "blocks.0", "relu", VECTORS, level=0)
    assert "reads the network's input besides its entry" in error.met


# --- runs of layers ------------------------------------------------------------------------------

BATCH = torch.randn(16, 3, 8, 8)
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


QUICK = (nn.ReLU6, False), (nn.SiLU, True)


@pytest.mark.parametrize(("act", "gate"), some(product(ACTS, [False, True]), *QUICK))
def test_a_run_that_one_network_lacks_passes_on_its_input(act, gate):
    nets = pair(act, gate)
    for net, balanced in zip(nets, fxfuse.balance(nets, BATCH)):
        assert gap(net, balanced, BATCH) <= FUNCTION
    fused = fxfuse.fuse(nets, BATCH)
    pair(act, gate)[0].load_state_dict(fused.state_dict(), strict=True)
    assert torch.isfinite(fused(BATCH)).all()


def test_layers_with_biases_carry_as_well_as_those_with_norms():
    nets = pair(nn.SiLU, norm=False)
    for net, balanced in zip(nets, fxfuse.balance(nets, BATCH)):
        assert gap(net, balanced, BATCH) <= FUNCTION


@settings(max_examples=5)
@given(st.sampled_from(ACTS), st.booleans(), st.integers(0, 99))
def test_inputs_farther_out_than_the_examples_still_pass_through(act, gate, seed):
    nets = pair(act, gate)
    after = fxfuse.balance(nets, BATCH)[1]
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    assert gap(nets[1], after, x.clamp(-2, 2)) <= FUNCTION


def test_all_weight_on_the_network_that_has_the_run_gives_its_function():
    nets = pair(nn.SiLU)
    fused = fxfuse.fuse(nets, BATCH, weights=[1, 0])
    assert gap(nets[0], fused, BATCH) <= FUNCTION


def test_activations_without_a_straight_line_are_refused():
    with pytest.raises(PassError, match="nowhere a straight line"):
        fxfuse.balance(pair(nn.Sigmoid), BATCH)


def test_a_run_narrower_than_the_stream_is_refused():
    with pytest.raises(PassError, match="narrower"):
        fxfuse.balance(pair(nn.SiLU, inner=5), BATCH)


def test_a_gate_without_a_bias_is_refused():
    nets = pair(nn.SiLU, gate=True)
    for net in nets:
        for part in net.modules():
            if isinstance(part, Gate):
                part.up.bias = None
    with pytest.raises(PassError, match="no bias to open it"):
        fxfuse.balance(nets, BATCH)


def test_the_models_are_left_as_they_were():
    nets = pair(nn.SiLU)
    before = [{k: v.clone() for k, v in n.state_dict().items()} for n in nets]
    fxfuse.balance(nets, BATCH)
    for net, state in zip(nets, before):
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
