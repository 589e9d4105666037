"""Spaces of networks: moving the units of each keeps the function, and nothing else does."""

import copy
import dataclasses
import gc
import time
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.errors import DataError, TraceError
from fxfuse.graph.trace import trace
from fxfuse.spaces.spaces import rearrange
from tests.support.nets import (
    NETS,
    Pooled,
    build,
    conv,
    data_shape,
    gap,
    mlp,
    moved,
    outputs,
    random_nets,
    randomise,
    residual,
)
from tests.support.sweeps import some
from tests.support.tolerances import PERMUTATION


@pytest.mark.parametrize("name", NETS)
def test_spaces_have_the_sizes_of_the_structure(name):
    net, x = build(name)
    assert tuple(sorted(s.size for s in fxfuse.find_spaces(net, x))) == NETS[name].sizes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETS)
def test_permuting_every_space_keeps_the_function_and_moves_weights(name, seed):
    net, x = build(name, seed)
    permuted = fxfuse.permute(net, x, seed)
    assert gap(net, permuted, x) <= PERMUTATION
    assert len(moved(net, permuted)) >= 3
    fresh = torch.randn(5, *x.shape[1:])
    assert gap(net, permuted, fresh) <= PERMUTATION, "it only holds on the example"


@given(random_nets(), st.integers(0, 100))
def test_permuting_every_space_keeps_the_function_of_random_networks(net, seed):
    x = torch.randn(2, 3, 8, 8)
    spaces, permuted = fxfuse.find_spaces(net, x), fxfuse.permute(net, x, seed)
    assert gap(net, permuted, x) <= PERMUTATION
    assert spaces.free_units >= 4, "the stem's units are free in all of these networks"


@given(random_nets())
def test_only_inputs_and_outputs_of_random_networks_are_frozen(net):
    x = torch.randn(2, 3, 8, 8)
    reasons = {f.reason for f in fxfuse.find_spaces(net, x).frozen}
    assert reasons <= {"reads what cannot be moved", "an output of the network"}


@pytest.mark.parametrize("name", NETS)
def test_a_parameter_left_behind_changes_the_outputs(name):
    """The property can fail: a permutation that leaves out one tensor is not a symmetry."""
    net, x = build(name)
    permuted = fxfuse.permute(net, x)
    state = net.state_dict()
    for forgotten in sorted(moved(net, permuted)):
        broken = copy.deepcopy(permuted)
        broken.load_state_dict({**permuted.state_dict(), forgotten: state[forgotten]})
        assert gap(net, broken, x) > 10 * PERMUTATION, forgotten


def turned(spaces, space):
    """Move the units of one space on by one, inside their blocks."""
    order = {s.name: np.arange(s.size) for s in spaces}
    for block in np.unique(space.blocks) if space.blocks is not None else [None]:
        here = np.arange(space.size) if block is None else np.flatnonzero(space.blocks == block)
        order[space.name][here] = np.roll(here, 1)
    return order


def movable(spaces):
    """The spaces that are not blocks of other spaces, which would have to move along."""
    return [s for s in spaces if not any(inner.parent == s.name for inner in spaces)]


@pytest.mark.parametrize("name", NETS)
def test_each_space_alone_is_a_symmetry(name):
    net, x = build(name)
    spaces, graph = fxfuse.find_spaces(net, x), trace(net)
    for space in movable(spaces):
        turn = rearrange(graph, spaces, turned(spaces, space))
        assert gap(net, turn, x) <= PERMUTATION, space.name
        assert moved(net, turn) == {a.tensor for a in space.axes}


@pytest.mark.parametrize("name", NETS)
def test_a_space_moved_on_all_axes_but_one_changes_the_outputs(name):
    net, x = build(name)
    spaces, graph = fxfuse.find_spaces(net, x), trace(net)
    space = movable(spaces)[0]
    for axis in space.axes:
        less = dataclasses.replace(space, axes=tuple(a for a in space.axes if a is not axis))
        others = tuple(less if s is space else s for s in spaces)
        fewer = dataclasses.replace(spaces, spaces=others)
        turn = rearrange(graph, fewer, turned(spaces, space))
        assert gap(net, turn, x) > 10 * PERMUTATION, axis.tensor


def test_the_model_is_left_as_it_was_and_shares_nothing_with_the_result():
    net, x = build("residual")
    net.train()
    net[0][1].eval()
    modes, before = [m.training for m in net.modules()], copy.deepcopy(net.state_dict())
    permuted = fxfuse.permute(net, x)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
    own = {t.data_ptr() for t in net.state_dict().values()}
    assert not own & {t.data_ptr() for t in permuted.state_dict().values()}


def test_the_model_can_be_freed():
    net, x = build("plain")
    alive = weakref.ref(net)
    spaces, permuted = fxfuse.find_spaces(net, x), fxfuse.permute(net, x)
    del net
    gc.collect()
    assert alive() is None
    assert len(spaces) == 2 and permuted is not None


def test_the_seed_decides_the_permutation():
    net, x = build("residual")
    first = fxfuse.permute(net, x, seed=3).state_dict()
    again = fxfuse.permute(net, x, seed=3).state_dict()
    other = fxfuse.permute(net, x, seed=4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_global_random_state_is_not_used():
    net, x = build("plain")
    torch.manual_seed(7)
    np.random.seed(7)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(7)
    np.random.seed(7)
    fxfuse.permute(net, x)
    assert (torch.rand(1), np.random.rand()) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_precision_does_not_change_the_spaces(dtype):
    net, x = build("residual")
    expected = [(s.name, s.size) for s in fxfuse.find_spaces(net, x)]
    spaces = fxfuse.find_spaces(net.to(dtype), x.to(dtype))
    assert [(s.name, s.size) for s in spaces] == expected


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 3, 16, 8)])
def test_spaces_do_not_depend_on_the_example(shape):
    net, x = build("residual")
    assert str(fxfuse.find_spaces(net, torch.randn(shape))) == str(fxfuse.find_spaces(net, x))


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.autocast("cpu")])
def test_inference_mode_and_autocast_around_the_call_change_nothing(around):
    net, x = build("residual")
    free = fxfuse.find_spaces(net, x).free_units
    with around():
        spaces, permuted = fxfuse.find_spaces(net, x), fxfuse.permute(net, x)
    assert gap(net, permuted, x) <= PERMUTATION
    assert spaces.free_units == free


def test_blocks_come_before_the_spaces_inside_them():
    for name in ("grouped", "tokens"):
        seen = set()
        for space in fxfuse.find_spaces(*build(name)):
            assert space.parent is None or space.parent in seen
            seen.add(space.name)


def test_heads_hold_queries_with_keys_and_values_with_outputs():
    spaces = fxfuse.find_spaces(*build("tokens"))
    (heads,) = {s.parent for s in spaces if s.parent}
    inner = [s for s in spaces if s.parent == heads]
    assert spaces[heads].size == 2 and not spaces[heads].axes
    assert [np.bincount(s.blocks).tolist() for s in inner] == [[4, 4], [4, 4]]
    places = [{(a.tensor.rpartition(".")[2], a.dim) for a in s.axes} for s in inner]
    assert {("weight", 1)} in [p - {("in_proj_weight", 0), ("in_proj_bias", 0)} for p in places]
    (both,) = [
        a
        for s in inner
        for a in s.axes
        if a.dim == 0 and a.index.shape[1] == 2 and a.tensor.endswith("in_proj_weight")
    ]
    assert (both.index[:, 1] - both.index[:, 0] == 8).all(), "queries lie 8 rows before their keys"


def test_a_residual_stream_is_one_space_and_its_producers_write_it():
    spaces = fxfuse.find_spaces(*build("residual"))
    stream = next(s for s in spaces if len(s.axes) > 12)
    written = {a.tensor for a in stream.axes if not a.reads}
    read = {a.tensor for a in stream.axes if a.reads}
    assert {"0.0.weight", "1.0.b.0.weight", "1.1.b.0.weight"} <= written
    assert read == {"1.0.a.0.weight", "1.1.a.0.weight", "2.0.a.0.weight", "2.0.skip.0.weight"}
    assert {"0.1.running_mean", "1.1.b.1.running_var"} <= written


def test_flattened_units_read_one_column_for_each_pixel():
    spaces = fxfuse.find_spaces(*build("flatten"))
    (axis,) = [a for a in spaces["0.0.0"].axes if a.reads]
    assert axis.tensor == "2.0.weight" and axis.index.shape == (5, 16)
    assert axis.index.reshape(-1).tolist() == list(range(80))


def test_sizes_are_those_of_the_axes_dense_ones_for_grouped_weights():
    spaces = fxfuse.find_spaces(*build("grouped"))
    assert spaces.sizes["1.b.0.weight", 0] == 8
    assert spaces.sizes["1.b.0.weight", 1] == 8
    assert ("1.b.0.weight", 4) not in spaces.sizes


def test_features_say_where_units_lie_in_node_outputs():
    spaces = fxfuse.find_spaces(*build("concat"))
    first = spaces["0.0"] if "0.0" in {s.name for s in spaces} else next(iter(spaces))
    at = {a.tensor: a.index.ravel().tolist() for a in first.features}
    assert at["cat"] == at["cat_1"] == [0, 1, 2, 3]


def test_a_shared_convolution_writes_what_it_reads():
    (space,) = fxfuse.find_spaces(*build("shared"))
    assert {(a.dim, a.reads) for a in space.axes if a.tensor == "1.a.weight"} == {
        (0, False),
        (1, True),
    }


def test_units_on_different_paths_are_different_spaces():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.b(x[:, :4]) + self.c(x[:, 4:])

    spaces = fxfuse.find_spaces(randomise(Halves()), torch.randn(2, 6))
    assert [s.size for s in spaces] == [4, 4]


def test_an_input_added_to_the_stream_freezes_it():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(x + torch.relu(self.a(x)))

    net, x = randomise(Skip()), torch.randn(2, 6)
    spaces = fxfuse.find_spaces(net, x)
    frozen = {(f.tensor, f.dim): f for f in spaces.frozen}
    assert len(spaces) == 0
    assert frozen["a.weight", 0].count == 6 and frozen["a.weight", 0].node == "add"


@pytest.mark.parametrize("name", ["renorm", "put"])
def test_an_operator_without_a_rule_freezes_its_units_and_is_named(name):
    class Unruly(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = self.operator(torch.relu(self.a(x)))
            return self.c(torch.relu(self.b(x)))

        def operator(self, x):
            if name == "put":
                return x.put(torch.tensor([2, 0]), x[0, :2])
            return x.renorm(2, 0, 1.0)

    net, x = randomise(Unruly()), torch.randn(3, 6)
    spaces, permuted = fxfuse.find_spaces(net, x), fxfuse.permute(net, x)
    assert [(s.name, s.size) for s in spaces] == [("b", 5)]
    (frozen,) = [f for f in spaces.frozen if (f.tensor, f.dim) == ("a.weight", 0)]
    assert frozen.node == name and f"aten.{name}" in frozen.reason and frozen.count == 8
    assert str(frozen) in str(spaces)
    assert gap(net, permuted, x) <= PERMUTATION
    assert moved(net, permuted) == {"b.weight", "b.bias", "c.weight"}


def test_inputs_and_outputs_are_frozen_with_the_reason():
    spaces = fxfuse.find_spaces(*build("flatten"))
    frozen = {(f.tensor, f.dim): f for f in spaces.frozen}
    assert frozen["0.0.0.weight", 1].node == "_0_0_0"
    assert frozen["2.2.weight", 0].reason == "an output of the network"
    assert frozen["2.2.bias", 0].count == 3


def test_several_inputs_and_nested_outputs_are_fixed():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x, y):
            z = torch.relu(self.a(x) + self.b(y))
            return {"u": self.c(z), "v": (z.mean(1), z)}

    net, x = randomise(Two()), (torch.randn(2, 4), torch.randn(2, 5))
    assert fxfuse.find_spaces(net, x).free_units == 0, "all units are an output"


def test_a_tied_head_moves_with_its_table():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 8)

        def forward(self, tokens):
            return F.linear(torch.tanh(self.table(tokens).mean(1)), self.table.weight)

    net, tokens = randomise(Tied()), torch.tensor([[0, 1, 4], [2, 2, 3]])
    (space,) = fxfuse.find_spaces(net, tokens)
    permuted = fxfuse.permute(net, tokens)
    assert space.size == 8 and [(a.tensor, a.dim) for a in space.axes] == [("table.weight", 1)]
    assert gap(net, permuted, tokens) <= PERMUTATION and moved(net, permuted)


def test_a_network_of_one_layer_has_no_spaces():
    net, x = randomise(nn.Sequential(nn.Linear(4, 3))), torch.randn(2, 4)
    assert len(fxfuse.find_spaces(net, x)) == 0
    assert not moved(net, fxfuse.permute(net, x))


def test_printed_spaces_begin_with_the_number_of_free_units():
    assert str(fxfuse.find_spaces(*build("plain"))).splitlines()[0] == "2 spaces, 15 free units"


def test_a_refused_example_and_an_untraceable_model_raise_their_errors():
    net, _ = build("plain")
    with pytest.raises(DataError, match="refuses a batch of shape"):
        fxfuse.find_spaces(net, torch.zeros(2, 5))
    with pytest.raises(DataError, match="example"):
        fxfuse.find_spaces(net, [[0.0]])

    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError):
        fxfuse.find_spaces(Branch(), torch.zeros(2))


def test_wide_networks_take_seconds():
    """No loop over units: 5,000 of them in blocks, groups and streams."""
    net = nn.Sequential(
        conv(3, 1024, 1),
        conv(1024, 2048, 1, groups=32),
        conv(2048, 2048, 1, groups=2048),
        Pooled(2048, 3),
    )
    start = time.perf_counter()
    spaces = fxfuse.find_spaces(randomise(net), torch.randn(1, 3, 4, 4))
    assert spaces.free_units == 1024 + 2048
    assert time.perf_counter() - start < 5


def test_an_order_and_its_inverse_give_the_network_back():
    net, x = build("residual")
    graph, spaces = trace(net), fxfuse.find_spaces(net, x)
    rng = np.random.default_rng(0)
    order = {s.name: rng.permutation(s.size) for s in spaces}
    inverse = {name: np.argsort(o) for name, o in order.items()}
    there = rearrange(graph, spaces, order)
    back = rearrange(there, spaces, inverse)
    assert moved(graph, there) and not moved(graph, back)
    assert torch.equal(outputs(graph, x), outputs(back, x))


def test_adding_ties_units_and_equal_widths_do_not():
    apart = mlp(6, 8, 8, 3)
    together = residual((8, 1), stem=8)
    assert len(fxfuse.find_spaces(randomise(apart), torch.randn(2, 6))) == 2
    assert [s.size for s in fxfuse.find_spaces(randomise(together), torch.randn(2, 3, 8, 8))] == [
        8,
        8,
    ]


class Keeping(nn.Module):
    """Keeps a value computed from a parameter until its mode changes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.table, self.kept = nn.Parameter(torch.zeros(8)), {}

    def train(self, mode=True):
        self.kept = {}
        return super().train(mode)

    def forward(self, x):
        if not self.training:
            key = str(x.device)
            if key not in self.kept:
                self.kept[key] = self.table.exp()
        return self.b(self.a(x) + (self.table.exp() if self.training else self.kept[key]))


def test_values_kept_between_runs_are_computed_in_the_graph():
    net, x = randomise(Keeping()), torch.randn(2, 6)
    outputs(net, x)
    assert fxfuse.find_spaces(net, x).free_units == 8
    assert gap(net, fxfuse.permute(net, x), x) <= PERMUTATION


def test_a_tensor_that_no_operator_takes_stays():
    unused = nn.Transformer(8, 2, 1, 1, 8).encoder.layers[0]  # a leaf when traced
    net, x = randomise(nn.Sequential(nn.Linear(6, 8), unused, nn.Linear(8, 3))), torch.randn(2, 6)
    unused.register_parameter("idle", nn.Parameter(torch.randn(5)))
    spaces = fxfuse.find_spaces(net, x)
    assert ("1.idle", 5) in [(f.tensor, f.count) for f in spaces.frozen]


class Scaled(nn.Module):
    """Units that are multiplied by a table which the state may or may not hold."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(6, 8), nn.Linear(8, 3), kind
        table = torch.linspace(0.5, 2, 8)
        if kind == "attribute":
            self.table = table
        elif kind != "made in forward":
            self.register_buffer("table", table, persistent=kind != "not persistent")
        if kind == "shown twice":
            self.register_buffer("row", self.table.view(1, 8))
        if kind == "expanded":
            self.register_buffer("row", torch.tensor([0.5]).expand(8))

    def forward(self, x):
        table = torch.linspace(0.5, 2, 8) if self.kind == "made in forward" else self.table
        x = torch.tanh(torch.relu(self.first(x)) * table)
        return self.last(x * self.row if self.kind in ("shown twice", "expanded") else x)


KINDS = ["persistent", "not persistent", "attribute", "made in forward", "shown twice", "expanded"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_loads_the_state_and_computes_the_same(kind):
    """What the state does not hold stays where it is, and so do the units that meet it."""
    nets, data = [Scaled(kind).eval() for _ in range(2)], torch.randn(64, 6)
    shuffled = fxfuse.permute(nets[0], data[:2], seed=3)
    assert gap(nets[0], shuffled, data) < PERMUTATION
    for made in (shuffled, fxfuse.fuse(nets, data)):
        loaded = Scaled(kind)
        if kind == "expanded":  # torch cannot write to what its class expands
            loaded.row = loaded.row.clone()
        loaded.load_state_dict(made.state_dict())
        assert gap(made, loaded.eval(), data) < PERMUTATION
    free = fxfuse.find_spaces(nets[0], data[:2]).free_units
    assert free == (8 if kind in ("persistent", "expanded") else 0)


@pytest.mark.parametrize("name", some(NETS, *[*NETS][1::2]))
def test_the_class_loads_what_is_permuted_or_fused(name):
    nets, x = [build(name, seed)[0] for seed in (1, 2)], build(name, 3)[1]
    data = torch.randn(40, *data_shape(name))
    for made in (fxfuse.permute(nets[0], x, seed=3), fxfuse.fuse(nets, data)):
        loaded = NETS[name].build()
        loaded.load_state_dict(made.state_dict())
        assert gap(made, loaded.eval(), torch.randn(4, *data_shape(name))) < PERMUTATION


class Idle(nn.Module):
    """State that forward does not use: layers, a parameter, buffers, a second name."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.old = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(4, 4)
        self.idle, self.second = nn.Parameter(torch.zeros(3)), self.first
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("ids", torch.arange(5))
        self.register_buffer("nothing", torch.zeros(0))

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def test_state_that_forward_does_not_use_is_kept(tmp_path):
    nets, data = [randomise(Idle(), seed) for seed in (1, 2)], torch.randn(64, 6)
    made = [fxfuse.permute(nets[0], data[:2], seed=3), fxfuse.fuse(nets, data)]
    fxfuse.save(made[1], tmp_path / "fused.fx")
    made += [fxfuse.load(tmp_path / "fused.fx"), fxfuse.fuse([made[0], made[1]], data)]
    for net in made:
        assert net.state_dict().keys() == nets[0].state_dict().keys()
        loaded = Idle().eval()
        loaded.load_state_dict(net.state_dict())
        assert gap(net, loaded, data) < PERMUTATION
    assert gap(nets[0], made[0], data) < PERMUTATION
    assert torch.equal(made[1].ids, nets[0].ids) and torch.equal(made[1].idle, nets[0].idle)
