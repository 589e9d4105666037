"""."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_structure

from fxfuse.graph._modes import (
    Choice,
    Mode,
    Tap,
    cut_to,
    evaluating_part,
    maker_of,
    match,
    packs,
    path_of,
    steps,
)
from fxfuse.graph.trace import trace
from tests.support.modes import Body, Both, Keyed, Named
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
    assert {(node.name, key) for node, key in flags} == {("dropout", 2), ("dropout_1", "training")}
    assert all(node in partners.values() for node, _ in flags)


def test_what_training_adds_is_left_out():
    net = Two(lambda n, x: n.a(x), lambda n, x: (n.a(x), n.b(x)))
    partners, _ = matched(net)
    assert names(partners) == {"x": "x", "a": "a"}


def test_a_step_that_training_repeats_is_told_by_who_reads_it():
    net = Two(
        lambda n, x: n.b(n.a(x).flatten(1)),
        lambda n, x: (lambda y: (n.a(y.flatten(1)), n.b(y.flatten(1))))(n.a(x)),
    )
    partners, _ = matched(net)
    assert names(partners) == {"x": "x", "a": "a", "flatten": "flatten_1", "b": "b"}


def test_a_module_called_twice_is_told_by_what_it_reads():
    net = Two(lambda n, x: n.b(n.a(x)), lambda n, x: (n.b(n.a(x)), n.b(x)))
    assert names(matched(net)[0])["b"] == "b"
    net = Two(lambda n, x: n.b(n.a(x)), lambda n, x: (n.b(x), n.b(n.a(x))))
    assert names(matched(net)[0])["b"] == "b_1"


def test_constants_match_by_value_and_messages_by_their_words():
    def forward(net, x, value=2.0):
        torch._assert(x.dim() == 2, f"not two axes of {x.size(0)}")
        return net.a(x) * torch.tensor([value, 3.0])

    net = Two(forward, lambda n, x: (x.size(0), n.b(x), forward(n, x)))
    assert len(matched(net)[0]) == len(steps(graphs(net)[0]))
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
def test_models_that_go_two_ways_do_not_match(evaluating, training):
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(Two(evaluating, training)))

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, name):
            return type(m) is nn.Linear

    found = match(net, *(Tracer().trace(net.train(mode)) for mode in (False, True)))
    assert found == "1.0"


def test_what_training_inserts_names_its_module():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x) if self.training else x

    net = nn.Sequential(nn.Linear(6, 6), Noise(), nn.Linear(6, 6), Noise(), nn.Linear(6, 6))
    assert matched(net) == "1"


def test_paths_leave_out_which_call_it_is():
    twice = nn.Sequential(nn.Sequential(nn.Linear(6, 6)))
    graph = fx.symbolic_trace(nn.Sequential(twice[0], twice[0])).graph
    assert [path_of(n) for n in steps(graph)] == ["", "0.0", "0.0"]
    assert [maker_of(n) for n in steps(graph)] == ["", "0", "0"]


def test_only_objects_of_outputs_are_packed():
    class Pair(tuple):
        pass

    graph = fx.Graph()
    x = graph.placeholder("x")
    inner = graph.call_function(Pair, ((x,),))
    outer = graph.call_function(Pair, ((inner,),))
    used = graph.call_function(Pair, ((x,),))
    first = graph.call_function(len, (used,))
    graph.output((outer, first))
    assert packs(inner) and packs(outer)
    assert not packs(used) and not packs(x) and not packs(first)


class NamedInBothModes(Body):
    def result(self, x, aux):
        return Both(x, aux)


class HeadWithModes(nn.Module):
    """A head with everything that has a mode, which writes to what it reads."""

    def __init__(self):
        super().__init__()
        self.drop, self.a, self.norm = nn.Dropout(0.3), nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.b = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x):
        self.seen.add_(x.detach().sum(0))
        x = self.norm(self.a(F.relu(self.drop(x), inplace=True)))
        return F.dropout(x, 0.5, training=self.training).view(x.size(0), -1) @ self.b


class Writing(Body):
    """A head that writes to the stream: training alone may see it."""

    def forward(self, x):
        x = self.b(self.a(x))
        aux = self.head(F.relu(x, inplace=True)) if self.training else None
        return self.result(self.out(x), aux)


class Repeating(Body):
    """Steps that training takes once more than eval mode does."""

    def forward(self, x):
        x = self.a(x)
        aux = self.head(x.view(x.size(0), -1)) if self.training else None
        return self.result(self.out(self.b(x.view(x.size(0), -1))), aux)


class Supervised(Body):
    """One head on two depths, the deeper one first."""

    def __init__(self):
        super().__init__(nn.Identity())

    def forward(self, x):
        x = self.a(x)
        y = torch.relu(self.b(x))
        return (self.out(y), self.out(x)) if self.training else self.out(y)


class Features(Body):
    """Training hands out more of what is computed anyway."""

    def forward(self, x):
        x = self.head(self.a(x))
        return self.result(self.out(self.b(F.pad(x, (0, 3)))), x)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x) if self.training else x


class Counting(nn.BatchNorm1d):
    """A norm that activates, as `timm` has it: traced through, for it is not of torch.nn."""

    def __init__(self, width):
        super().__init__(width)
        self.act = nn.ReLU()

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        torch._assert(x.dim() == 2, f"two axes, not those of {x}")
        known = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(F.batch_norm(x, *known, self.training, self.momentum, self.eps))


class Wrapped(nn.Module):
    """The heads sit in a part, and another part behind them branches on its mode."""

    def __init__(self):
        super().__init__()
        self.noise, self.part = Noise(), Named(nn.Sequential(Noise(), nn.Linear(8, 2)))

    def forward(self, x):
        return self.part(self.noise(x))


class Counted(Body):
    """Records and flags of both kinds, in the head and before it."""

    def __init__(self):
        super().__init__(nn.Sequential(Counting(8), Noise(), nn.Linear(8, 4)))
        self.a = nn.Sequential(nn.Linear(6, 8), Counting(8))


HEADS = {
    "tuple": Body,
    "named": Named,
    "named in both modes": NamedInBothModes,
    "keyed": Keyed,
    "with modes": lambda: Body(HeadWithModes()),
    "writing": Writing,
    "repeating": Repeating,
    "supervised": Supervised,
    "features": Features,
    "wrapped": Wrapped,
    "counted": Counted,
}


def same(a, b):
    """Whether two results agree exactly, types of tuples and keys of dictionaries included."""
    pairs = zip(tree_leaves(a), tree_leaves(b))
    alike = all(torch.equal(x, y) if torch.is_tensor(x) else x is y for x, y in pairs)
    return alike and type(a) is type(b) and tree_structure(a) == tree_structure(b)


def seeded(module, x):
    torch.manual_seed(1)
    return outputs(module, x.clone())


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
    """What is measured of them is what they learned, not what a draw left of it."""
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


def test_the_mode_of_the_part_that_branches_decides():
    net, x = randomise(Wrapped()), torch.randn(7, 6)
    graph = trace(net)
    for module in (net, graph):
        module.train()
        module.get_submodule("part").eval()
    assert same(seeded(net, x), seeded(graph, x))


def test_names_that_a_model_uses_itself_are_left_to_it():
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


def test_a_record_goes_with_the_step_that_it_is_kept_for():
    """Passes copy steps on the way to the outputs; a record beside it would be lost."""
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


def test_a_small_part_with_a_record_and_no_flag_is_kept_whole():
    net = randomise(nn.Sequential(nn.Linear(6, 6), Recording(), nn.Linear(6, 6), Recording()))
    graph, x = trace(net), torch.randn(7, 6)
    assert [n.target for n in graph.graph.nodes][1:-1] == ["0", "1", "2", "3"]
    assert same(seeded(net.train(), x), seeded(graph.train(), x))
    assert not moved(net, graph)


def test_only_what_differs_becomes_live():
    plain, flagged, branched = (trace(n) for n in (mlp(6, 8, 3), Functional(), Body()))
    kinds = [
        {type(m) for m in g.modules()} & {Mode, Choice, Tap} for g in (plain, flagged, branched)
    ]
    assert kinds == [set(), {Mode}, {Mode, Choice, Tap}]


def test_only_what_may_be_written_to_is_tapped():
    net = Named(HeadWithModes())
    graph = trace(net)
    taps = [n for n in graph.graph.nodes if n.target == "training_input"]
    assert {n.args[0].target for n in taps} == {"a.3", "head.seen"}, "no parameter, no result"


# --- what cannot be bridged -----------------------------------------------------------------------


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
def test_models_that_go_two_ways_keep_the_one_of_eval_mode(kind):
    net, x = randomise(kind()), torch.randn(7, 6)
    graph = trace(net)
    assert not any(isinstance(m, Choice) for m in graph.modules())
    assert same(seeded(net, x), seeded(graph, x))


@pytest.mark.parametrize("kind", [Noisy, Normalising, Swapping])
def test_parts_that_go_two_ways_are_kept_whole(kind):
    net, x = randomise(nn.Sequential(nn.Linear(6, 6), kind(), nn.Linear(3, 2))), torch.randn(7, 6)
    graph = trace(net)
    assert "1" in {n.target for n in graph.graph.nodes}
    assert same(seeded(net, x), seeded(graph, x))
    assert same(seeded(net.train(), x), seeded(graph.train(), x))


# --- doing without the heads ----------------------------------------------------------------------


@pytest.mark.parametrize("traced", [trace, lambda net: trace(trace(net))], ids=["once", "twice"])
@pytest.mark.parametrize("name", HEADS)
def test_the_part_for_eval_mode_computes_the_same(name, traced):
    net, x = randomise(HEADS[name]()), torch.randn(7, 6)
    graph = traced(net)
    part = evaluating_part(graph)
    assert same(seeded(net, x), seeded(part.eval(), x))
    whole = copy.deepcopy(graph)
    cut_to(graph, part)
    graph.graph.lint()
    assert same(seeded(net, x), seeded(graph, x))
    kept = {k for k in whole.state_dict() if not k.startswith(("head", "part.head"))}
    assert set(graph.state_dict()) == kept or name in ("supervised", "features")
    used = {str(n.target) for n in graph.graph.nodes}
    assert all(any(k.startswith(u) for u in used) for k in graph.state_dict())
    assert same(seeded(part.train(), x), seeded(graph.train(), x))
    assert evaluating_part(graph) is None
