"""Tracing: the graph computes the same in both modes, has the state, and shares nothing."""

import contextlib
import copy
import gc
import math
import pickle
import sys
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import fx, nn
from torchvision.ops import StochasticDepth

import fxfuse
from fxfuse.errors import DataError, ModelError, TraceError
from fxfuse.graph._merge import merge
from fxfuse.graph.inputs import as_example
from fxfuse.graph.modes import Mode
from fxfuse.graph.state import device_of
from fxfuse.graph.structures import tensors_in
from fxfuse.graph.trace import run_once, trace, trace_sharing
from fxfuse.graph.verify import lint
from tests.support.nets import (
    NETS,
    Functional,
    Residual,
    build,
    conv,
    gap,
    mlp,
    outputs,
    random_nets,
    randomise,
)
from tests.support.tolerances import FUNCTION


def varies(module, x):
    """Whether two calls differ."""
    return not torch.equal(outputs(module, x), outputs(module, x))


def assert_modes_differ_as_in_the_model(module, x):
    graph = trace(module)
    assert varies(graph.train(), x), "train() drops nothing"
    assert not varies(graph.eval(), x), "eval() drops something"
    assert gap(module.eval(), graph, x) <= FUNCTION


@pytest.mark.parametrize("name", NETS)
def test_the_graph_computes_what_the_model_computes(name):
    net, x = build(name)
    graph = trace(net)
    assert isinstance(graph, fx.GraphModule)
    assert gap(net, graph, x) <= FUNCTION


@given(random_nets())
def test_random_networks_keep_function_and_state(net):
    graph, x = trace(net), torch.randn(2, 3, 8, 8)
    assert gap(net, graph, x) <= FUNCTION
    a, b = net.state_dict(), graph.state_dict()
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", NETS)
def test_states_can_be_exchanged_with_the_model(name):
    net, x = build(name)
    graph = trace(net)
    other = randomise(NETS[name].build(), seed=9)
    graph.load_state_dict(other.state_dict())
    assert gap(other, graph, x) <= FUNCTION
    net.load_state_dict(graph.state_dict())
    assert gap(other, net, x) <= FUNCTION


def test_a_buffer_that_forward_computes_with_keeps_its_name():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 8)
            self.register_buffer("positions", torch.randn(12))

        def forward(self, x):
            return self.a(x) + self.positions[:8] * 2

    net, x = randomise(Table()), torch.randn(2, 6)
    graph = trace(net)
    assert set(graph.state_dict()) == set(net.state_dict())
    net.positions.mul_(3)
    graph.load_state_dict(net.state_dict())
    assert gap(net, graph, x) <= FUNCTION


def test_nothing_is_shared_with_the_model():
    net, x = build("residual")
    before, expected = copy.deepcopy(net.state_dict()), outputs(net, x)
    graph = trace(net)
    with torch.no_grad():
        for tensor in [*graph.parameters(), *graph.buffers()]:
            tensor.zero_()
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
    assert torch.equal(outputs(net, x), expected)
    assert {id(m) for m in net.modules()}.isdisjoint(id(m) for m in graph.modules())


class Counting(nn.Module):
    """Counts its calls, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        return self.linear(x)


def test_a_graph_with_the_models_own_parameters_has_buffers_of_its_own():
    net, x = Counting().eval(), torch.randn(2, 4)
    graph = trace_sharing(net)
    assert graph.linear.weight is net.linear.weight and not graph.training
    assert torch.equal(graph(x), net(x)) and graph.calls == net.calls == 1
    fxfuse.find_spaces(net, x)
    assert net.calls == 1


def test_the_model_keeps_its_modes_and_can_be_freed():
    net, _ = build("residual")
    net.train()
    net[0][1].eval()
    modes = [m.training for m in net.modules()]
    graph = trace(net)
    assert [m.training for m in net.modules()] == modes
    assert not hasattr(net, "training_mode")
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None and graph is not None


@pytest.mark.parametrize("training", [True, False])
def test_the_graph_is_in_the_models_mode(training):
    net = mlp(6, 8, 3).train(training)
    assert all(m.training == training for m in trace(net).modules())


def test_a_layer_that_was_frozen_in_eval_mode_stays_so():
    net = mlp(6, 8, 3, norm=True).train()
    net[1].eval()
    assert not trace(net).get_submodule("1").training


def test_frozen_parameters_stay_frozen():
    net = mlp(6, 8, 3)
    net[0].weight.requires_grad_(False)
    kept = dict(trace(net).named_parameters())
    assert not kept["0.weight"].requires_grad and kept["0.bias"].requires_grad


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    graph = trace(Tied())
    assert graph.get_submodule("a").weight is graph.get_submodule("b").weight


# --- modes ----------------------------------------------------------------------------------------


def test_functional_dropout_drops_in_training_only():
    net, x = randomise(Functional()), torch.randn(8, 6)
    assert_modes_differ_as_in_the_model(net, x)
    graph = trace(net)
    assert any(isinstance(m, Mode) for m in graph.modules())
    assert set(graph.state_dict()) == set(net.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_the_graph_does_not_depend_on_the_mode_at_tracing(training):
    net = randomise(Functional())
    net.train(training)
    assert_modes_differ_as_in_the_model(net, torch.randn(8, 6))


def test_the_graph_drops_what_the_model_drops():
    """With one seed, both draw the same masks."""
    net, x = randomise(Functional()).train(), torch.randn(8, 6)
    graph = trace(net)
    torch.manual_seed(1)
    expected = outputs(net, x)
    torch.manual_seed(1)
    assert torch.equal(outputs(graph, x), expected)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_drops_in_training_only(mode):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.drop = StochasticDepth(0.5, mode)

        def forward(self, x):
            x = self.a(x)
            return self.b(x + self.drop(torch.relu(x)))

    torch.manual_seed(4)  # the whole batch is kept or dropped: draws must differ once
    net, x = randomise(Deep()), torch.randn(16, 6)
    graph = trace(net).train()
    assert len({outputs(graph, x).sum().item() for _ in range(12)}) > 1
    assert not varies(graph.eval(), x)


class DropPath(nn.Module):
    """Drops samples in training, written so that both modes can be traced."""

    def forward(self, x):
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full_like(x[:, :1], 0.5))


class DropPathOfTheBatch(nn.Module):
    """The same with a mask of the batch's size, which tracing cannot follow in training mode."""

    def forward(self, x):
        if not self.training:
            return x
        return x * torch.empty(x.shape[0], 1, device=x.device).bernoulli_(0.5)


class DropPathOfAnyRank(nn.Module):
    """The same with arithmetic on the rank, as in `timm`."""

    def forward(self, x):
        if not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * x.new_empty(shape).bernoulli_(0.5)


class Dropping(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.a, self.b, self.path = nn.Linear(6, 8), nn.Linear(8, 3), path

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(self.path(x))


@pytest.mark.parametrize("path", [DropPath, DropPathOfTheBatch, DropPathOfAnyRank])
def test_a_module_that_branches_on_its_mode_follows_it(path):
    assert_modes_differ_as_in_the_model(randomise(Dropping(path())), torch.randn(16, 6))


def test_other_modules_are_traced_where_one_cannot_be_traced_in_training():
    class Both(Dropping):
        def forward(self, x):
            x = F.dropout(torch.relu(self.a(x)), 0.5, self.training)
            return self.b(self.path(x))

    net, x = randomise(Both(DropPathOfAnyRank())), torch.randn(16, 6)
    assert any(isinstance(m, Mode) for m in trace(net).modules())
    assert_modes_differ_as_in_the_model(net, x)


def test_a_block_that_calls_a_part_in_training_only_is_kept_whole():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.noise, self.a = nn.Dropout(0.5), nn.Linear(8, 8)

        def forward(self, x):
            return self.a(self.noise(x) if self.training else x)

    net = randomise(nn.Sequential(nn.Linear(6, 8), Inner(), nn.Linear(8, 3)))
    graph = trace(net)
    assert [n.target for n in graph.graph.nodes][1:-1] == ["0", "1", "2"]
    assert_modes_differ_as_in_the_model(net, torch.randn(16, 6))


def test_parts_of_one_class_without_tensors_are_found_together(monkeypatch):
    class Still(nn.Module):
        def forward(self, x):
            return x * 1

    traces = []
    monkeypatch.setattr(
        sys.modules["fxfuse.graph.trace"], "merge", lambda *a: traces.append(1) or merge(*a)
    )
    net = randomise(nn.Sequential(*(Dropping(p()) for p in [DropPath, Still] * 3)))
    net = nn.Sequential(*(nn.Sequential(m, nn.Linear(3, 6)) for m in net))
    graph = trace(net)
    called = {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
    assert {t for t in called if "path" in t} == {"0.0.path", "2.0.path", "4.0.path"}
    assert len(traces) == 2
    assert_modes_differ_as_in_the_model(net, torch.randn(16, 6))


@pytest.mark.parametrize("path", [DropPath, DropPathOfTheBatch, DropPathOfAnyRank])
def test_only_the_modules_that_branch_are_kept_whole(path):
    """The blocks around them are traced: what is inside must be able to align."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.path = nn.Linear(8, 8), nn.Linear(8, 8), path()

        def forward(self, x):
            y = self.b(F.dropout(torch.relu(self.a(x)), 0.5, self.training))
            return torch.relu(x + self.path(y))

    net = randomise(nn.Sequential(nn.Linear(6, 8), Inner(), Inner(), nn.Linear(8, 3)))
    graph = trace(net)
    called = {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
    assert {"1.a", "1.b", "1.path", "2.a", "2.b", "2.path"} <= called
    assert not {"1", "2"} & called
    assert_modes_differ_as_in_the_model(net, torch.randn(16, 6))


def test_batch_statistics_are_updated_in_training():
    net, x = randomise(Residual(3, 4)), torch.randn(4, 3, 8, 8)
    graph = trace(net)
    before = graph.get_buffer("a.1.running_mean").clone()
    outputs(graph.train(), x)
    assert not torch.equal(graph.get_buffer("a.1.running_mean"), before)
    assert gap(copy.deepcopy(net).train(), trace(net).train(), x) <= FUNCTION


class Auxiliary(nn.Module):
    """A head for training that refuses inputs smaller than its kernel."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 5)
        self.extra = nn.Sequential(nn.Conv2d(4, 6, 5), nn.BatchNorm2d(6), nn.Dropout(0.3))
        self.scale = nn.Parameter(torch.rand(6, 1, 1))

    def forward(self, x):
        x = self.a(x)
        aux = self.extra(x) * self.scale if self.training else None
        x = F.dropout(self.b(x).mean((2, 3)), 0.3, self.training)
        return (x, aux) if self.training else x


def test_a_head_for_training_runs_in_training():
    net, x = randomise(Auxiliary()), torch.randn(4, 3, 8, 8)
    graph = trace(net)
    assert gap(net, graph, x) == 0
    torch.manual_seed(1)
    expected = outputs(net.train(), x)
    torch.manual_seed(1)
    traced = outputs(graph.train(), x)
    assert type(traced) is tuple and all(map(torch.equal, expected, traced))


def test_modes_that_cannot_be_merged_leave_the_graph_of_eval_mode():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x):
            return self.a(x) if self.training else self.a(x).softmax(1)

    net, x = randomise(Normalised()), torch.randn(2, 6)
    assert gap(net, trace(net), x) <= FUNCTION


def test_constants_are_the_same_in_both_modes_and_not_in_the_state():
    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.plain = nn.Linear(6, 3), torch.rand(3)
            self.register_buffer("mask", torch.rand(3), persistent=False)

        def forward(self, x):
            x = self.a(x) * torch.tensor([1.0, 2.0, 3.0]) + self.plain * self.mask
            return F.dropout(x, 0.5, self.training)

    net, x = randomise(Scaling()), torch.randn(4, 6)
    assert_modes_differ_as_in_the_model(net, x)
    for graph in (trace(net), trace(trace(net)), copy.deepcopy(trace(net))):
        assert set(graph.state_dict()) == {"a.weight", "a.bias"}


def test_a_flag_may_be_positional_or_by_name_and_follows_its_own_module():
    class Inner(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training) + F.dropout(x, training=self.training, p=0.3)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.first, self.second = nn.Linear(6, 8), Inner(), Inner()

        def forward(self, x):
            return self.second(self.first(self.a(x)))

    graph, x = trace(randomise(Outer())), torch.randn(4, 6)
    assert varies(graph.train(), x)
    graph.eval()
    graph.get_submodule("first").train()
    assert varies(graph, x), "one module alone can be switched"
    graph.get_submodule("first").eval()
    assert not varies(graph, x)


# --- hooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "0", "0.0"], ids=["model", "block", "layer"])
def test_a_hook_that_changes_the_function_is_kept_or_refused(path):
    net, x = randomise(nn.Sequential(mlp(6, 8, 3), nn.Tanh())), torch.randn(2, 6)
    net.get_submodule(path).register_forward_hook(lambda module, inputs, out: 2 * out)
    try:
        graph = trace(net)
    except TraceError as error:
        assert "hook" in error.met
        return
    assert gap(net, graph, x) <= FUNCTION


def test_hooks_of_the_model_stay_and_do_not_run_while_tracing():
    net, seen = nn.Sequential(mlp(6, 8, 3), nn.Tanh()), []
    net[0].register_forward_hook(lambda module, inputs, out: seen.append(out))
    with contextlib.suppress(TraceError):
        trace(net)
    assert not any(isinstance(value, fx.Proxy) for value in seen)
    net(torch.randn(2, 6))
    assert len(seen) == 1


# --- refusals -------------------------------------------------------------------------------------


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_branch_on_values_is_refused_with_all_four_parts():
    with pytest.raises(TraceError) as caught:
        trace(Branch(), torch.randn(2, 6), "net 3")
    error = caught.value
    assert "traced symbolically: TraceError" in error.met and "recorded: " in error.met
    assert __file__ in error.where and "net 3 (Branch)" in error.where
    assert "values of tensors" in error.expected and "torch.fx.wrap" in error.do


def test_a_model_that_cannot_be_copied_is_refused():
    net = mlp(6, 8, 3)
    net.source = (i for i in range(3))
    with pytest.raises(TraceError, match="cannot be copied"):
        trace(net)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", ["0.weight", "1.running_var"])
def test_weights_and_statistics_that_are_not_finite_are_refused_by_name(value, path):
    net = mlp(6, 8, 3, norm=True)
    net.state_dict()[path].view(-1)[2] = value
    with pytest.raises(ModelError, match="1 values that are NaN or infinite") as caught:
        trace(net, name="net 3")
    assert caught.value.where == f"'{path}' of net 3"


@pytest.mark.parametrize("thing", ["resnet", None, torch.zeros(3), mlp])
def test_anything_but_a_module_is_refused(thing):
    with pytest.raises(ModelError, match="instead of a network"):
        trace(thing)


# --- examples and single runs ---------------------------------------------------------------------


def test_an_example_is_one_tensor_or_several():
    a, b = torch.zeros(1), torch.ones(2)
    assert as_example(a) == (a,)
    assert as_example((a, b)) == as_example([a, b]) == (a, b)


@pytest.mark.parametrize("thing", ["x", None, 3, {"x": torch.zeros(1)}, [torch.zeros(1), 3]])
def test_anything_else_is_refused_as_an_example(thing):
    with pytest.raises(DataError, match="an example of type"):
        as_example(thing)


def test_a_model_without_tensors_lives_on_the_cpu():
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")


def test_a_single_run_is_in_eval_mode_and_restores_the_modes():
    net = mlp(6, 8, 3, norm=True, act=lambda: nn.Dropout(0.9)).train()
    net[0].eval()
    modes, state = [m.training for m in net.modules()], copy.deepcopy(net.state_dict())
    x = torch.randn(4, 6)
    (first,), (second,) = run_once(net, (x,), "net"), run_once(net, (x,), "net")
    assert torch.equal(first, second) and not first.requires_grad
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(t, state[k]) for k, t in net.state_dict().items())


def test_a_refused_batch_names_network_and_shape_and_restores_the_modes():
    net = mlp(6, 8, 3).train()
    with pytest.raises(DataError, match=r"\(2, 5\)") as caught:
        run_once(net, (torch.zeros(2, 5),), "net 3")
    assert caught.value.where == "net 3" and net.training


def test_a_head_that_refuses_the_batch_is_cut_off():
    """Eval mode takes the batch. A head that cannot be run cannot be fused."""
    net, x = randomise(Auxiliary()), torch.randn(4, 3, 4, 4)
    graph = trace(net).train()
    graph.get_submodule("a.0").eval()
    modes = {path: m.training for path, m in graph.named_modules()}
    (output,) = run_once(graph, (x,), "net")
    assert torch.equal(output, outputs(net, x))
    lint(graph)
    assert {k.partition(".")[0] for k in graph.state_dict()} == {"a", "b"}
    assert all(m.training == modes[path] for path, m in graph.named_modules())
    assert gap(net, graph.eval(), x) == 0


def test_a_head_stays_where_the_whole_network_refuses_the_batch():
    graph = trace(randomise(Auxiliary()))
    with pytest.raises(DataError, match=r"\(4, 2, 8, 8\)"):
        run_once(graph, (torch.randn(4, 2, 8, 8),), "net")
    assert set(graph.state_dict()) == set(Auxiliary().state_dict())
    run_once(graph, (torch.randn(4, 3, 8, 8),), "net")
    assert "scale" in graph.state_dict()


def test_outputs_that_are_not_finite_are_refused():
    class Exploding(nn.Module):
        def forward(self, x):
            return {"out": x * 1e30 * 1e30}

    with pytest.raises(DataError, match="outputs that are NaN or infinite"):
        run_once(Exploding(), (torch.ones(1, 6),), "net")


def test_all_tensors_of_nested_outputs_are_returned():
    class Nested(nn.Module):
        def forward(self, x):
            return {"a": x, "b": (x + 1, [x.long()])}

    assert len(run_once(Nested(), (torch.zeros(2),), "net")) == 3


def test_tensors_of_data_classes_count():
    @dataclass
    class Result:
        main: torch.Tensor
        rest: object = None

    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert len(tensors_in([a, Result(b, {"x": Result(c)}), 3, Result])) == 3


def test_state_dictionaries_keep_the_version_of_their_class():
    class Numbered(nn.Sequential):
        _version = 7

    net = nn.Sequential(Numbered(nn.Linear(3, 4)), nn.ReLU())
    outer = Numbered(net, nn.Linear(4, 2))
    made = [trace(outer), fxfuse.permute(outer, torch.zeros(1, 3))]
    made += [fxfuse.fuse([outer, outer], torch.randn(8, 3))]
    for graph in made:
        parts = graph.state_dict()._metadata
        assert parts[""]["version"] == parts["0.0"]["version"] == 7 and parts["0"]["version"] == 1


def lazy():
    return nn.Sequential(nn.LazyLinear(3))


def on_meta():
    return nn.Sequential(nn.Linear(6, 3)).to("meta")


def in_inference_mode():
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(6, 3))


def sparse():
    net = nn.Sequential(nn.Linear(6, 3))
    net.register_buffer("near", torch.eye(4).to_sparse())
    return net


def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)))


def quantized():
    return torch.ao.nn.quantized.dynamic.Linear(6, 3)


UNREADABLE = {
    lazy: "lazy",
    on_meta: "meta device",
    in_inference_mode: "inference mode",
    sparse: "sparse",
    weight_normed: "parametrized",
    quantized: "not an ordinary tensor",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "problem"), UNREADABLE.items())
def test_state_that_is_no_plain_tensor_is_refused_by_every_function(make, problem):
    net, x = make(), torch.randn(8, 6)
    calls = [
        lambda: fxfuse.permute(net, x),
        lambda: fxfuse.inspect(net, x),
        lambda: fxfuse.find_spaces(net, x),
        lambda: fxfuse.fuse([nn.Sequential(nn.Linear(6, 3)), net], x),
        lambda: fxfuse.align([net, net], x),
        lambda: fxfuse.balance([net, net], x),
        lambda: fxfuse.net2wider(net, x),
        lambda: fxfuse.narrow(net, x),
        lambda: fxfuse.transfer(net, net, x),
    ]
    for call in calls:
        with pytest.raises(ModelError, match=problem):
            call()


def test_the_advice_on_parametrized_weights_works():
    net, x = weight_normed().eval(), torch.randn(8, 6)
    before = net(x)
    nn.utils.parametrize.remove_parametrizations(net[0], "weight")
    assert torch.allclose(fxfuse.fuse([net, net], x)(x), before, atol=1e-5)


def test_a_buffer_may_hold_infinities_but_a_weight_may_not():
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("mask", torch.full((5, 5), -math.inf).triu(1))

        def forward(self, x):
            x = self.first(x)
            scores = (x @ x.mT + self.mask).softmax(-1)
            return self.last(scores @ torch.relu(x))

    nets, x = [Causal().eval() for _ in range(2)], torch.randn(32, 5, 6)
    assert gap(nets[0], fxfuse.permute(nets[0], x, seed=1), x) < FUNCTION
    assert torch.equal(fxfuse.fuse(nets, x).mask, nets[0].mask)
    with torch.no_grad():
        nets[0].first.weight[0, 0] = math.inf
    with pytest.raises(ModelError, match="NaN or infinite"):
        fxfuse.permute(nets[0], x)


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_can_be_pickled(training):
    class Dropout(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training)

    net = nn.Sequential(nn.Linear(6, 8), Dropout(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    x = torch.randn(9, 6)
    network = fxfuse.permute(net.train(training), x)
    again = pickle.loads(pickle.dumps(network))
    assert again.training == training and list(again.state_dict()) == list(network.state_dict())
    for mode in (True, False):
        results = []
        for each in (network, again):
            torch.manual_seed(0)
            results.append(each.train(mode)(x))
        assert torch.equal(*results)


def test_what_a_module_adds_to_its_state_is_not_refused():
    class Counted(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    net, x = nn.Sequential(Counted(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(8, 6)
    assert gap(net, fxfuse.permute(net, x, seed=1), x) < FUNCTION


class Converts(nn.Module):
    """A layer in half precision that is handed what it takes: by its name, or by the layer's."""

    def __init__(self, named):
        super().__init__()
        self.a, self.b, self.named = nn.Linear(4, 5), nn.Linear(5, 3).bfloat16(), named

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(x.bfloat16() if self.named else x.to(self.b.weight.dtype)).float()


def test_half_precision_that_a_forward_asks_for_by_name_is_refused_by_name():
    x = torch.randn(6, 4)
    with pytest.raises(ModelError, match="converts values to half precision") as caught:
        fxfuse.fuse([Converts(True), Converts(True)], x)
    assert "x.to(layer.weight.dtype)" in caught.value.do
    fused = fxfuse.fuse([Converts(False), Converts(False)], x)
    assert fused.get_submodule("b").weight.dtype == torch.bfloat16 and fused(x).isfinite().all()
