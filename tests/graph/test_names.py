import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.graph.names import in_graph, in_model
from tests.support.tolerances import FUNCTION

# What a GraphModule has itself, keywords, and names that are neither.
NAMES = [
    "code",
    "graph",
    "meta",
    "recompile",
    "shape_env",
    "_graph",
    "_code",
    "class",
    "lambda",
    "None",
    "in",
    "print_readable",
    "plain",
    "class_",
]


class Named(nn.Module):
    """Parts, a part of a part, a parameter and a buffer of a name."""

    def __init__(self, name, width=8, depth=1):
        super().__init__()
        self.name, self.depth = name, depth
        setattr(self, name, nn.Linear(6, width))
        self.inner = nn.ModuleDict({name: nn.Linear(width, width)})
        self.more = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.last = Last(name, width)

    def forward(self, x):
        x = self.inner[self.name](torch.relu(getattr(self, self.name)(x))).relu()
        for layer in self.more:
            x = layer(x).relu()
        return self.last(x)


class Last(nn.Module):
    def __init__(self, name, width):
        super().__init__()
        self.name = name
        self.norm = nn.BatchNorm1d(width)
        setattr(self, name, nn.Parameter(torch.randn(3, width)))

    def forward(self, x):
        return nn.functional.linear(self.norm(x), getattr(self, self.name))


class Tensors(nn.Module):
    """A parameter, a buffer, a hidden one and a constant, all of the model itself."""

    def __init__(self, *names, width=8):
        super().__init__()
        self.names = names
        self.a = nn.Linear(6, width)
        setattr(self, names[0], nn.Parameter(torch.randn(width)))
        self.register_buffer(names[1], torch.randn(width))
        self.register_buffer(names[2], torch.tensor([2.0]), persistent=False)
        self.b = nn.Linear(width, 3)

    def forward(self, x):
        weight, buffer, hidden = (getattr(self, name) for name in self.names)
        return self.b((self.a(x) * weight + buffer).relu() * hidden)


def pickled(network):
    return pickle.loads(pickle.dumps(network))


def saved(network):
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def require_same(network, model, x):
    """The network's state has the names of the model, loads into its class, and back."""
    assert list(network.state_dict()) == list(model.state_dict())
    other = copy.deepcopy(model)
    other.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(other.eval()(x), network(x), rtol=FUNCTION, atol=FUNCTION)
    again = copy.deepcopy(network)
    again.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(again(x), model(x), rtol=FUNCTION, atol=FUNCTION)


@pytest.mark.parametrize("name", NAMES)
def test_parts_may_have_any_name(name):
    torch.manual_seed(0)
    model, x = Named(name).eval(), torch.randn(8, 6)
    moved = fxfuse.permute(model, x, seed=1)
    assert not torch.equal(moved.state_dict()[f"{name}.weight"], getattr(model, name).weight)
    torch.testing.assert_close(moved(x), model(x), rtol=FUNCTION, atol=FUNCTION)
    for network in (moved, pickled(moved), saved(moved)):
        require_same(network, model, x)


@pytest.mark.parametrize("name", ["code", "meta", "lambda"])
def test_fused_networks_keep_the_names(name, tmp_path):
    torch.manual_seed(0)
    model, x = Named(name).eval(), torch.randn(32, 6)
    fused = fxfuse.fuse([model, fxfuse.permute(model, x, seed=1)], x)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-3)
    path = tmp_path / "net.safetensors"
    fxfuse.save(fused, path)
    for network in (fused, pickled(fused), fxfuse.load(path), fxfuse.fuse([fused, fused], x)):
        require_same(network, model, x)


def test_heads_keep_the_names():
    torch.manual_seed(0)
    model, x = Named("class").eval(), torch.randn(32, 6)
    fused = fxfuse.fuse([model, model], x, heads=fxfuse.heads.Separate())
    assert sum(name.endswith("last.class") for name in fused.state_dict()) == 2
    torch.testing.assert_close(fused(x)[0], model(x), rtol=1e-3, atol=1e-3)
    require_same(fxfuse.transfer(model, model, x, output=True), model, x)


@pytest.mark.parametrize("name", ["graph"])
def test_networks_of_other_depth_and_width_have_any_names(name):
    torch.manual_seed(0)
    deep, shallow, x = Named(name, depth=2).eval(), Named(name, 5).eval(), torch.randn(32, 6)
    fused = fxfuse.fuse([deep, shallow], x)
    require_same(fused, deep, x)
    with torch.no_grad():
        labelled = [(x, torch.zeros(32).long())]
        fxfuse.barrier([deep, deep], x, labelled)
    wide = fxfuse.net2wider(shallow, x, like=Named(name).eval())
    Named(name).load_state_dict(wide.state_dict(), strict=True)
    torch.testing.assert_close(wide(x), shallow(x), rtol=FUNCTION, atol=FUNCTION)


@pytest.mark.parametrize("names", [("code", "graph", "meta"), ("class", "is", "recompile")])
def test_tensors_of_the_model_itself_have_any_names(names, tmp_path):
    torch.manual_seed(0)
    model, x = Tensors(*names).eval(), torch.randn(32, 6)
    moved = fxfuse.permute(model, x, seed=1)
    fxfuse.save(moved, tmp_path / "net")
    for network in (moved, pickled(moved), fxfuse.load(tmp_path / "net")):
        require_same(network, model, x)


def test_modes_and_precision_follow_the_names():
    model, x = Named("code"), torch.randn(32, 6)
    model.code.eval()
    fused = fxfuse.fuse([model, copy.deepcopy(model)], x)
    modes = {in_model(path): part.training for path, part in fused.named_modules()}
    assert not modes["code"] and modes["inner.code"]
    half = fxfuse.fuse([model.to(torch.bfloat16)] * 2, x)
    assert {t.dtype for t in half.parameters()} == {torch.bfloat16}


def test_a_network_inside_another_one_keeps_the_names():
    model, x = Named("code").eval(), torch.randn(32, 6)
    whole, other = (nn.Sequential(fxfuse.permute(model, x, seed=s)) for s in (1, 2))
    assert "0.code.weight" in whole.state_dict()
    other.load_state_dict(whole.state_dict(), strict=True)
    assert torch.equal(other(x), whole(x))


def test_a_network_cannot_load_a_state_without_a_part():
    model, x = Named("code").eval(), torch.randn(32, 6)
    state = model.state_dict()
    del state["code.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        fxfuse.permute(model, x).load_state_dict(state)


@pytest.mark.parametrize("path", ["code", "code.weight", "a.b.class.weight", "a.code", "class_"])
def test_names_come_back(path):
    assert in_model(in_graph(path)) == path and in_graph(in_graph(path)) == in_graph(path)
