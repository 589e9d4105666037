"""Graphs keep constants out of their state, however they are made, copied and stored."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn

from fxfuse.graph.module import Graph


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("table", torch.ones(3), persistent=False)
        self.inner = nn.Module()
        self.inner.register_buffer("mask", torch.ones(3), persistent=False)
        self.inner.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        return self.layer(x) * self.table * self.inner.mask * self.inner.scale


@pytest.mark.parametrize(
    "again",
    [
        lambda graph: graph,
        copy.deepcopy,
        lambda graph: pickle.loads(pickle.dumps(graph)),
        lambda graph: Graph(graph, graph.graph, type(graph).__name__),
    ],
)
def test_buffers_that_are_not_persistent_stay_so_and_the_name_stays(again):
    net, x = Scaled(), torch.randn(2, 3)
    graph = again(Graph(net, fx.Tracer().trace(net), "Scaled"))
    assert set(graph.state_dict()) == set(net.state_dict())
    torch.testing.assert_close(graph(x), net(x))
    assert type(graph).__name__ == "Scaled"
