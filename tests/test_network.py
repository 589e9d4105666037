import pytest
import torch
from nets import Functional, build, conv, mlp, randomise
from torch import nn

from fxfuse.network import Network
from fxfuse.tracing import trace


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


def test_a_network_knows_its_ledger_and_its_spaces():
    net, x = build("residual")
    found = network(net, x)
    assert found.book.shapes["add"] == (2, 6, 8, 8)
    assert [s.size for s in found.spaces] == [6, 6, 6, 8, 8]
    assert found.name == "net" and found.example == (x,)


def test_a_norm_only_normalises(layer):
    assert [layer.is_norm(node(layer, f"_{i}")) for i in range(6)] == [0, 1, 0, 0, 1, 0]


def test_an_activation_is_one_function_of_each_value(layer):
    assert [layer.is_activation(node(layer, f"_{i}")) for i in range(6)] == [0, 0, 1, 0, 0, 0]


def test_an_idle_node_does_nothing_in_eval_mode(layer):
    assert [layer.is_idle(node(layer, f"_{i}")) for i in range(6)] == [0, 0, 0, 1, 0, 1]
    placeholder = next(iter(layer.module.graph.nodes))
    assert not layer.is_idle(placeholder)


def test_adding_two_values_or_a_parameter_is_no_activation():
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

        def forward(self, x):
            y = self.a(x)
            return (y + x) * self.b * 2

    found = network(Adding(), torch.randn(2, 6))
    assert not found.is_activation(node(found, "add"))
    assert not found.is_activation(node(found, "mul"))
    assert found.is_activation(node(found, "mul_1"))


def test_only_what_is_computed_from_the_inputs_carries_data():
    found = network(randomise(Functional()), torch.randn(2, 6))
    carries = {n.name: found.carries_data(n) for n in found.module.graph.nodes}
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

    found = network(Sized(), torch.randn(2, 6))
    assert [n.name for n in found.inputs_of(node(found, "mul"))] == ["x"]
    assert [n.name for n in found.inputs_of(node(found, "view"))] == ["mul"]


def test_steps_and_rules_take_nodes_and_names():
    found = network(mlp(6, 8, 3), torch.randn(2, 6))
    relu = node(found, "_1")
    assert found.steps(relu) == found.steps("_1") == [("pointwise", "relu")]
    assert found.rules(relu) == {"pointwise"} and found.rules("_0") == {"matmul"}
    assert found.steps("no such node") == []
