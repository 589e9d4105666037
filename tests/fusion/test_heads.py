"""Heads that read through a map: each way against the map applied by hand, and when it is taken.

Putting heads behind a trunk: what is one linear layer, and what mixes several.

Networks of different tasks, end to end: what comes back exactly, what comes out, refusals."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from torch import nn

import fxfuse
from fxfuse.alignment.layers import partition
from fxfuse.errors import ArgumentError, FuseError, ModelError, PairingError, PassError
from fxfuse.fusion._cut import Head
from fxfuse.fusion.heads import (
    Crossing,
    Separate,
    Union,
    folded,
    give_back,
    head_spaces,
    in_front,
    mixed,
    one_layer,
    permuted,
    reads_alike,
    single_layer,
)
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import OPEN, Network
from tests.support.nets import (
    Gate,
    Grown,
    Inverted,
    Pooled,
    Residual,
    Shuffle,
    Tokens,
    build,
    conv,
    data_shape,
    mlp,
    outputs,
    random_nets,
    randomise,
    residual,
    stages,
)
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION
from tests.support.widening import widened


def crossing(module, read, shape, dim=1):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return Crossing(Head("head", trace(randomise(module)), (), None), value, (), dim, read)


def by_hand(cross):
    """What the head makes of the value with the map applied densely."""
    moved = cross.value.movedim(cross.dim, -1) @ torch.tensor(cross.read.toarray().T).float()
    return outputs(cross.head.module, moved.movedim(-1, cross.dim))


def soft(own, fused, seed=0):
    dense = np.random.default_rng(seed).random((own, fused))
    return csr_array(dense / dense.sum(1, keepdims=True))


def permutation(size, seed=0):
    order = np.random.default_rng(seed).permutation(size)
    return csr_array((np.ones(size), (np.arange(size), order)))


class Around(nn.Module):
    """Both a contraction and a skip read the input."""

    def __init__(self, width):
        super().__init__()
        self.a = nn.Linear(width, width)

    def forward(self, x):
        return x + self.a(x)


def pooled(*parts, width):
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


LINEAR = {  # everything that reads the value is linear in its units
    "linear": (lambda: mlp(6, 5, 3), (4, 8), 1),
    "convolution": (lambda: pooled(conv(6, 5), width=5), (4, 8, 4, 4), 1),
    "average in between": (lambda: pooled(width=6), (4, 8, 4, 4), 1),
    "tokens": (lambda: mlp(6, 5, 3), (4, 7, 8), 2),
    "several readers": (lambda: Two(6), (4, 8), 1),
}


OTHERS = {  # something else than contractions reads it, or it lies there in several places
    "skip": (lambda: nn.Sequential(Around(6), nn.Linear(6, 3)), (4, 8), 1),
    "block": (lambda: pooled(Residual(6, 6), width=6), (4, 8, 4, 4), 1),
    "activation": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 3)), (4, 8), 1),
    "maximum": (lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), pooled(width=6)), (4, 8, 4, 4), 1),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)), (4, 8), 1),
    "gate": (lambda: pooled(Gate(6, 4), width=6), (4, 8, 4, 4), 1),
    "groups": (lambda: pooled(conv(6, 6, groups=2), width=6), (4, 8, 4, 4), 1),
    "shuffle": (lambda: pooled(Shuffle(2), conv(6, 6, groups=2), width=6), (4, 8, 4, 4), 1),
    "flatten": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 3)), (4, 8, 2, 2), 1),
    "middle axis": (lambda: nn.Sequential(Middle(), nn.Linear(6, 3)), (4, 8, 5), 1),
    "odd axis": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(60, 3)), (4, 5, 8, 2), 2),
}


class Two(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, 3), nn.Linear(width, 3, bias=False)

    def forward(self, x):
        return torch.relu(self.a(x)) * self.b(x)


class Middle(nn.Module):
    def forward(self, x):
        return torch.tanh(x).transpose(1, 2)


@pytest.mark.parametrize("name", LINEAR)
def test_a_map_is_folded_into_what_reads_linearly(name):
    make, shape, dim = LINEAR[name]
    cross = crossing(make(), soft(6, 8), shape, dim)
    module = folded(cross, head_spaces(cross))
    assert reads_alike(cross, module)
    assert (outputs(module, cross.value) - by_hand(cross)).abs().max() < FUNCTION
    assert len(list(module.graph.nodes)) == len(list(cross.head.module.graph.nodes))


@pytest.mark.parametrize("name", OTHERS)
def test_a_map_is_not_folded_into_what_reads_otherwise(name):
    make, shape, dim = OTHERS[name]
    cross = crossing(make(), soft(6, 8), shape, dim)
    module = folded(cross, head_spaces(cross))
    assert module is None or not reads_alike(cross, module)


@settings(max_examples=20)
@given(st.sampled_from(sorted(LINEAR | OTHERS)), st.integers(0, 99))
def test_a_map_in_front_is_the_map_applied_by_hand(name, seed):
    make, shape, dim = (LINEAR | OTHERS)[name]
    cross = crossing(make(), soft(6, 8, seed), shape, dim)
    expected = by_hand(cross)
    state = torch.get_rng_state()
    module = in_front(cross)
    assert torch.equal(state, torch.get_rng_state())
    assert (outputs(module, cross.value) - expected).abs().max() < FUNCTION
    assert "unproject.weight" in module.state_dict()


@pytest.mark.parametrize("name", ["skip", "block", "norm", "gate", "flatten", "activation"])
def test_a_permutation_moves_the_units_of_the_head(name):
    make, shape, dim = OTHERS[name]
    cross = crossing(make(), permutation(6), [6 if n == 8 else n for n in shape], dim)
    module = permuted(cross, head_spaces(cross))
    assert reads_alike(cross, module)
    assert (outputs(module, cross.value) - by_hand(cross)).abs().max() < FUNCTION


def test_a_permutation_across_groups_is_noticed():
    make, shape, dim = OTHERS["groups"]
    cross = crossing(make(), permutation(6, seed=1), (4, 6, 4, 4), dim)
    assert permuted(cross, head_spaces(cross)) is None
    within = csr_array((np.ones(6), (np.arange(6), [2, 0, 1, 3, 5, 4])))
    cross = crossing(make(), within, (4, 6, 4, 4), dim)
    assert reads_alike(cross, permuted(cross, head_spaces(cross)))


def test_only_permutations_are_moved():
    cross = crossing(mlp(6, 5, 3), soft(6, 6), (4, 6))
    assert permuted(cross, head_spaces(cross)) is None


# --- what crosses the cut -------------------------------------------------------------------------


def grafted_images(count=48):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class Crosses(nn.Module):
    """Cut behind `a`: what crosses is its output beside what `beside` makes of the scaled input."""

    def __init__(self, beside, width=6, others=3):
        super().__init__()
        self.a, self.b = conv(3, width, act=False), conv(width + others, 5)
        self.fc, self.scale = nn.Linear(5, 3), nn.Parameter(torch.ones(1))
        self.beside = beside

    def forward(self, x):
        x = F.leaky_relu(self.beside(self.a(x), self.scale * x), 0.1)
        return self.fc(self.b(x).mean((2, 3)))


def joined(y, x):
    return torch.cat([x, y], 1)


def beside(count):
    return lambda y, x: torch.cat([x[:, :count], y], 1)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1, 0]])
def test_units_beside_ones_that_stay_cross_the_cut(weights):
    x = grafted_images()
    net = randomise(Crosses(joined))
    pair = [net, fxfuse.permute(net, x[:2], seed=2)]
    fused = fxfuse.fuse(pair, x, heads=Separate(after="a"), weights=weights)
    for y in outputs(fused, x):
        assert (y - outputs(net, x)).abs().max() < FUNCTION * y.abs().max()
    narrow = randomise(Crosses(joined, width=4), 3)
    fused = fxfuse.fuse([net, narrow], x, heads=Separate(after="a"), weights=[1, 0], anchor=0)
    y = outputs(fused, x)[0]
    assert (y - outputs(net, x)).abs().max() < FUNCTION * y.abs().max()


def test_different_numbers_of_positions_that_stay_are_refused():
    nets = [randomise(Crosses(beside(n), others=n), n) for n in (1, 2)]
    with pytest.raises(PairingError, match="positions that must stay"):
        fxfuse.fuse(nets, grafted_images(), heads=Separate(after="a"))


class Folded(nn.Module):
    """What crosses the cut behind `a` has its units laid out along two axes."""

    def __init__(self, width):
        super().__init__()
        self.a, self.fc, self.half = nn.Linear(6, width), nn.Linear(width, 3), width // 2

    def forward(self, x):
        x = torch.relu(self.a(x).unflatten(-1, (2, self.half)))
        return self.fc(x.flatten(1))


def test_units_along_two_axes_stay_or_are_refused():
    x = torch.randn(40, 6)
    net, wider = randomise(Folded(8)), randomise(Folded(12), 1)
    fused = fxfuse.fuse([net, net], x, heads=Separate(after="a"))
    assert all(torch.allclose(y, net(x), atol=1e-5) for y in fused(x))
    two = [Separate(after="a"), Separate()]
    for heads in two:
        alike = fxfuse.fuse([net, fxfuse.permute(net, x[:2])], x, heads=heads)
        assert torch.allclose(alike(x)[0], net(x), atol=1e-4)
    assert len(fxfuse.fuse([net, wider], x, heads=Separate())(x)) == 2


class Plain(nn.Linear):
    """A linear layer that may do anything."""


def test_a_single_linear_layer_is_known():
    net = nn.Sequential(nn.Linear(4, 3))
    name, layer = single_layer(trace(net))
    assert name == "0" and torch.equal(layer.weight, net[0].weight)
    for other in (nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Sequential(nn.ReLU()), Plain(4, 3)):
        assert single_layer(trace(other)) is None


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, False)])
def test_one_layer_mixes_the_outputs_of_several(biases):
    trunk, x = trace(randomise(mlp(6, 5, 4))).eval(), torch.randn(7, 6)
    layers = [randomise(nn.Linear(4, 3, bias=b), s) for s, b in enumerate(biases)]
    layers[1].weight.requires_grad_(False)
    mixing = [torch.rand(5, 3) for _ in layers]
    y = outputs(trunk, x)
    wanted = sum(outputs(layer, y) @ m.T for m, layer in zip(mixing, layers))
    give_back(trunk, one_layer(trunk, "last.fc", layers, mixing, layers[1]))
    assert torch.allclose(outputs(trunk, x), wanted, atol=1e-5)
    whole = trunk.get_submodule("last.fc")
    assert not whole.weight.requires_grad and (whole.bias is not None) == any(biases)


@pytest.mark.parametrize("dim", [1, 2])
def test_a_matrix_mixes_outputs_along_an_axis(dim):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Tanh(), nn.Sigmoid()])

        def forward(self, x):
            return self.heads[0](x), self.heads[1](x)

    graph, x, matrix = trace(Both()), torch.randn(2, 3, 3), torch.rand(4, 6)
    graph.graph.output_node().meta[OPEN] = True
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    give_back(graph, mixed(graph, calls, matrix, dim))
    joined = torch.cat([x.tanh(), x.sigmoid()], dim).movedim(dim, -1)
    assert torch.allclose(graph(x), (joined @ matrix.T).movedim(-1, dim), atol=1e-6)
    assert torch.equal(graph.state_dict()["heads.mixing"], matrix)
    assert OPEN not in graph.graph.output_node().meta


def images(count=24, seed=5):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def gap(expected, found):
    """Largest difference relative to the largest value expected."""
    assert expected.shape == found.shape and float(expected.abs().max()) > 0.01
    return float((expected - found).abs().max() / expected.abs().max())


def gaps(nets, fused, x):
    return [gap(outputs(n, x), y) for n, y in zip(nets, outputs(fused, x), strict=True)]


def layers(net, x):
    found = partition(Network.of("net", trace(net), (x[:2],)))
    return [layer.name for segment in found for layer in segment.layers]


def with_head(net, path, seed):
    """A copy of a network whose last layer is another one."""
    other = copy.deepcopy(net)
    randomise(other.get_submodule(path), seed)
    return other


# --- what comes back exactly ----------------------------------------------------------------------


HEADED = ["functional", "grouped", "padded", "concat", "depthwise", "shared", "shuffle"]


@pytest.mark.parametrize("name", some(HEADED, *HEADED[::2]))
def test_each_head_of_permuted_copies_gives_what_the_network_gives(name):
    net, x = build(name)
    data = torch.randn(24, *data_shape(name), generator=torch.Generator().manual_seed(7))
    pair = [net, fxfuse.permute(net, x, seed=3)]
    inner = layers(net, data)[:-1]
    fused = fxfuse.fuse(pair, data, heads=Separate(after=inner[len(inner) // 2]))
    assert max(gaps(pair, fused, data)) < FUNCTION


@settings(max_examples=3)
@given(random_nets(), st.integers(0, 100), st.data())
def test_random_networks_cut_anywhere_come_back_in_every_head(net, seed, draw):
    data = images()
    if float(outputs(net, data).abs().max()) < 0.01:
        return
    after = draw.draw(st.sampled_from(layers(net, data)[:-1]))
    pair = [fxfuse.permute(net, data[:2], seed=seed), net]
    fused = fxfuse.fuse(pair, data, heads=Separate(after=after), anchor=1)
    assert max(gaps(pair, fused, data)) < FUNCTION


SAME_TRUNK = {  # a network, its last layer, and a layer inside
    "plain": (lambda: stages([5, 6], [7], hidden=(6,)), "2.2", "0.1"),
    "residual, inside a stage": (lambda: residual((6, 2), (8, 2)), "3.fc", "2.0"),
    "residual, end of a stage": (lambda: residual((6, 2), (8, 2)), "3.fc", "1"),
    "linear": (lambda: nn.Sequential(nn.Flatten(), mlp(192, 6, 5, 3)), "1.4", "1.0"),
    "tokens": (lambda: Tokens(depth=2), "head", "blocks.0"),
}


@pytest.mark.parametrize("name", some(SAME_TRUNK, "residual, inside a stage", "linear"))
def test_different_heads_on_the_same_permuted_trunk_both_come_back(name):
    make, last, inside = SAME_TRUNK[name]
    net, x = randomise(make()), images()
    pair = [net, fxfuse.permute(with_head(net, last, 4), x[:2], seed=2)]
    for anchor, after in enumerate([None, inside]):
        fused = fxfuse.fuse(pair, x, heads=Separate(after=after), anchor=anchor)
        assert max(gaps(pair, fused, x)) < FUNCTION


def test_three_networks_come_back_in_any_anchor():
    net, x = randomise(stages([5, 6], [7])), images()
    nets = [net, *(with_head(net, "2.0", s) for s in (1, 2))]
    nets = [fxfuse.permute(n, x[:2], seed=s) for s, n in enumerate(nets)]
    for anchor in range(3):
        fused = fxfuse.fuse(nets, x, heads=Separate(after="0.1"), anchor=anchor)
        assert max(gaps(nets, fused, x)) < FUNCTION


@pytest.mark.parametrize(("anchor", "after"), [(0, "0.0"), (1, "1.0"), (0, None)])
def test_a_network_with_every_unit_duplicated_comes_back_in_both_heads(anchor, after):
    net, x = randomise(residual((6, 2), (8, 1))), images()
    pair = [net, widened(net, residual((12, 2), (16, 1), stem=12), x[:2])]
    fused = fxfuse.fuse(pair, x, heads=Separate(after=after), anchor=anchor)
    assert max(gaps(pair, fused, x)) < FUNCTION


def test_a_single_network_is_itself():
    net, x = randomise(residual((6, 2))), images()
    fused = fxfuse.fuse([net], x, heads=Separate(after="1.0"))
    assert gaps([net], fused, x)[0] < FUNCTION
    fused = fxfuse.fuse([net], x, heads=Union([[2, 0, 1]], order=[0, 1, 2]))
    assert gap(outputs(net, x)[:, [1, 2, 0]], outputs(fused, x)) < FUNCTION
    assert set(fused.state_dict()) == set(net.state_dict())


def gated(width, inner, blocks, classes):
    parts = [Inverted(width, inner, gate=4) for _ in range(blocks)]
    return nn.Sequential(conv(3, width), *parts, Pooled(width, classes))


UNEQUAL = {  # networks, and layers of the first and the second that are aligned
    "residual": (
        lambda: [residual((6, 3), (8, 2)), residual((4, 1), (6, 2), stem=4, classes=5)],
        [("0.0", "0.0"), ("2.1", "2.1")],
    ),
    "plain": (
        lambda: [stages([4, 4, 6], [5, 7]), stages([5, 6], [7], classes=4)],
        [(None, None), ("0.2", "0.1")],
    ),
    "heads of other depths": (
        lambda: [stages([4, 4, 6], hidden=(9,)), stages([5, 6], hidden=(5, 6), classes=4)],
        [("0.2", "0.1")],
    ),
    "linear": (
        lambda: [nn.Sequential(nn.Flatten(), mlp(192, *w)) for w in ((6, 5, 4, 3), (7, 5))],
        [(None, None), ("1.0", "1.0")],
    ),
    "tokens": (
        lambda: [Tokens(depth=3), Tokens(12, 3, 16, depth=1)],
        [("blocks.0.attention", "blocks.0.attention")],
    ),
    "gated": (
        lambda: [gated(6, 9, 2, 4), gated(8, 10, 1, 3)],
        [("1", "1")],
    ),
}


@pytest.mark.parametrize("name", some(UNEQUAL, "heads of other depths", "tokens"))
def test_all_weight_on_one_network_gives_it_from_its_head(name):
    make, places = UNEQUAL[name]
    nets, x = [randomise(n, s) for s, n in enumerate(make(), 1)], images()
    for names in places:
        for k, after in enumerate(names):
            shares = [float(i == k) for i in (0, 1)]
            fused = fxfuse.fuse(nets, x, heads=Separate(after=after), weights=shares, anchor=k)
            found = outputs(fused, x)
            assert gap(outputs(nets[k], x), found[k]) < FUNCTION
            assert found[1 - k].shape == outputs(nets[1 - k], x).shape


WIDE = {  # networks of unlike units, and layers of the first to cut behind
    "plain": (UNEQUAL["plain"][0], ["0.2", None]),
    "residual": (UNEQUAL["residual"][0], ["0.0", "1.0", None]),
    "linear": (UNEQUAL["linear"][0], ["1.0", None]),
}


@pytest.mark.parametrize("name", some(WIDE, "plain", "linear"))
def test_with_places_for_all_units_every_head_gives_what_its_network_gives(name):
    make, cuts = WIDE[name]
    nets, x = [randomise(n, s) for s, n in enumerate(make(), 1)], images()
    for after in cuts:
        fused = fxfuse.fuse(nets, x, heads=Separate(after=after), width=float("inf"), anchor=0)
        assert max(gaps(nets, fused, images(8, seed=6))) < FUNCTION


def test_a_wider_trunk_is_nearer_and_one_head_for_all_labels_reads_it_too():
    nets, x, others = uneven(), images(64), images(64, seed=6)
    missed = []
    for width in (1.0, 1.5, float("inf")):
        fused = fxfuse.fuse(nets, x, heads=Separate(after="1.0"), width=width)
        pairs = zip(nets, outputs(fused, others), strict=True)
        missed.append(sum(float((outputs(n, others) - y).square().mean()) for n, y in pairs))
    assert missed[0] > missed[1] > missed[2]
    whole = fxfuse.fuse(nets, x, heads=Union([range(3), range(3, 8)]), width=float("inf"))
    wanted = torch.cat([outputs(n, others) for n in nets], 1)
    assert gap(wanted, outputs(whole, others)) < FUNCTION


# --- one head for all labels ----------------------------------------------------------------------

LABELS = [["ant", "bee", "cat"], ["cat", "dog", "ant"]]


def pair_of_tasks():
    net, x = randomise(residual((6, 2))), images()
    other = with_head(net, "2.fc", 4)
    return [net, fxfuse.permute(other, x[:2], seed=2)], x


@pytest.mark.parametrize(
    ("after", "weights"), [(None, [0.5, 0.5]), ("1.0", [0.25, 0.75]), (None, [1.0, 0.0])]
)
def test_the_logit_of_a_label_is_the_mean_over_those_that_know_it(after, weights):
    nets, x = pair_of_tasks()
    heads = Union(labels=LABELS, after=after)
    fused = fxfuse.fuse(nets, x, heads=heads, weights=weights)
    (a, b), (v, w) = (outputs(n, x) for n in nets), weights
    columns = [v * a[:, 0] + w * b[:, 2], a[:, 1], v * a[:, 2] + w * b[:, 0], b[:, 1]]
    assert heads.outputs == ("ant", "bee", "cat", "dog")
    assert gap(torch.stack(columns, 1), outputs(fused, x)) < FUNCTION


def test_linear_heads_become_one_linear_layer_of_the_anchors_name():
    nets, x = pair_of_tasks()
    fused = fxfuse.fuse(nets, x, heads=Union(labels=LABELS))
    assert set(fused.state_dict()) == set(nets[0].state_dict())
    layer = fused.get_submodule("2.fc")
    assert type(layer) is nn.Linear and (layer.in_features, layer.out_features) == (6, 4)
    fused = fxfuse.fuse(nets, x, heads=Union(labels=LABELS, after="1"))
    assert fused.state_dict()["heads.mixing"].shape == (4, 6)


def test_the_order_of_labels_is_that_of_the_outputs():
    nets, x = pair_of_tasks()
    found = []
    for order in (None, ["dog", "cat", "bee", "ant"]):
        heads = Union(labels=LABELS, order=order)
        found.append(dict(zip(heads.outputs, outputs(fxfuse.fuse(nets, x, heads=heads), x).T)))
    assert list(found[1]) == ["dog", "cat", "bee", "ant"] != list(found[0])
    assert all(torch.allclose(found[0][label], found[1][label], atol=1e-5) for label in found[0])


class Dense(nn.Module):
    """Logits for every pixel, the labels along axis 1."""

    def __init__(self, classes):
        super().__init__()
        self.a, self.b, self.out = conv(3, 5), conv(5, 6), nn.Conv2d(6, classes, 1)

    def forward(self, x):
        return self.out(self.b(self.a(x)))


def test_labels_may_lie_along_any_axis():
    nets, x = [randomise(Dense(3), 1), randomise(Dense(2), 2)], images()
    fused = fxfuse.fuse(nets, x, heads=Union([[0, 1, 2], [3, 1]]), weights=[1, 0])
    assert outputs(fused, x).shape == (24, 4, 8, 8)
    assert gap(outputs(nets[0], x), outputs(fused, x)[:, :3]) < FUNCTION


# --- what comes out -------------------------------------------------------------------------------


def uneven():
    """Networks of other depth, width and task."""
    return [randomise(residual((6, 2)), 1), randomise(residual((4, 1), stem=4, classes=5), 2)]


@pytest.mark.parametrize("heads", [Separate("1.0"), Union([range(3), range(2, 7)])])
def test_the_result_trains_copies_and_exports(heads):
    fused = fxfuse.fuse(uneven(), images(), heads=heads)
    again = copy.deepcopy(fused).train()
    assert all(m.training for m in again.modules())
    found = again(images(8))
    sum(y.sum() for y in (found if isinstance(found, tuple) else [found])).backward()
    assert all(p.grad is not None for p in again.parameters())
    assert not any(m.training for m in again.eval().modules())
    x = images(4)
    exported = torch.export.export(fused.eval(), (x,)).module()
    for a, b in zip(exported(x), fused(x)):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_trunk_has_the_names_of_the_anchor_and_heads_are_numbered():
    nets = uneven()
    fused = fxfuse.fuse(nets, images(), heads=Separate(after="1.0"))
    names = set(fused.state_dict())
    trunk = {n for n in names if not n.startswith("heads.")}
    assert trunk < set(nets[0].state_dict())
    assert trunk | {n[8:] for n in names if n.startswith("heads.0.")} == set(nets[0].state_dict())
    assert {n.split(".")[1] for n in names - trunk} == {"0", "1"}
    assert fused.heads[1].get_submodule("2.fc").out_features == 5


def test_modes_are_those_of_the_networks():
    nets = uneven()
    nets[1].train()
    fused = fxfuse.fuse(nets, images(), heads=Separate(after="1.0"))
    modes = {path: m.training for path, m in fused.named_modules() if path.count(".")}
    assert {on for path, on in modes.items() if path.startswith("heads.1")} == {True}
    assert {on for path, on in modes.items() if not path.startswith("heads.1")} == {False}
    before = copy.deepcopy(fused.state_dict())
    fused.train()(images(16, seed=9))
    changed = [n for n in before if not torch.equal(before[n], fused.state_dict()[n])]
    assert any(n.startswith("heads.0.") and n.endswith("running_mean") for n in changed)


def test_inputs_are_untouched_and_share_nothing_with_the_result():
    nets = uneven()
    before = [copy.deepcopy(n.state_dict()) for n in nets]
    fused = fxfuse.fuse(nets, images(), heads=Separate(after="1.0"))
    for tensor in [*fused.parameters(), *fused.buffers()]:
        tensor.data.zero_()
    for net, state in zip(nets, before):
        assert all(torch.equal(value, state[n]) for n, value in net.state_dict().items())


def test_the_report_says_how_heads_read_and_what_was_aligned():
    nets, x = uneven(), images()
    seen = []
    heads = Separate(after="0.0")
    fused = fxfuse.fuse(nets, x, heads=heads, progress=lambda name, _: seen.append(name))
    report = fused.meta["fxfuse"]
    assert report.heads == ("as it is", "through a linear map") and seen[-1] == "attach heads"
    assert [s.slots for s in report.alignment.segments] == [(("0.0",), ("0.0",))]
    assert fxfuse.fuse([nets[0]] * 2, x).meta["fxfuse"].heads == ()


def test_where_it_is_cut_changes_the_result():
    nets, x = uneven(), images()
    found = [fxfuse.fuse(nets, x, heads=Separate(after=a)) for a in (None, "0.0", "1.0")]
    for i, a in enumerate(found):
        assert all(min(map(gap, outputs(a, x), outputs(b, x))) > 1e-3 for b in found[:i])


def test_alignments_of_the_whole_or_of_the_trunk_can_be_handed_in():
    nets, x = uneven(), images()
    heads, whole = Separate(after="1.0"), fxfuse.align(nets, x)
    first = fxfuse.fuse(nets, x, heads=heads)
    for alignment in (whole, first.meta["fxfuse"].alignment):
        again = fxfuse.fuse(nets, x, heads=heads, alignment=alignment)
        assert all(torch.equal(a, b) for a, b in zip(outputs(first, x), outputs(again, x)))


def test_the_result_can_be_fused_again():
    nets, x = uneven(), images()
    fused = fxfuse.fuse(nets, x, heads=Separate("1.0"))
    again = fxfuse.fuse([fused, fxfuse.permute(fused, x[:2], seed=1)], x)
    assert max(map(gap, outputs(fused, x), outputs(again, x))) < FUNCTION


class Several(nn.Module):
    """Returns one tensor more, if `more`; in training mode another, if `aux`; writes in place."""

    def __init__(self, classes, more=False, aux=False):
        super().__init__()
        self.a, self.b = conv(3, 6, act=False), conv(6, 6, act=False)
        self.act = nn.ReLU(inplace=True)
        self.fc, self.heads = nn.Linear(96, classes), nn.Identity()
        self.more = nn.Linear(96, 2) if more else None
        self.aux = nn.Linear(6, 2) if aux else None

    def forward(self, x):
        y = self.heads(self.b(self.a(x)))
        x = self.act(y[:, :, ::2, ::2].flatten(1) if self.more is None else y[:, :, ::2, ::2])
        x = x.flatten(1)
        if self.training and self.aux is not None:
            return self.fc(x), self.aux(y.mean((2, 3)))
        return self.fc(x) if self.more is None else (self.fc(x), self.more(x))


def test_heads_of_several_outputs_are_kept_separate_and_not_united():
    nets, x = [randomise(Several(3, more=True), 1), randomise(Several(4, more=True), 2)], images()
    fused = fxfuse.fuse(nets, x, heads=Separate(after="b"), weights=[1, 0], anchor=0)
    for a, b in zip(outputs(nets[0], x), outputs(fused, x)[0], strict=True):
        assert gap(a, b) < FUNCTION
    with pytest.raises(ArgumentError, match="not one tensor"):
        fxfuse.fuse(nets, x, heads=Union([[0, 1, 2], [0, 1, 2, 3]]))


def test_heads_that_write_in_place_do_not_disturb_each_other():
    net, x = randomise(Several(3, more=True)), images()
    pair = [net, with_head(net, "fc", 3)]
    fused = fxfuse.fuse(pair, x, heads=Separate(after="b"))
    for other, found in zip(pair, outputs(fused, x), strict=True):
        assert gap(outputs(other, x)[0], found[0]) < FUNCTION
    assert [n.target for n in fused.graph.nodes].count("clone") == 2


def test_heads_that_exist_in_training_only_are_left_out():
    nets, x = [randomise(Several(3, aux=True), 1), randomise(Several(4, aux=True), 2)], images()
    fused = fxfuse.fuse(nets, x, heads=Separate())
    assert [tuple(y.shape) for y in fused.train()(x)] == [(24, 3), (24, 4)]
    assert not [n for n in fused.state_dict() if "aux" in n]


def test_a_network_may_have_a_part_called_heads():
    net, x = randomise(Several(3)), images()
    fused = fxfuse.fuse([net, net], x, heads=Separate(after="b"))
    assert max(gaps([net, net], fused, x)) < FUNCTION
    assert [n for n in fused.state_dict() if n.startswith("heads_.1.fc")]


# --- what is refused ------------------------------------------------------------------------------


def test_different_outputs_are_refused_with_the_choices():
    with pytest.raises(ModelError) as caught:
        fxfuse.fuse([mlp(6, 5, 3), mlp(6, 5, 4)], torch.randn(20, 6))
    assert "heads.Separate()" in caught.value.do and "heads.Union(" in caught.value.do


REFUSED = {
    "labels of too few networks": (Union([[0, 1, 2]]), "those of 2"),
    "labels of too many networks": (Union([[0, 1, 2]] * 3), "those of 2"),
    "too few labels": (Union([[0, 1], [0, 1, 2, 3]]), "3, one for each output"),
    "too many labels": (Union([[0, 1, 2], [0, 1, 2, 3, 4]]), "4, one for each output"),
    "a label twice": (Union([[0, 1, 1], [0, 1, 2, 3]]), "3, one for each output"),
    "an order that lacks one": (Union([[0, 1, 2], [0, 1, 2, 3]], order=[0, 1, 2]), "4 labels"),
    "an order of others": (Union([[0, 1, 2], [0, 1, 2, 3]], order=[0, 1, 2, 4]), "4 labels"),
    "an unknown layer": (Separate(after="nope"), "0, 2"),
    "the last layer": (Union([range(3), range(4)], after="4"), "0, 2"),
    "no heads": ("Separate", "Separate(...)"),
    "a class": (Separate, "Separate(...)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_choices_are_refused(case):
    heads, expected = REFUSED[case]
    nets = [randomise(mlp(6, 5, 5, n), n) for n in (3, 4)]
    with pytest.raises(ArgumentError) as caught:
        fxfuse.fuse(nets, torch.randn(20, 6), heads=heads)
    error = caught.value
    assert isinstance(error, FuseError) and expected in error.expected
    assert all([error.met, error.where, error.expected, error.do])


def test_units_that_only_one_network_adds_at_the_cut_are_refused():
    def dense(layers):
        width = 4 + 2 * layers
        return nn.Sequential(
            conv(3, 4), Grown(4, 2, layers), nn.BatchNorm2d(width), Pooled(width, 3)
        )

    nets, x = [randomise(dense(n), n) for n in (4, 2)], images()
    with pytest.raises(PassError, match="cannot be widened"):
        fxfuse.fuse(nets, x, heads=Separate())
    fused = fxfuse.fuse(nets, x, heads=Separate(after="0"), weights=[1, 0], anchor=0)
    assert gap(outputs(nets[0], x), outputs(fused, x)[0]) < FUNCTION
