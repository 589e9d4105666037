import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfuse.matching import maker_of, match, packs, path_of, steps


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
