"""Putting heads behind a trunk: what is one linear layer, and what mixes several."""

import pytest
import torch
from nets import mlp, outputs, randomise
from torch import nn

from fxfuse.attaching import give_back, mixed, one_layer, single_layer
from fxfuse.interpreter import OPEN
from fxfuse.tracing import trace


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
