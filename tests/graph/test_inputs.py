"""Inputs as people have them: by place, by name, with labels behind or beside them."""

from collections import UserDict

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.errors import DataError
from fxfuse.graph.inputs import Inputs
from fxfuse.graph.trace import trace
from tests.support.nets import randomise
from tests.support.tolerances import FUNCTION


class Two(nn.Module):
    """Adds what it makes of two inputs; a third is optional, and a fourth asks for a loss."""

    def __init__(self, width=8):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, width), nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, left, right, scale=None, labels=None, flag=False):
        h = torch.relu(self.a(left) + self.b(right))
        if scale is not None:
            h = h * scale
        h = self.c(h)
        if labels is not None:
            return (h - labels).square().mean()
        return h if not flag else h * 2


LEFT, RIGHT, SCALE = torch.randn(20, 6), torch.randn(20, 4), torch.rand(20, 1)
LABELS = torch.randn(20, 3)
BATCHES = {
    "a tuple": (LEFT, RIGHT),
    "tuples with labels": [(LEFT, RIGHT, LABELS)],
    "lists": [[LEFT, RIGHT]],
    "nested": [((LEFT, RIGHT), LABELS)],
    "a mapping": {"left": LEFT, "right": RIGHT, "labels": LABELS},
    "mappings": [{"right": RIGHT, "left": LEFT, "index": LABELS}],
    "a mapping that is no dict": [UserDict(left=LEFT, right=RIGHT)],
}


@pytest.mark.parametrize("name", BATCHES)
def test_networks_are_fused_on_data_of_every_form(name):
    nets = [randomise(Two(8), seed=1), randomise(Two(6), seed=2)]
    fused = fxfuse.fuse(nets, BATCHES[name])
    alone = fxfuse.fuse(nets, [((LEFT, RIGHT),)])
    with torch.no_grad():
        error = (fused(left=LEFT, right=RIGHT) - alone(left=LEFT, right=RIGHT)).abs().max()
    assert error <= 1e-3
    assert len(fxfuse.align(nets, BATCHES[name]).names) == 2


@pytest.mark.parametrize(
    "example",
    [
        (LEFT, RIGHT),
        {"left": LEFT, "right": RIGHT, "labels": LABELS},
        UserDict(right=RIGHT, left=LEFT),
    ],
)
def test_examples_are_taken_by_place_and_by_name(example):
    net = randomise(Two())
    assert fxfuse.find_spaces(net, example).free_units == 8
    moved = fxfuse.permute(net, example, seed=1)
    with torch.no_grad():
        assert torch.allclose(moved(left=LEFT, right=RIGHT), net(LEFT, RIGHT), atol=FUNCTION)
    fxfuse.verify(net, moved, example)
    assert "a" in str(fxfuse.inspect(net, example))


def test_optional_arguments_that_are_given_are_inputs_and_others_have_their_defaults():
    net = randomise(Two())
    graph = trace(net, {"left": LEFT, "right": RIGHT, "scale": SCALE})
    names = [n.target for n in graph.graph.nodes if n.op == "placeholder"]
    assert names == ["left", "right", "scale"]
    assert torch.allclose(graph(LEFT, RIGHT, SCALE), net(LEFT, RIGHT, SCALE))
    graph = trace(net, (LEFT, RIGHT))
    assert torch.allclose(graph(LEFT, RIGHT), net(LEFT, RIGHT))


def test_without_an_example_arguments_with_defaults_have_them():
    net = randomise(Two())
    assert torch.allclose(trace(net)(LEFT, RIGHT), net(LEFT, RIGHT))


def test_networks_may_take_different_arguments_of_one_mapping():
    class One(Two):
        def forward(self, left):
            return self.c(torch.relu(self.a(left)))

    one = randomise(One())
    assert Inputs.of(one, {"left": LEFT, "right": RIGHT}).names == ("left",)
    graph = trace(one, {"left": LEFT})
    assert torch.allclose(graph(left=LEFT), one(LEFT))


def test_a_forward_of_any_number_of_inputs_is_traced_with_as_many():
    class Sum(nn.Module):
        def forward(self, *parts):
            return sum(parts[1:], parts[0])

    graph = trace(Sum(), (LEFT, LEFT, LEFT))
    assert torch.allclose(graph(LEFT, LEFT, LEFT), 3 * LEFT)


def test_a_keyword_of_forward_is_an_input():
    class Named(Two):
        def forward(self, left, *, right):
            return super().forward(left, right)

    net = randomise(Named())
    moved = fxfuse.permute(net, {"left": LEFT, "right": RIGHT})
    with torch.no_grad():
        assert torch.allclose(moved(LEFT, RIGHT), net(LEFT, right=RIGHT), atol=FUNCTION)


@pytest.mark.parametrize("example", [3, "text", [1.0], {"left": 3}])
def test_other_examples_are_refused(example):
    with pytest.raises(DataError, match="an example of type|refuses a batch"):
        fxfuse.find_spaces(Two(), example)
