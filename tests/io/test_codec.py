"""What a network is written down as, what is refused, and descriptions that were tampered with.

The latter give a network or an error, and never run code of their own. That whole networks come
back is in test_save.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional

from fxfuse.errors import CheckpointError, SaveError
from fxfuse.graph.trace import trace
from fxfuse.io._codec import decode, encode
from tests.support.json_values import JSON, changed, places
from tests.support.nets import mlp, randomise


def test_a_description_is_plain_json_and_the_state_has_the_networks_names():
    net = fx.symbolic_trace(mlp(4, 5, 3, norm=True))
    description, state = encode(net)
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    assert list(state) == list(net.state_dict())
    kinds = [m["kind"] for m in description["modules"]]
    assert kinds[-1] == "torch.fx.GraphModule" and "torch.nn.modules.linear.Linear" in kinds


def test_tied_tensors_and_shared_modules_are_written_once():
    net = mlp(4, 4, 4, 3)
    net[2].weight = net[0].weight
    net[3] = net[1]
    description, state = encode(fx.symbolic_trace(net))
    assert len(description["tensors"]) == len(state) - 1
    assert len(description["modules"]) == 5  # three linear layers, one activation, the network


class Custom(nn.Module):
    def forward(self, x):
        return x


def custom_function(x):
    return x


class LeafTracer(fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return True


def with_leaves(net):
    """A graph in which every part stays a module of its own."""
    return fx.GraphModule(net, LeafTracer().trace(net))


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


def reading_attribute(name):
    graph = fx.Graph()
    graph.output(graph.call_function(getattr, (graph.placeholder("x"), name)))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    ("make", "met", "where"),
    [
        (lambda: with_leaves(nn.Sequential(Custom())), "class Custom", "0"),
        (lambda: calling(custom_function), "custom_function", "custom_function"),
        (lambda: calling(torch.load), "torch.serialization.load", "load"),
        (lambda: calling_method("apply_"), "'apply_'", "apply_"),
        (lambda: reading_attribute("grad_fn"), "'grad_fn'", "getattr"),
        (lambda: with_setting(custom_function), "custom_function", "0.extra"),
        (lambda: with_setting(np.ones(2)), "ndarray", "0.extra"),
        (hooked, "hooks", "0"),
        (lambda: with_setting(torch.ones(2).to_sparse()), "sparse", "0.extra"),
        (lambda: with_setting(torch.ones(2, device="meta")), "without data", "0.extra"),
    ],
)
def test_parts_that_only_code_can_rebuild_are_refused_with_their_place(make, met, where):
    with pytest.raises(SaveError) as caught:
        encode(make())
    assert met in caught.value.met and where in caught.value.where
    assert "trace through it" in caught.value.do


class Everything(nn.Module):
    """A value of every kind in the graph."""

    def __init__(self):
        super().__init__()
        self.layer, self.inner = nn.Linear(4, 4), nn.Linear(6, 2)
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, x):
        y = self.layer(x)[..., 0:4].to(torch.float32) * self.scale
        y = torch.clamp(y, float("-inf"), 3.0).view(x.shape[0], 4)
        y = y + torch.zeros((1, 4), device=torch.device("cpu"))
        z = functional.dropout(torch.cat([y, y[:, :2]], dim=1), 0.5, self.training)
        return {"a": self.inner(z), "b": (y, None, True)}


NET = trace(randomise(Everything()))
DESCRIPTION, STATE = encode(NET)
PLACES = list(places(DESCRIPTION))


def value_at(path):
    value = DESCRIPTION
    for key in path:
        value = value[key]
    return value


def decoded(description):
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    return decode(json.loads(json.dumps(description)), state, "f")


def test_the_network_comes_back():
    again, x = decoded(DESCRIPTION), torch.randn(3, 4)
    a, b = NET(x), again(x)
    assert torch.equal(a["a"], b["a"]) and torch.equal(a["b"][0], b["b"][0])
    assert b["b"][1:] == (None, True) and again.code == NET.code


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(max_examples=120)
@given(st.sampled_from(PLACES), JSON)
def test_any_value_in_any_place_is_accepted_or_refused(path, value):
    try:
        assert isinstance(decoded(changed(DESCRIPTION, path, value)), fx.GraphModule)
    except CheckpointError as error:
        assert error.where.startswith("f")


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(max_examples=200)
@given(st.sampled_from(PLACES), st.sampled_from(PLACES))
def test_swapped_parts_are_accepted_or_refused(one, other):
    new = changed(DESCRIPTION, one, copy.deepcopy(value_at(other)))
    try:
        decoded(new)
    except CheckpointError:
        return


ATTACKS = [
    "x=open('executed', 'w')",
    "dim=open('executed', 'w'), out",
    "*x=open('executed', 'w')",
    "a\"); open('executed', 'w') #",
    'a\'); open("executed", "w") #',
    "x): open('executed', 'w')\n    return 0 #",
    "layer\n    open('executed', 'w')",
    "__class__.__init__.__globals__",
    "builtins.open",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_texts_with_code_in_them_are_not_run(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    for path in [p for p in PLACES if isinstance(value_at(p), str)]:
        try:
            decoded(changed(DESCRIPTION, path, attack))(torch.randn(2, 4))
        except Exception:  # refused, or a network that computes nothing
            assert not Path("executed").exists()
    for path in [p for p in PLACES if isinstance(value_at(p), dict)]:
        old = value_at(path)
        for key in list(old):
            renamed = {attack if k == key else k: v for k, v in old.items()}
            try:
                decoded(changed(DESCRIPTION, path, renamed))(torch.randn(2, 4))
            except Exception:
                assert not Path("executed").exists()
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["layer", "inner", "scale", "weight"])
def test_a_part_whose_name_would_be_code_is_refused(tmp_path, monkeypatch, name):
    """It is renamed everywhere, so that nothing is wrong but the letters of the name."""
    monkeypatch.chdir(tmp_path)
    for quote in "\"'":
        attack = f"inner{quote}), open({quote}executed{quote}, {quote}w{quote}), str({quote}a"
        text = json.dumps(DESCRIPTION)
        for old in (f'"{name}"', f'"{name}.', f'.{name}"', f".{name}."):
            text = text.replace(old, old.replace(name, json.dumps(attack)[1:-1]))
        assert text.count("executed") > 1
        with pytest.raises(CheckpointError):
            state = {k.replace(name, attack): v for k, v in STATE.items()}
            decode(json.loads(text), state, "f")(torch.randn(2, 4))
        assert not Path("executed").exists()


def node_of(op):
    module = len(DESCRIPTION["modules"]) - 1
    nodes = DESCRIPTION["modules"][module]["nodes"]
    return ("modules", module, "nodes", next(i for i, n in enumerate(nodes) if n["op"] == op))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*node_of("call_function"), "target"), "os.system", "function that is not allowed"),
        ((*node_of("call_function"), "target"), "torch.load", "function that is not allowed"),
        ((*node_of("call_method"), "target"), "apply_", "call_method of 'apply_'"),
        ((*node_of("call_module"), "target"), "no.such", "call_module of 'no.such'"),
        ((*node_of("call_module"), "target"), "layer.weight", "call_module of"),
        ((*node_of("get_attr"), "target"), "__class__", "get_attr of '__class__'"),
        ((*node_of("placeholder"), "target"), "x=1", "placeholder of"),
        ((*node_of("placeholder"), "name"), "a b", "a node 'a b'"),
        ((*node_of("output"), "op"), "exec", "a exec of"),
        (("modules", 0, "kind"), "subprocess.Popen", "class that is not allowed"),
        (("modules", 0, "settings"), {"__class__": 1}, "setting that is not allowed"),
        (("modules", 0, "settings"), {"_forward_hooks": 1}, "setting that is not allowed"),
        (("modules", 0, "parameters", "weight"), 99, "no entry 99"),
        (("modules", 0, "hidden"), ["weight"], "hidden buffers"),
        (("modules", len(DESCRIPTION["modules"]) - 1, "parts", "layer"), -1, "no entry -1"),
        (("tensors", 0, "parameter"), False, "parameters that are plain tensors: ['weight']"),
        (("tensors", 0, "key"), "gone", "gone"),
        (("tensors", 0, "order"), [0, 0], "not a permutation"),
        (("modules",), [], "IndexError"),
        (("modules",), DESCRIPTION["modules"][:1], "where the network should be"),
    ],
)
def test_the_error_names_what_is_not_allowed(path, value, message):
    with pytest.raises(CheckpointError) as caught:
        decoded(changed(DESCRIPTION, path, value))
    assert message in caught.value.met and "fxfuse.save" in caught.value.expected


def test_reading_a_hidden_attribute_is_refused():
    place = ("modules", len(DESCRIPTION["modules"]) - 1, "nodes")
    nodes = value_at(place)
    i = next(i for i, n in enumerate(nodes) if n["target"] == "builtins.getattr")
    for name in ("__class__", "grad_fn", "apply_", 3):
        args = [nodes[i]["args"][0], name]
        with pytest.raises(CheckpointError, match="an attribute that may not be read"):
            decoded(changed(DESCRIPTION, (*place, i, "args"), args))


def test_tensors_that_belong_to_no_part_of_the_network_are_refused():
    with pytest.raises(CheckpointError, match="not those of the network"):
        decode(DESCRIPTION, STATE | {"more": torch.ones(1)}, "f")
