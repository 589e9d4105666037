"""Networks: what is asked of their nodes."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import presets
from fxfuse.graph.trace import trace
from fxfuse.spaces._labels import Step
from fxfuse.spaces._solve import spaces_of
from fxfuse.spaces.network import OPEN, Network, label_network
from tests.support.nets import NETS, Functional, Residual, build, conv, gap, mlp, randomise
from tests.support.tolerances import FUNCTION


def labelled(net, *x):
    return label_network(trace(net), x)


@pytest.mark.parametrize("name", NETS)
def test_the_network_is_left_as_it_was(name):
    net, x = build(name)
    graph = trace(net)
    graph.train()
    next(m for m in graph.modules() if m is not graph).eval()
    modes = [m.training for m in graph.modules()]
    before = copy.deepcopy(graph.state_dict())
    label_network(graph, (x,))
    assert [m.training for m in graph.modules()] == modes
    assert all(torch.equal(t, before[k]) for k, t in graph.state_dict().items())
    assert all(p.grad is None for p in graph.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_the_fast_path_of_attention_is_switched_back(fails):
    graph = trace(mlp(6, 8, 3))
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        label_network(graph, (torch.zeros(2, 5 if fails else 6),))
    except RuntimeError:
        assert fails
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_shapes_and_operators_are_written_down_by_node():
    ledger = labelled(Residual(3, 4), torch.zeros(2, 3, 8, 8))
    assert ledger.shapes["a_0"] == ledger.shapes["add"] == (2, 4, 8, 8)
    assert [step.name for step in ledger.steps["a_0"]] == ["convolution"]
    assert ledger.steps["add"] == [Step("add")]
    assert "output" not in ledger.shapes


def test_weights_are_contracted_and_tensors_touched():
    ledger = labelled(Residual(3, 4), torch.zeros(2, 3, 8, 8))
    assert ledger.weights == {
        "a_0": ["a.0.weight"],
        "b_0": ["b.0.weight"],
        "skip_0": ["skip.0.weight"],
    }
    assert set(ledger.tensors["a_1"]) == {
        "a.1.weight",
        "a.1.bias",
        "a.1.running_mean",
        "a.1.running_var",
    }


def test_the_tensors_of_norms_are_written_down_by_role():
    ledger = labelled(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, eps=0.5)), torch.zeros(2, 4))
    assert ledger.norms == {
        "_1": {
            "eps": 0.5,
            "weight": "1.weight",
            "bias": "1.bias",
            "running_mean": "1.running_mean",
            "running_var": "1.running_var",
        }
    }


class Watchful(nn.Module):
    """A part that no graph shows, since it looks at values; there is a norm in it."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return x if float(x.sum()) > 1e9 else self.norm(self.first(x).relu())


def test_a_part_kept_whole_is_no_norm_though_there_is_one_inside():
    net = randomise(nn.Sequential(nn.Linear(6, 8), Watchful(), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    network = Network.of("net", trace(net, x), (x,))
    assert list(network.norms) == ["_2"]
    for method in (presets.best, presets.git_rebasin):
        assert gap(net, method([net, fxfuse.permute(net, x, seed=1)], x), x) < FUNCTION


def test_the_labels_of_a_node_are_written_down_by_axis():
    ledger = labelled(mlp(6, 8, 3), torch.zeros(2, 6))
    ((dim, labels),) = ledger.outputs["_0"]
    assert (dim, len(labels)) == (1, 8)
    assert ledger.outputs["_1"][0][1].tolist() == labels.tolist()


def test_outputs_and_operators_without_a_rule_are_frozen_by_name():
    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 8)

        def forward(self, x):
            return torch.renorm(self.a(x), 2, 0, 1.0)

    ledger = labelled(Clipped(), torch.zeros(2, 6))
    without_rule = {node for _, node, reason in ledger.frozen if reason.startswith("no rule")}
    assert without_rule == {"renorm"}
    assert "no rule for aten.renorm.default" in {reason for _, _, reason in ledger.frozen}
    fixed = labelled(mlp(6, 8, 3), torch.zeros(2, 6)).frozen
    assert not any(reason.startswith("no rule") for _, _, reason in fixed)


class Auxiliary(nn.Module):
    """Two outputs in training mode, in an object of their own, one in eval mode."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.extra = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return Result(self.b(x), self.extra(x)) if self.training else self.b(x)


@dataclass
class Result:
    main: torch.Tensor
    extra: torch.Tensor


def test_outputs_of_both_modes_are_frozen():
    ledger = labelled(randomise(Auxiliary()), torch.randn(2, 6))
    fixed = [set(labels) for labels, _, reason in ledger.frozen if "output" in reason]
    by_tensor = {t: set(labels.tolist()) for (t, d), labels in ledger.axes.items() if d == 0}
    assert by_tensor["b.weight"] in fixed and by_tensor["extra.weight"] in fixed
    assert by_tensor["a.weight"] not in fixed
    assert ledger.weights["extra"] == ["extra.weight"]


def test_a_value_of_several_tensors_has_an_empty_shape():
    ledger = labelled(nn.Sequential(nn.Linear(6, 8), Halves()), torch.zeros(2, 6))
    assert ledger.shapes["chunk"] == ()
    assert ledger.shapes["getitem"] == (2, 4)


class Halves(nn.Module):
    def forward(self, x):
        halves = x.chunk(2, 1)
        return halves[0] * halves[1]


def test_a_run_needs_no_gradients_and_leaves_none():
    net = randomise(mlp(6, 8, 3))
    x = torch.randn(2, 6, requires_grad=True)
    label_network(trace(net), (x,))
    assert x.grad is None


def test_open_outputs_are_free_if_they_lie_along_one_axis():
    graph = trace(mlp(6, 5, 4))
    assert [s.size for s in spaces_of(label_network(graph, (torch.randn(2, 6),)))] == [5]
    graph.graph.output_node().meta[OPEN] = True
    assert [s.size for s in spaces_of(label_network(graph, (torch.randn(2, 6),)))] == [5, 4]
    graph = trace(nn.Sequential(mlp(6, 5, 4), nn.Unflatten(1, (2, 2))))
    graph.graph.output_node().meta[OPEN] = True
    ledger = label_network(graph, (torch.randn(2, 6),))
    assert [s.size for s in spaces_of(ledger)] == [5]
    assert any("several axes" in reason for _, _, reason in ledger.frozen)


def test_open_inputs_have_units():
    graph = trace(mlp(6, 5, 4))
    source = next(iter(graph.graph.nodes))
    source.meta[OPEN] = 1
    spaces = spaces_of(label_network(graph, (torch.randn(2, 6),)))
    (own,) = [s for s in spaces if any(a.tensor == source.name for a in s.features)]
    assert own.size == 6 and [(a.tensor, a.dim, a.reads) for a in own.axes] == [
        ("0.weight", 1, True)
    ]


def network(net, *x):
    return Network.of("net", trace(net), x)


def node(net, name):
    return next(n for n in net.module.graph.nodes if n.name == name)


@pytest.fixture
def layer():
    parts = nn.Sequential(*conv(3, 4), nn.Dropout(0.5), nn.GroupNorm(2, 4), nn.Identity())
    return network(
        randomise(nn.Sequential(*parts, nn.Flatten(), nn.Linear(256, 3))), torch.randn(2, 3, 8, 8)
    )


def test_a_network_knows_its_nodes_and_its_spaces():
    model, x = build("residual")
    net = network(model, x)
    assert net.shapes["add"] == (2, 6, 8, 8)
    assert net.features["add"] == (1,) and net.feature_axis("add") == 1
    assert net.feature_axis("no such node") is None
    assert [s.size for s in net.spaces] == [6, 6, 6, 8, 8]
    assert net.name == "net" and net.example == (x,)


def test_a_norm_only_normalises(layer):
    assert [layer.is_norm(node(layer, f"_{i}")) for i in range(6)] == [0, 1, 0, 0, 1, 0]


def test_an_activation_is_one_function_of_each_value(layer):
    assert [layer.is_activation(node(layer, f"_{i}")) for i in range(6)] == [0, 0, 1, 0, 0, 0]


def test_an_idle_node_does_nothing_in_eval_mode(layer):
    assert [layer.is_idle(node(layer, f"_{i}")) for i in range(6)] == [0, 0, 0, 1, 0, 1]
    placeholder = next(iter(layer.module.graph.nodes))
    assert not layer.is_idle(placeholder)


def test_adding_values_or_scaling_by_a_parameter_is_not_an_activation():
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

        def forward(self, x):
            y = self.a(x)
            return (y + x) * self.b * 2

    net = network(Adding(), torch.randn(2, 6))
    assert not net.is_activation(node(net, "add"))
    assert not net.is_activation(node(net, "mul"))
    assert net.is_activation(node(net, "mul_1"))


def test_only_values_computed_from_the_inputs_are_data():
    net = network(randomise(Functional()), torch.randn(2, 6))
    carries = {n.name: net.carries_data(n) for n in net.module.graph.nodes}
    assert carries.pop("x") and not carries.pop("output")
    flags = {name for name in carries if "training_mode" in name}
    assert len(flags) == 2 and not any(carries[f] for f in flags)
    assert all(on for name, on in carries.items() if name not in flags)


def test_inputs_leave_out_parameters_flags_and_sizes():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return (x * self.a).view(x.shape[0], 2, 3)

    net = network(Sized(), torch.randn(2, 6))
    assert [n.name for n in net.inputs_of(node(net, "mul"))] == ["x"]
    assert [n.name for n in net.inputs_of(node(net, "view"))] == ["mul"]


def test_steps_are_asked_for_by_node_or_name():
    net = network(mlp(6, 8, 3), torch.randn(2, 6))
    relu = node(net, "_1")
    assert net.steps(relu) == net.steps("_1") == [Step("relu")]
    assert net.contractions("_0") == net.steps("_0") != [] == net.contractions("_1")
    assert net.steps("no such node") == []


class Function(nn.Module):
    """A network that applies a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@torch.fx.wrap
def squared_and_added(x):
    return x * x + x


QUESTIONS = [
    *("adds", "multiplies", "commutes", "joins", "moves_or_resamples", "is_elementwise"),
    *("is_norm", "normalises_across_units", "is_activation", "is_idle"),
]


@pytest.mark.parametrize(
    ("step", "properties"),
    [
        (lambda x: x + x, "adds commutes is_elementwise is_activation"),
        (lambda x: x.add_(x), "adds commutes is_elementwise is_activation"),
        (lambda x: x * x, "multiplies commutes is_elementwise is_activation"),
        (lambda x: x - 1, "is_elementwise is_activation"),
        (lambda x: torch.maximum(x, x), "commutes is_elementwise is_activation"),
        (lambda x: x.erf(), "is_elementwise is_activation"),  # has no row
        (lambda x: torch.cat([x, x]), "joins"),
        (lambda x: torch.stack([x, x]), "joins"),
        (lambda x: x.permute(0, 2, 1), "moves_or_resamples"),
        (lambda x: nn.functional.avg_pool1d(x, 2), "moves_or_resamples"),
        (lambda x: nn.functional.layer_norm(x, [5]), "is_norm normalises_across_units"),
        (lambda x: nn.functional.group_norm(x, 2), "is_norm normalises_across_units"),
        (lambda x: x.softmax(1), ""),
        (lambda x: x.flatten(1), "is_idle"),
        (lambda x: x.contiguous(), "is_idle"),
        (lambda x: torch.matmul(x.mT, x), ""),
    ],
)
def test_what_a_node_does_is_asked_by_name(step, properties):
    net = network(Function(step), torch.randn(2, 4, 5))
    last = net.module.graph.output_node().all_input_nodes[0]
    assert {q for q in QUESTIONS if getattr(net, q)(last)} == {*properties.split()}


def test_a_norm_of_each_unit_by_itself_does_not_normalise_across_units():
    net = network(nn.Sequential(nn.BatchNorm1d(4)), torch.randn(2, 4, 5))
    norm = node(net, "_0")
    assert net.is_norm(norm) and not net.normalises_across_units(norm)


def test_a_node_that_does_two_things_does_neither_only():
    net = network(Function(lambda x: squared_and_added(x)), torch.randn(2, 6))
    both = node(net, "squared_and_added")
    assert [s.name for s in net.steps(both)] == ["mul", "add"]
    assert net.commutes(both) and not net.adds(both) and not net.multiplies(both)


def test_the_geometry_of_a_convolution_is_read_by_name():
    net = network(nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, groups=2)), torch.randn(2, 4, 5, 5))
    (step,) = net.contractions("_0")
    assert (step.geometry.kernel, step.geometry.stride) == ((3, 3), (2, 2))
    assert step.geometry.grouping == "grouped" and step.word == "conv3x3 grouped"
    assert network(mlp(6, 8, 3), torch.randn(2, 6)).contractions("_0")[0].geometry is None
