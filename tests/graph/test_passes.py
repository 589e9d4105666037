"""The runner of passes: what it checks at each level, and faults planted to be caught."""

import copy
import threading

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.errors import NotEquivalent, PassError
from fxfuse.graph.passes import canonical, debug_level, graph_pass
from fxfuse.graph.trace import trace
from fxfuse.graph.verify import lint
from tests.support.nets import NETS, build, conv, gap, mlp, outputs, randomise


def node(module, name):
    return next(n for n in module.graph.nodes if n.name == name)


@pytest.fixture
def net():
    return trace(randomise(mlp(6, 8, 7, 3)))


X = torch.linspace(-1, 1, 24).view(4, 6)


@graph_pass(keeps_function=True)
def nothing(module):
    """Change nothing."""


@graph_pass(keeps_function=True)
def relu_again(module, after):
    """Apply the activation behind a node once more, which keeps the function only for a ReLU."""
    act = node(module, after)
    module.add_submodule("again", nn.ReLU())
    with module.graph.inserting_after(act):
        new = module.graph.call_module("again", (act,))
    act.replace_all_uses_with(new, lambda user: user is not new)
    new.meta["neutral_to"] = after


@graph_pass(keeps_function=True)
def scale_and_lie(module, path, factor):
    """Scale a weight and claim that nothing changed."""
    with torch.no_grad():
        module.get_submodule(path).weight.mul_(factor)


@graph_pass(keeps_function=False)
def scale(module, path, factor):
    """Scale a weight and claim nothing."""
    with torch.no_grad():
        module.get_submodule(path).weight.mul_(factor)


@graph_pass(keeps_function=False)
def disorder(module):
    """Put a node before its input."""
    node(module, "_0").prepend(node(module, "_1"))


@graph_pass(keeps_function=False)
def forget_a_parameter(module):
    """Leave a parameter that nothing uses."""
    module.register_parameter("left", nn.Parameter(torch.zeros(2)))


@graph_pass(keeps_function=False)
def forget_an_attribute(module):
    """Widen a layer but not its attribute."""
    layer = module.get_submodule("4")
    layer.weight = nn.Parameter(torch.zeros(4, 7))
    layer.bias = nn.Parameter(torch.zeros(4))


@graph_pass(keeps_function=False)
def skip(module, name):
    """Take a node out."""
    gone = node(module, name)
    gone.replace_all_uses_with(gone.all_input_nodes[0])
    module.graph.erase_node(gone)


@graph_pass(keeps_function=False)
def fail(module):
    """Change something, then stop."""
    with torch.no_grad():
        module.get_submodule("0").weight.zero_()
    raise PassError("no", where="here", expected="yes", do="stop")


@pytest.mark.parametrize("name", NETS)
def test_a_pass_that_does_nothing_returns_an_equal_copy(name):
    net, x = build(name)
    graph = trace(net)
    edited = nothing(graph, (x,))
    assert edited is not graph
    assert torch.equal(outputs(edited, x), outputs(graph, x))
    assert [n.name for n in edited.graph.nodes] == [n.name for n in graph.graph.nodes]


def test_a_true_claim_passes(net):
    edited = relu_again(net, (X,), "_1")
    assert gap(net, edited, X) == 0.0
    assert len(edited.graph.nodes) == len(net.graph.nodes) + 1


def test_a_false_claim_is_caught_with_its_pass_and_first_node(net):
    with pytest.raises(NotEquivalent) as caught:
        scale_and_lie(net, (X,), "2", 1.5)
    assert "scale_and_lie" in caught.value.where and "node '_2'" in caught.value.where


def test_the_first_node_of_a_false_claim_may_be_an_inserted_one(net):
    with pytest.raises(NotEquivalent, match=r"node 'again'.*relu_again from _4"):
        relu_again(net, (X,), "_4")


def test_a_small_difference_is_caught(net):
    with pytest.raises(NotEquivalent):
        scale_and_lie(net, (X,), "2", 1.001)


def test_a_change_without_a_claim_passes(net):
    assert gap(net, scale(net, (X,), "2", 1.5), X) > 0.01


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (disorder, "fx finds malformed"),
        (forget_a_parameter, "nothing in the graph uses it"),
        (forget_an_attribute, "out_features is 3, but its parameters say 4"),
    ],
)
@pytest.mark.parametrize("level", [1, 2])
def test_an_inconsistent_graph_is_caught_from_level_one_on(net, fault, message, level):
    with fxfuse.debug(level), pytest.raises(PassError, match=message):
        fault(net, (X,))


def test_level_zero_checks_nothing_and_level_one_no_outputs(net):
    with fxfuse.debug(0):
        forget_a_parameter(net, (X,))
        scale_and_lie(net, (X,), "2", 1.5)
    with fxfuse.debug(1):
        scale_and_lie(net, (X,), "2", 1.5)


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize(
    "action",
    [lambda m: scale(m, (X,), "0", 3.0), lambda m: skip(m, (X,), "_1"), lambda m: fail(m, (X,))],
)
def test_the_input_is_never_modified(net, action, level):
    net.train()
    state, code = copy.deepcopy(net.state_dict()), net.code
    with fxfuse.debug(level):
        try:
            action(net)
        except PassError as error:
            assert error.do == "stop"
    assert all(torch.equal(t, state[k]) for k, t in net.state_dict().items())
    assert net.code == code and net.training


def test_modules_that_are_no_longer_used_are_deleted(net):
    edited = skip(net, (X,), "_2")
    assert "2" in dict(net.named_modules()) and "2" not in dict(edited.named_modules())
    lint(edited)


def test_the_code_of_the_graph_is_generated_again(net):
    assert "again" in relu_again(net, (X,), "_1").code


def test_new_nodes_know_their_pass_and_their_sources(net):
    edited = relu_again(net, (X,), "_1")
    old = {n.name for n in net.graph.nodes}
    new = [n for n in edited.graph.nodes if n.name not in old]
    assert [n.meta["origin"] for n in new] == [("relu_again", ("_1",))]
    assert not any("origin" in n.meta for n in edited.graph.nodes if n.name in old)


def test_passes_can_be_chained(net):
    twice = relu_again(relu_again(net, (X,), "_1"), (X,), "_3")
    assert gap(net, twice, X) == 0.0
    assert len(twice.graph.nodes) == len(net.graph.nodes) + 2


def test_a_pass_keeps_its_name_and_its_docstring():
    assert relu_again.__name__ == "relu_again" and "once more" in relu_again.__doc__


# --- levels ---------------------------------------------------------------------------------------


def test_levels_nest_and_are_restored_after_errors():
    assert debug_level() == 2
    with fxfuse.debug(0):
        with pytest.raises(KeyError), fxfuse.debug(3):
            assert debug_level() == 3
            raise KeyError
        assert debug_level() == 0
    assert debug_level() == 2


@pytest.mark.parametrize(("text", "level"), [("0", 0), ("1", 1), ("3", 3), ("", 0), ("yes", 0)])
def test_the_environment_sets_the_level_outside_of_blocks(monkeypatch, text, level):
    monkeypatch.setenv("FXFUSE_DEBUG", text)
    assert debug_level() == 2
    levels = []
    outside = threading.Thread(target=lambda: levels.append(debug_level()))
    outside.start()
    outside.join()
    assert levels == [level]


def test_level_three_writes_each_graph(net, tmp_path, monkeypatch):
    monkeypatch.setenv("FXFUSE_DUMP", str(tmp_path / "graphs"))
    with fxfuse.debug(3):
        relu_again(net, (X,), "_1")
        nothing(net, (X,))
    first, second = sorted((tmp_path / "graphs").iterdir())
    assert (first.name, second.name) == ("00_relu_again.txt", "01_nothing.txt")
    assert first.read_text().startswith("# relu_again, ")
    assert "call_module" in first.read_text() and "again" in first.read_text()
    assert "again" not in second.read_text()


def test_lower_levels_write_nothing(net, tmp_path, monkeypatch):
    monkeypatch.setenv("FXFUSE_DUMP", str(tmp_path))
    relu_again(net, (X,), "_1")
    assert not list(tmp_path.iterdir())


IMAGES = torch.randn(2, 3, 8, 8)


class Dense(nn.Module):
    """Layers that each read all earlier ones, from a list that grows."""

    def __init__(self, layers=3, act=torch.relu):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(3 + 2 * i), nn.ReLU(), nn.Conv2d(3 + 2 * i, 2, 3, 1, 1))
            for i in range(layers)
        )
        self.act = act

    def forward(self, x):
        seen = [x]
        for layer in self.layers:
            seen.append(layer(self.act(torch.cat(seen, 1))))
        return torch.cat(seen, 1)


def joins(graph):
    return [n for n in graph.graph.nodes if n.target in (torch.cat, torch.concat)]


def test_a_stream_that_grows_is_concatenated_piece_by_piece():
    net = randomise(Dense(), 1)
    graph = canonical(trace(net), (IMAGES,))
    assert gap(net, graph, IMAGES) == 0
    assert [len(n.args[0]) for n in joins(graph)] == [2, 2, 2]
    first, second, third = joins(graph)
    assert second.args[0][0] is first and third.args[0][0] is second


def test_concatenations_along_other_axes_or_of_other_parts_stay():
    class Other(nn.Module):
        def forward(self, x):
            a, b = torch.cat([x, x * 2], 1), torch.cat([x, x * 2, x], 2)
            return a.sum() + b.sum() + torch.cat([x * 3, x, x], 1).sum()

    graph = canonical(trace(Other()), (IMAGES,))
    assert [len(n.args[0]) for n in joins(graph)] == [2, 3, 3]


def in_place(x):
    return x.mul_(2)


@pytest.mark.parametrize(
    "act",
    [in_place, torch.relu_, nn.ReLU(inplace=True), lambda x: torch.relu_(x.view(-1)).view_as(x)],
)
def test_a_concatenation_that_is_written_to_is_not_read_again(act):
    net = randomise(Dense(act=act), 2)
    expected = outputs(net, IMAGES.clone())
    graph = canonical(trace(net), (IMAGES.clone(),))
    assert torch.equal(outputs(graph, IMAGES.clone()), expected)


def test_parts_that_are_written_to_in_between_are_concatenated_anew():
    class Rewritten(nn.Module):
        def forward(self, x):
            y, z = x * 2, x * 3
            first = torch.cat([y, z], 1)
            y.add_(1)
            return first.sum() + torch.cat([y, z, x], 1)

    graph = canonical(trace(Rewritten()), (IMAGES,))
    assert torch.allclose(graph(IMAGES), Rewritten()(IMAGES))
    assert [len(n.args[0]) for n in joins(graph)] == [2, 3]


def test_assertions_and_what_only_they_need_are_dropped():
    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv(3, 4)

        def forward(self, x):
            torch._assert(x.dim() == 4, "four axes")
            torch._assert(x.shape[1] == 3, "three channels")
            return self.a(x).view(x.size(0), -1)

    graph = canonical(trace(Checked()), (IMAGES,))
    asked = [n.name for n in graph.graph.nodes if n.op in ("call_function", "call_method")]
    assert asked == ["size", "view"]


def test_a_step_that_writes_in_place_and_has_no_reader_stays():
    class Written(nn.Module):
        def forward(self, x):
            y = x * 1
            y.add_(1)
            y += 2
            return y

    graph = canonical(trace(Written()), (IMAGES,))
    assert torch.allclose(graph(IMAGES), IMAGES + 3)
