"""The labelled run: what it writes down of each node, and what it fixes."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fxfuse.graph.trace import trace
from fxfuse.spaces._labelling import OPEN, label_network
from fxfuse.spaces._ledger import Step
from fxfuse.spaces._solve import spaces_of
from tests.support.nets import NETS, Residual, build, mlp, randomise


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
