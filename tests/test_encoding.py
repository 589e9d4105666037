"""What a network is written down as, and what is refused; that it comes back is in test_saving."""

import json

import numpy as np
import pytest
import torch
from nets import mlp
from torch import fx, nn

from fxfuse.encoding import encode, memory_order
from fxfuse.errors import SaveError


def test_a_description_is_plain_json_and_the_state_has_the_networks_names():
    net = fx.symbolic_trace(mlp(4, 5, 3, norm=True))
    description, state = encode(net)
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    assert list(state) == list(net.state_dict())
    kinds = [m["kind"] for m in description["modules"]]
    assert kinds[-1] == "torch.fx.GraphModule" and "torch.nn.modules.linear.Linear" in kinds


def test_what_is_held_twice_is_written_once():
    net = mlp(4, 4, 4, 3)
    net[2].weight = net[0].weight
    net[3] = net[1]
    description, state = encode(fx.symbolic_trace(net))
    assert len(description["tensors"]) == len(state) - 1
    assert len(description["modules"]) == 5  # three linear layers, one activation, the network


class Own(nn.Module):
    def forward(self, x):
        return x


def own_function(x):
    return x


class Keeper(fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return True


def keeping(net):
    """A graph in which every part stays a module of its own."""
    return fx.GraphModule(net, Keeper().trace(net))


def calling(function):
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"),)))
    return fx.GraphModule(nn.Module(), graph)


def calling_method(name):
    graph = fx.Graph()
    graph.output(graph.call_method(name, (graph.placeholder("x"),)))
    return fx.GraphModule(nn.Module(), graph)


def with_setting(value):
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].extra = value
    return fx.symbolic_trace(net)


def hooked():
    net = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    net.get_submodule("0").register_forward_hook(print)
    return net


def looking_at(name):
    graph = fx.Graph()
    graph.output(graph.call_function(getattr, (graph.placeholder("x"), name)))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    ("make", "met", "where"),
    [
        (lambda: keeping(nn.Sequential(Own())), "class Own", "0"),
        (lambda: calling(own_function), "own_function", "own_function"),
        (lambda: calling(torch.load), "torch.serialization.load", "load"),
        (lambda: calling_method("apply_"), "'apply_'", "apply_"),
        (lambda: looking_at("grad_fn"), "'grad_fn'", "getattr"),
        (lambda: with_setting(own_function), "own_function", "0.extra"),
        (lambda: with_setting(np.ones(2)), "ndarray", "0.extra"),
        (hooked, "hooks", "0"),
        (lambda: with_setting(torch.ones(2).to_sparse()), "sparse", "0.extra"),
        (lambda: with_setting(torch.ones(2, device="meta")), "without data", "0.extra"),
    ],
)
def test_what_only_code_can_rebuild_is_refused_with_its_place(make, met, where):
    with pytest.raises(SaveError) as caught:
        encode(make())
    assert met in caught.value.met and where in caught.value.where
    assert "trace through it" in caught.value.do


def test_axes_in_memory_are_told_from_the_outermost():
    image = torch.ones(2, 3, 4, 5)
    assert memory_order(image) == [0, 1, 2, 3]
    assert memory_order(image.to(memory_format=torch.channels_last)) == [0, 2, 3, 1]
    assert memory_order(torch.ones(2, 3).T) == [1, 0]
