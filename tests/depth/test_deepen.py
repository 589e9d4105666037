"""Networks brought to one structure by inserting layers, and alignments that do not fit them."""

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
from fxfuse.depth import AbsentLayer
from fxfuse.depth.deepen import Deepen, check_alignment, deepen
from fxfuse.errors import ArgumentError, FuseError, PairingError, PassError
from fxfuse.graph.trace import trace
from fxfuse.ir import Alignment
from fxfuse.spaces.network import Network
from tests.support.nets import (
    Functional,
    Pooled,
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
from tests.support.sweeps import crossed, some
from tests.support.tolerances import FUNCTION


def balanced(*nets, data=VECTORS):
    originals = networks(*nets, data=data)
    alignment = align_networks(originals, Calibration(data), measure_all=False)
    return originals, deepen(originals, alignment)


def steps_of(graph):
    return [(n.op, n.name, str(n.target)) for n in graph.nodes]


def places(network):
    return Counter(space.signature for space in network.spaces)


def assert_same_structure_and_functions(before, after, data):
    first = after.networks[0].module.graph
    for network, old in zip(after.networks, before):
        assert steps_of(network.module.graph) == steps_of(first)
        assert places(network) == places(after.networks[0])
        assert set(network.module.state_dict()) == set(after.networks[0].module.state_dict())
        assert gap(old.module, network.module, data) <= FUNCTION
        assert network.name == old.name and network.example is old.example


@pytest.mark.parametrize("name", some(PAIRS, *[*PAIRS][::2]))
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


def test_the_layers_that_each_network_lacks_are_listed():
    _, after = balanced(stages([4, 4, 4], [5]), stages([6], [7, 7]), data=IMAGES)
    ours, theirs = after.absent
    assert len(ours) == 1 and len(theirs) == 2
    assert len(ours[0].nodes) == len(theirs[0].nodes) == 3, "convolution, norm, activation"
    assert all(a.carriers == a.nodes and not a.inner for a in (*ours, *theirs))
    nodes = {n.name for n in after.networks[0].module.graph.nodes}
    assert all({*a.nodes, a.entry} <= nodes for a in (*ours, *theirs))


def test_absent_blocks_pass_on_their_entry_and_their_branch_writes_zeros():
    before, after = balanced(residual((6, 3)), residual((6, 1)), data=IMAGES)
    assert not after.absent[0] and len(after.absent[1]) == 2
    lacking = after.networks[1]
    by_node = values(lacking.module, IMAGES)
    for absent in after.absent[1]:
        assert len(absent.carriers) == 2 and absent.inner
        entry = by_node[absent.entry]
        for name in absent.carriers:
            assert torch.allclose(by_node[name], entry, atol=1e-5)
        assert any(float(by_node[name].abs().max()) == 0 for name in absent.inner)


def test_nodes_that_do_not_carry_the_value_are_inner():
    absent = AbsentLayer(("a", "b", "c"), "e", ("b", "c"))
    assert absent.inner == frozenset("a")


def test_the_networks_are_left_as_they_were():
    originals = networks(mlp(6, 8, 8, 8, 3), mlp(6, 5, 3))
    states = [copy.deepcopy(n.module.state_dict()) for n in originals]
    codes = [n.module.code for n in originals]
    after = deepen(originals, align_networks(originals, Calibration(VECTORS)))
    with torch.no_grad():
        for network in after.networks[1:]:
            for parameter in network.module.parameters():
                parameter.zero_()
    assert codes == [n.module.code for n in originals]
    assert all(torch.equal(t, states[1][k]) for k, t in originals[1].module.state_dict().items())


def test_alignments_by_hand_are_followed():
    originals = networks(mlp(6, 8, 8, 8, 3), mlp(6, 5, 5, 3))
    hidden, last = align_networks(originals, Calibration(VECTORS)).segments
    absent = []
    for row in (("0", "2", None), ("0", None, "2"), (None, "0", "2")):
        hand = dataclasses.replace(hidden, slots=(hidden.slots[0], row))
        alignment = Alignment((hand, last), ("net 0", "net 1"))
        if row[0] is None:
            (first,) = deepen(originals, alignment).absent[1]
            assert "changes the values" in first.passed, "the inputs are not rectified"
            continue
        after = deepen(originals, alignment)
        assert_same_structure_and_functions(originals, after, VECTORS)
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
    originals = networks(mlp(6, 8, 8, 8, 3), mlp(6, 5, 3))
    alignment = align_networks(originals, Calibration(VECTORS))
    layers = [{x.name: x for s in partition(n) for x in s.layers} for n in originals]
    check_alignment(alignment, layers)
    wrong = dataclasses.replace(alignment, segments=tuple(change(alignment.segments)))
    with pytest.raises(ArgumentError, match="an alignment of the layers") as caught:
        check_alignment(wrong, layers)
    assert "argument `alignment`" in caught.value.where


def test_an_alignment_of_another_number_of_networks_is_refused():
    originals = networks(mlp(6, 8, 8, 8, 3), mlp(6, 5, 3), mlp(6, 5, 3))
    alignment = align_networks(originals[:2], Calibration(VECTORS))
    with pytest.raises(ArgumentError):
        deepen(originals, alignment)


# --- layers that are passed by --------------------------------------------------------------------

SMOOTH, BENT = [nn.SiLU, nn.GELU, nn.Tanh, nn.ELU, nn.Mish], [nn.LeakyReLU, nn.SELU, nn.Sigmoid]


@pytest.mark.parametrize(("act", "swapped"), crossed(SMOOTH + BENT, [False, True]))
def test_layers_without_a_neutral_form_are_passed_by(act, swapped):
    nets = [randomise(mlp(6, 8, 8, 8, 3, act=act)), randomise(mlp(6, 5, 3, act=act), 1)]
    nets = nets[::-1] if swapped else nets
    _, after = balanced(*nets)
    deep, shallow = (after.absent[k] for k in (int(swapped), 1 - int(swapped)))
    assert not deep and [x.name for x in shallow] == ["2", "4"]
    assert all("changes the values" in x.passed for x in shallow)
    assert all(x.carriers == x.nodes[-1:] and x.mute == {*x.nodes} for x in shallow)
    fused = fxfuse.fuse(nets, VECTORS, weights=[1 - swapped, swapped])
    assert gap(nets[int(swapped)], fused, VECTORS) <= FUNCTION


@pytest.mark.parametrize(("act", "norm"), crossed(SMOOTH, [False, True]))
def test_balance_gives_smooth_activations_a_small_signal(act, norm):
    nets = [mlp(6, *widths, 3, act=act, norm=norm) for widths in ((8, 8, 8), (5,))]
    nets = [randomise(net, seed) for seed, net in enumerate(nets)]
    x = 3 * VECTORS
    first, second = fxfuse.balance(nets, x)
    assert gap(nets[0], first, x) == 0 and gap(nets[1], second, x) <= FUNCTION / 2
    assert gap(nets[1], second, 3 * x) <= FUNCTION


@pytest.mark.parametrize("act", BENT)
def test_balance_refuses_what_has_no_slope_at_zero_and_its_advice_works(act):
    nets = [randomise(mlp(6, 8, 8, 3, act=act)), randomise(mlp(6, 5, 3, act=act), 1)]
    with pytest.raises(PassError, match="no neutral form") as caught:
        fxfuse.balance(nets, VECTORS)
    assert caught.value.where == "layer '2'"
    assert "fxfuse.Method(balancing=fxfuse.depth.Shorten())" in caught.value.do
    method = fxfuse.Method(balancing=fxfuse.depth.Shorten())
    shorter = fxfuse.balance(nets, VECTORS, method=method)
    assert gap(nets[1], shorter[1], VECTORS) <= FUNCTION
    assert caught.value.do.startswith("call fxfuse.fuse, ")
    assert gap(nets[0], fxfuse.fuse(nets, VECTORS, weights=[1, 0]), VECTORS) <= FUNCTION


class PostNorm(nn.Module):
    def __init__(self, width, norm):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(width, 7), nn.Linear(7, width), norm(width)

    def forward(self, x):
        return self.norm(x + self.b(torch.relu(self.a(x))))


def post_norms(norm):
    def net(width, depth, seed):
        blocks = [PostNorm(width, norm) for _ in range(depth)]
        return randomise(nn.Sequential(nn.Linear(6, width), *blocks, nn.Linear(width, 3)), seed)

    return [net(8, 4, 0), net(6, 2, 1)]


def test_what_is_near_enough_is_judged_on_all_samples():
    """Of three units that hardly vary, a second norm divides by what the first one added."""
    nets, flat = post_norms(lambda w: nn.GroupNorm(2, w)), 0
    for seed in range(6):
        x = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
        try:
            balanced = fxfuse.balance(nets, x)
        except PassError:
            flat += 1
        else:
            assert gap(nets[1], balanced[1], x) <= FUNCTION
    assert 0 < flat < 6


@pytest.mark.parametrize("norm", [nn.LayerNorm, lambda w: nn.GroupNorm(2, w)])
def test_blocks_with_a_norm_behind_are_passed_by_and_balance_moves_its_affine_part(norm):
    nets = post_norms(norm)
    first, second = fxfuse.balance(nets, VECTORS)
    assert gap(nets[0], first, VECTORS) == 0 and gap(nets[1], second, VECTORS) <= FUNCTION
    fused = fxfuse.fuse(nets, VECTORS, weights=[1, 0])
    assert gap(nets[0], fused, VECTORS) <= FUNCTION


class Scaled(nn.Module):
    """A norm whose scale is one more than its weight."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


class Sandwich(nn.Module):
    """A block whose branch ends in a norm."""

    def __init__(self, width):
        super().__init__()
        self.before, self.behind = Scaled(width), Scaled(width)
        self.a, self.b = nn.Linear(width, 12), nn.Linear(12, width, bias=False)

    def forward(self, x):
        return x + self.behind(self.b(torch.relu(self.a(self.before(x)))))


def test_a_weight_that_is_computed_with_is_not_what_silences_a_branch():
    def net(depth):
        blocks = [Sandwich(8) for _ in range(depth)]
        return randomise(nn.Sequential(nn.Linear(6, 8), *blocks, nn.Linear(8, 3)), seed=depth)

    nets = [net(3), net(1)]
    for before, after in zip(nets, fxfuse.balance(nets, VECTORS)):
        assert gap(before, after, VECTORS) <= FUNCTION


class Words(nn.Module):
    """Rows of a table, blocks around skips, and a head; norms in front of branches or behind."""

    def __init__(self, depth, behind=False):
        super().__init__()
        self.table, self.head, self.behind = nn.Embedding(11, 8), nn.Linear(8, 3), behind
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(depth + behind))
        self.a = nn.ModuleList(nn.Linear(8, 12) for _ in range(depth))
        self.b = nn.ModuleList(nn.Linear(12, 8, bias=False) for _ in range(depth))

    def forward(self, ids):
        h = self.table(ids)
        if self.behind:
            h = self.norms[-1](h)
        for norm, a, b in zip(self.norms, self.a, self.b):
            read = h if self.behind else norm(h)
            h = h + b(torch.relu(a(read)))
            h = norm(h) if self.behind else h
        return self.head(h.mean(1))


@pytest.mark.parametrize("behind", [False, True])
def test_blocks_may_follow_rows_of_a_table(behind):
    """What a sum reads of them is no parameter of its own, nor is the norm in front of a block."""
    ids = torch.randint(11, (40, 5), generator=torch.Generator().manual_seed(0))
    nets = [randomise(Words(depth, behind), seed=depth) for depth in (3, 1)]
    for net, same in zip(nets, fxfuse.balance(nets, ids)):
        assert gap(net, same, ids) <= FUNCTION
    fused = fxfuse.fuse(nets, ids, weights=[0, 1])
    nets[0].load_state_dict(fused.state_dict(), strict=True)


@pytest.mark.parametrize("norm", [None, lambda w: nn.GroupNorm(2, w)])
def test_a_deepened_copy_of_a_smooth_network_folds_back(norm):
    def net(*widths):
        parts = [nn.Conv2d(3, widths[0], 3, padding=1), nn.SiLU()]
        for i, o in zip(widths, widths[1:]):
            parts += [nn.Conv2d(i, o, 3, padding=1), *([norm(o)] if norm else []), nn.SiLU()]
        return nn.Sequential(*parts, Pooled(widths[-1], 3))

    x = torch.randn(64, 3, 8, 8)
    small, deep = randomise(net(4, 4)), randomise(net(6, 6, 6), 1)
    if norm is None:
        deep = fxfuse.net2deeper(small, deep, x)
        fused = fxfuse.fuse([deep, fxfuse.permute(small, x[:2], seed=3)], x)
        assert gap(small, fused, x) <= FUNCTION
    else:
        with pytest.raises(PassError, match="depends on its input"):
            fxfuse.net2deeper(small, deep, x)
    fused = fxfuse.fuse([deep, small], x)
    assert fused.state_dict().keys() == deep.state_dict().keys()


# --- refusals -------------------------------------------------------------------------------------


def test_dropout_behind_one_layer_alone_does_not_count():
    spelled = mlp(6, 5, 5, 3)
    dropping = nn.Sequential(*spelled[:4], nn.Dropout(), spelled[4])
    for nets in (dropping, mlp(6, 5, 5, 3)), (mlp(6, 8, 5, 5, 3), dropping):
        before, after = balanced(*nets)
        assert_same_structure_and_functions(before, after, VECTORS)


def test_averaging_and_maximum_pooling_are_not_the_same_structure():
    a = nn.Sequential(conv(3, 4), nn.MaxPool2d(2), conv(4, 4), conv(4, 4), Pooled(4, 3))
    b = nn.Sequential(conv(3, 4), nn.AvgPool2d(2), conv(4, 4), Pooled(4, 3))
    with pytest.raises(PairingError, match="differ outside of their aligned layers") as caught:
        balanced(a, b, data=IMAGES)
    assert "_1" in caught.value.where


def test_a_difference_that_no_graph_shows_is_caught_by_the_outputs():
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

    with pytest.raises(PairingError, match="differ outside of their aligned layers"):
        balanced(Shared(True), Shared(False))
    before, after = balanced(Shared(True), Shared(True))
    assert_same_structure_and_functions(before, after, VECTORS)


def test_a_function_and_a_module_that_do_the_same_are_one_structure():
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


def test_dropout_still_follows_the_mode():
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
            names = [t for n in layer.nodes for t in network.tensors.get(n, ()) if t in grads]
            assert any(float(grads[t].abs().max()) > 0 for t in names)


def test_buffers_outside_of_the_state_stay_outside():
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


def test_layers_that_change_what_they_pass_on_are_inserted_on_request_only():
    """The identity and ReLU in front of the first layer clip the inputs; the error says so."""
    nets, x = [randomise(mlp(6, 6, 6, 3)), randomise(mlp(6, 6, 3), 1)], torch.randn(40, 6)
    alignment = fxfuse.align(nets, x, pairs=[[("2", "0")]])
    with pytest.raises(PassError, match="no neutral form"):
        fxfuse.balance(nets, x, alignment=alignment)
    originals = [Network.of(str(i), trace(n), (x,)) for i, n in enumerate(nets)]
    balanced = Deepen(approximate=True)(originals, alignment, Calibration(x))
    clipped = outputs(nets[1], x.relu())
    assert torch.allclose(outputs(balanced.networks[1].module, x), clipped, atol=1e-5)
    wanted = float((clipped - outputs(nets[1], x)).norm() / outputs(nets[1], x).norm())
    assert balanced.errors == (0.0, pytest.approx(wanted, rel=1e-4))
    same = Deepen(approximate=True)(originals, fxfuse.align(nets, x), Calibration(x))
    assert max(same.errors) < 1e-5


class Writes(nn.Module):
    """A block whose branch is written to, or into, in place."""

    def __init__(self, width, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(width, 7), nn.Linear(7, width), how

    def forward(self, x):
        return (x + getattr(self, self.how)(x, self.b(torch.relu(self.a(x))))).to(torch.float32)

    def method(self, x, y):
        y.masked_fill_(y < 0, 0.3)
        return y

    def filled(self, x, y):
        z = torch.empty_like(x)
        z.copy_(y)
        return z

    def sized(self, x, y):
        halves = y.view(y.shape[0], 2, -1)
        return self.filled(x, halves.reshape(y.shape[0], halves.shape[1] * halves.shape[2]))

    def item(self, x, y):
        y[:, 1:2] = 0.5
        return y

    def part(self, x, y):
        y[:, :2].mul_(3.0).add_(1.0)
        return y

    def sum(self, x, y):
        z = x + y
        z[:, 1:3] = 0.5
        return z


WRITES = ["method", "filled", "sized", "item", "part", "sum"]


@pytest.mark.parametrize("how", some(WRITES, "method", "item", "part"))
def test_blocks_that_write_in_place_keep_their_function(how):
    """A copy of a layer without its writes would compute something else."""

    def net(depth, seed):
        blocks = [Writes(8, how) for _ in range(depth)]
        return randomise(nn.Sequential(nn.Linear(6, 8), *blocks, nn.Linear(8, 3)), seed)

    nets = [net(3, 0), net(1, 1)]
    fused = fxfuse.fuse(nets, VECTORS, weights=[1, 0])
    assert gap(nets[0], fused, torch.randn(9, 6)) <= FUNCTION


class Between(nn.Module):
    """Layers, and a step between the first two that belongs to none."""

    def __init__(self, depth):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.register_buffer("mask", torch.arange(8).remainder(3).bool())

    def forward(self, x):
        x = torch.relu(self.first(x)) * self.mask
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.last(x)


def test_a_missing_layer_goes_behind_the_steps_that_lie_in_front_of_it():
    nets = [randomise(Between(3), 0), randomise(Between(1), 1)]
    fused = fxfuse.fuse(nets, VECTORS, weights=[1, 0])
    assert gap(nets[0], fused, torch.randn(9, 6)) <= FUNCTION


class OneTensor(nn.Module):
    """All weights are parts of one parameter."""

    def __init__(self, depth):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.weights, self.depth = nn.Parameter(torch.randn(64 * depth)), depth

    def forward(self, x):
        x = self.first(x)
        for weight in self.weights.split(64):
            x = torch.relu(x) @ weight.view(8, 8)
        return self.last(x)


def test_layers_whose_weight_is_a_part_of_another_tensor_are_refused():
    nets = [randomise(OneTensor(3), 0), randomise(OneTensor(1), 1)]
    with pytest.raises(PassError, match="a part of 'weights'"):
        fxfuse.fuse(nets, VECTORS)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent_layers_around_a_skip_are_neutral(kind):
    class Blocks(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
            self.layers = nn.ModuleList(kind(8, 8, batch_first=True) for _ in range(depth))

        def forward(self, x):
            x = self.first(x)
            for layer in self.layers:
                x = x + layer(x)[0]
            return self.last(x)

    nets, data = [randomise(Blocks(2), 0), randomise(Blocks(1), 1)], torch.randn(20, 3, 6)
    for net, deep in zip(nets, fxfuse.balance(nets, data)):
        assert gap(net, deep, torch.randn(5, 3, 6)) <= FUNCTION


class Biased(nn.Module):
    """Attention with a table that each block computes, and a size in the way to it."""

    def __init__(self, depth):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.mix = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.table = nn.ModuleList(nn.Linear(2, 1) for _ in range(depth))
        self.register_buffer("places", torch.randn(9, 2), persistent=False)

    def forward(self, x):
        x = self.first(x)
        for mix, table in zip(self.mix, self.table):
            bias = table(self.places).view(x.shape[1], x.shape[1])
            x = x + mix((x @ x.transpose(1, 2) + bias).softmax(-1) @ x)
        return self.last(x)


def test_what_a_block_computes_of_parameters_and_sizes_is_its_own():
    nets, data = [Biased(3), Biased(1)], torch.randn(20, 3, 6)
    for seed, net in enumerate(nets):
        net.eval().load_state_dict(randomise(Biased(len(net.mix)), seed).state_dict())
        net.places = nets[0].places
    fused = fxfuse.fuse(nets, data, weights=[1, 0])
    assert gap(nets[0], fused, torch.randn(5, 3, 6)) <= FUNCTION


class Members(nn.Module):
    """Three members share each layer, and scale what it reads each in its own way."""

    def __init__(self, depth):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.scales = nn.ParameterList(nn.Parameter(torch.randn(3, 8)) for _ in range(depth))

    def forward(self, x):
        x = torch.relu(self.first(x))[None].expand(3, -1, -1)
        for layer, scale in zip(self.layers, self.scales):
            x = torch.relu(layer(x * scale[:, None]))
        return self.last(x).mean(0)


def test_layers_that_do_not_run_where_they_are_missing_are_refused_or_fuse():
    nets = [randomise(Members(2), 0), randomise(Members(1), 1)]
    try:
        fused = fxfuse.fuse(nets, VECTORS, weights=[1, 0])
    except PassError as refusal:
        assert "across=True" in refusal.do
    else:
        assert gap(nets[0], fused, torch.randn(9, 6)) <= FUNCTION
