"""One graph for both modes: which nodes are the same in both, and what the one graph computes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxfuse.graph._merge import _maker_of, _packs, _path_of, _steps, match
from fxfuse.graph.modes import Choice, Mode, Tap
from fxfuse.graph.trace import trace
from tests.support.modes import HEADS, Body, Counting, HeadWithModes, Named, Wrapped, same, seeded
from tests.support.nets import Functional, gap, mlp, moved, outputs, randomise


def graphs(net):
    """Graphs of both modes."""
    return [fx.symbolic_trace(net.train(mode)).graph for mode in (False, True)]


def matched(net):
    return match(net, *graphs(net))


class Two(nn.Module):
    """A model of two functions, one for each mode."""

    def __init__(self, evaluating, training):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.of = {False: evaluating, True: training}

    def forward(self, x):
        return self.of[self.training](self, x)


def names(partners):
    return {a.name: b.name for a, b in partners.items()}


def test_equal_graphs_match_node_by_node():
    partners, flags = matched(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    assert all(a.name == b.name for a, b in partners.items()) and len(partners) == 3
    assert flags == []


def test_flags_are_found_by_place_and_by_name():
    def forward(net, x):
        y = torch.dropout(net.a(x), 0.5, net.training)
        return F.dropout(y, 0.5, training=net.training)

    partners, flags = matched(Two(forward, forward))
    assert {(node.name, key) for node, key, *_ in flags} == {
        ("dropout", 2),
        ("dropout_1", "training"),
    }
    assert all(node in partners.values() for node, *_ in flags)


def test_what_training_adds_is_left_out():
    net = Two(lambda n, x: n.a(x), lambda n, x: (n.a(x), n.b(x)))
    partners, _ = matched(net)
    assert names(partners) == {"x": "x", "a": "a"}


def test_a_step_that_training_repeats_is_identified_by_its_readers():
    net = Two(
        lambda n, x: n.b(n.a(x).flatten(1)),
        lambda n, x: (lambda y: (n.a(y.flatten(1)), n.b(y.flatten(1))))(n.a(x)),
    )
    partners, _ = matched(net)
    assert names(partners) == {"x": "x", "a": "a", "flatten": "flatten_1", "b": "b"}


def test_a_call_of_a_module_called_twice_is_identified_by_its_input():
    net = Two(lambda n, x: n.b(n.a(x)), lambda n, x: (n.b(n.a(x)), n.b(x)))
    assert names(matched(net)[0])["b"] == "b"
    net = Two(lambda n, x: n.b(n.a(x)), lambda n, x: (n.b(x), n.b(n.a(x))))
    assert names(matched(net)[0])["b"] == "b_1"


def test_constants_match_by_value_and_messages_by_text():
    def forward(net, x, value=2.0):
        torch._assert(x.dim() == 2, f"not two axes of {x.size(0)}")
        return net.a(x) * torch.tensor([value, 3.0])

    net = Two(forward, lambda n, x: (x.size(0), n.b(x), forward(n, x)))
    assert len(matched(net)[0]) == len(_steps(graphs(net)[0]))
    assert matched(Two(forward, lambda n, x: forward(n, x, 2.5))) == ""


@pytest.mark.parametrize(
    ("evaluating", "training"),
    [
        (lambda n, x: n.a(x).softmax(1), lambda n, x: n.a(x)),
        (lambda n, x: n.a(x), lambda n, x: n.a(x + 1)),
        (lambda n, x: n.a(x).clamp(0, 1), lambda n, x: n.a(x).clamp(0, 2)),
        (lambda n, x: n.a(x).sum(1, keepdim=True), lambda n, x: n.a(x).sum(1, keepdim=False)),
        (lambda n, x: n.a(x) + n.b(x), lambda n, x: n.b(x) + n.a(x)),
        (lambda n, x: n.a(n.b(x)), lambda n, x: n.b(n.a(x))),
        (lambda n, x: (lambda y: y + n.a(y))(x.exp()), lambda n, x: x.exp() + n.a(x.exp())),
    ],
    ids=["more", "other input", "constant", "flag of eval mode", "order", "wiring", "twice"],
)
def test_models_that_compute_something_else_in_training_do_not_match(evaluating, training):
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(Two(evaluating, training)))

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, name):
            return type(m) is nn.Linear

    traced = [Tracer().trace(net.train(mode)) for mode in (False, True)]
    assert match(net, *traced) == "1.0"


def test_a_step_that_training_inserts_is_reported_by_its_module():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x) if self.training else x

    net = nn.Sequential(nn.Linear(6, 6), Noise(), nn.Linear(6, 6), Noise(), nn.Linear(6, 6))
    assert matched(net) == "1"


def test_paths_do_not_count_calls():
    twice = nn.Sequential(nn.Sequential(nn.Linear(6, 6)))
    graph = fx.symbolic_trace(nn.Sequential(twice[0], twice[0])).graph
    assert [_path_of(n) for n in _steps(graph)] == ["", "0.0", "0.0"]
    assert [_maker_of(n) for n in _steps(graph)] == ["", "0", "0"]


def test_only_objects_of_outputs_pack():
    class Pair(tuple):
        pass

    graph = fx.Graph()
    x = graph.placeholder("x")
    inner = graph.call_function(Pair, ((x,),))
    outer = graph.call_function(Pair, ((inner,),))
    used = graph.call_function(Pair, ((x,),))
    first = graph.call_function(len, (used,))
    graph.output((outer, first))
    assert _packs(inner) and _packs(outer)
    assert not _packs(used) and not _packs(x) and not _packs(first)


@pytest.mark.parametrize("name", HEADS)
def test_both_modes_compute_what_the_model_computes_in_them(name):
    net, x = randomise(HEADS[name]()), torch.randn(7, 6)
    graph = trace(net)
    for training in (False, True, False):
        net.train(training)
        graph.train(training)
        expected = seeded(net, x)
        state = {k: v.clone() for k, v in net.state_dict().items()}
        assert same(expected, seeded(graph, x))
        assert all(torch.equal(v, state[k]) for k, v in graph.state_dict().items())
    assert not same(seeded(net, x), seeded(net.train(), x))


@pytest.mark.parametrize("name", HEADS)
def test_heads_keep_names_and_state_and_copies_keep_both_modes(name):
    net, x = randomise(HEADS[name]()), torch.randn(7, 6)
    graph = copy.deepcopy(trace(net.train()))
    graph.graph.lint()
    assert set(graph.state_dict()) == set(net.state_dict())
    other = randomise(HEADS[name](), seed=5)
    graph.load_state_dict(other.state_dict())
    assert same(seeded(other.train(), x), seeded(graph, x))
    assert same(seeded(other.eval(), x), seeded(graph.eval(), x))


@pytest.mark.parametrize("name", HEADS)
def test_a_graph_that_is_traced_again_is_the_same(name):
    graph = trace(randomise(HEADS[name]()))
    again = trace(graph)
    steps = [[(n.op, str(n.target)) for n in g.graph.nodes] for g in (graph, again)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("name", HEADS)
def test_eval_mode_writes_nothing(name):
    graph, x = trace(randomise(HEADS[name]())), torch.randn(7, 6)
    before, given = copy.deepcopy(graph), x.clone()
    outputs(graph, x)
    assert not moved(before, graph) and torch.equal(x, given)


def test_heads_drop_nothing_in_eval_mode():
    """Statistics of a head are taken without its dropout."""
    graph, x = trace(randomise(Body(HeadWithModes()))), torch.randn(7, 6)
    state = torch.get_rng_state()
    outputs(graph, x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", HEADS)
def test_heads_learn(name):
    graph, x = trace(randomise(HEADS[name]())).train(), torch.randn(7, 6)
    sum(t.sum() for t in tree_leaves(graph(x)) if t is not None).backward()
    assert all(p.grad is not None for p in graph.parameters())


def test_eval_mode_exports_and_compilers_leave_the_heads_out():
    net, x = randomise(Body(HeadWithModes())), torch.randn(7, 6)
    program = torch.export.export(trace(net), (x,))
    assert gap(net, program.module(), x) == 0
    assert not program.graph_signature.buffers_to_mutate
    program = program.run_decompositions()
    called = [n for n in program.graph.nodes if n.op == "call_function"]
    assert called and not any("head" in str(n.meta["nn_module_stack"]) for n in called)


def test_the_mode_of_the_part_that_branches_counts():
    net, x = randomise(Wrapped()), torch.randn(7, 6)
    graph = trace(net)
    for module in (net, graph):
        module.train()
        module.get_submodule("part").eval()
    assert same(seeded(net, x), seeded(graph, x))


def test_names_that_the_model_uses_are_left_alone():
    class Busy(Body):
        training_output, training_mode = "mine", None

        def __init__(self):
            super().__init__()
            self.training_input = nn.Linear(8, 8)

        def forward(self, x):
            return super().forward(self.training_input(F.pad(x, (0, 2)))[:, :6])

    net, x = randomise(Busy()), torch.randn(7, 6)
    graph = trace(net)
    assert same(seeded(net, x), seeded(graph, x))
    assert same(seeded(net.train(), x), seeded(graph.train(), x))


class Recording(nn.Module):
    """Notes what it sees in training; nothing in it has a flag."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.seen.add_(x.detach().sum(0))
        return 2 * x


def test_a_record_goes_with_the_step_behind_it():
    """Passes copy the steps that lead to the outputs; a record beside them would be lost."""
    steps = [m for _ in range(3) for m in (nn.Linear(6, 6), Counting(6))]
    net, x = randomise(nn.Sequential(*steps)), torch.randn(7, 6)
    graph = trace(net)
    idle = [n for n in graph.graph.nodes if not n.users and n.op != "output"]
    assert all(n.target is torch._assert for n in idle)
    assert {"1.act", "3.act", "5.act"} <= {n.target for n in graph.graph.nodes}
    for module in (net, graph):
        seeded(module.train(), x)
    assert not moved(net, graph) and net[1].num_batches_tracked == 1
    assert same(seeded(net.eval(), x), seeded(graph.eval(), x))
    assert not moved(net, graph)


def test_a_small_module_that_records_without_a_flag_is_kept_whole():
    net = randomise(nn.Sequential(nn.Linear(6, 6), Recording(), nn.Linear(6, 6), Recording()))
    graph, x = trace(net), torch.randn(7, 6)
    assert [n.target for n in graph.graph.nodes][1:-1] == ["0", "1", "2", "3"]
    assert same(seeded(net.train(), x), seeded(graph.train(), x))
    assert not moved(net, graph)


def test_graphs_know_the_mode_only_where_the_modes_differ():
    plain, flagged, branched = (trace(n) for n in (mlp(6, 8, 3), Functional(), Body()))
    kinds = [
        {type(m) for m in g.modules()} & {Mode, Choice, Tap} for g in (plain, flagged, branched)
    ]
    assert kinds == [set(), {Mode}, {Mode, Choice, Tap}]


def test_only_values_that_may_be_written_to_have_taps():
    net = Named(HeadWithModes())
    graph = trace(net)
    taps = [n for n in graph.graph.nodes if n.target == "training_input"]
    assert {n.args[0].target for n in taps} == {"a.3", "head.seen"}, "no parameter, no result"


# --- modes that cannot be merged ------------------------------------------------------------------


class Noisy(Body):
    """Training computes something else on the way to the outputs."""

    def forward(self, x):
        x = self.a(x)
        return self.out(self.b(x + torch.rand_like(x)) if self.training else self.b(x))


class Normalising(Body):
    """Eval mode takes a step of its own."""

    def result(self, x, aux):
        return x if self.training else x.softmax(1)


class Swapping(Body):
    """Both modes take the same steps in another order, and one may write."""

    def forward(self, x):
        x = self.a(x)
        if self.training:
            y, z = x.relu_(), self.b(x)
        else:
            z, y = self.b(x), x.relu_()
        return self.out(y + z)


class Turned(Body):
    """A flag that is set in eval mode."""

    def forward(self, x):
        return self.out(self.b(self.a(x)).mean(1, keepdim=not self.training).view(-1, 1) + x.sum())


@pytest.mark.parametrize("kind", [Noisy, Normalising, Swapping])
def test_a_model_whose_modes_cannot_be_merged_keeps_that_of_eval_mode(kind):
    net, x = randomise(kind()), torch.randn(7, 6)
    graph = trace(net)
    assert not any(isinstance(m, Choice) for m in graph.modules())
    assert same(seeded(net, x), seeded(graph, x))


@pytest.mark.parametrize("kind", [Noisy, Normalising, Swapping])
def test_a_part_whose_modes_cannot_be_merged_is_kept_whole(kind):
    net, x = randomise(nn.Sequential(nn.Linear(6, 6), kind(), nn.Linear(3, 2))), torch.randn(7, 6)
    graph = trace(net)
    assert "1" in {n.target for n in graph.graph.nodes}
    assert same(seeded(net, x), seeded(graph, x))
    assert same(seeded(net.train(), x), seeded(graph.train(), x))
