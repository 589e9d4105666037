"""Hooks of a model's parts are in its graph; those around all of it are refused."""

import pytest
import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_hook

import fxfuse
from fxfuse.errors import TraceError
from fxfuse.graph.trace import trace
from tests.support.nets import mlp, randomise

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
FUNCTION = 1e-5


def network() -> nn.Sequential:
    return randomise(nn.Sequential(mlp(6, 8, 3), nn.Tanh()))


def same(net: nn.Module, graph: nn.Module) -> bool:
    with torch.no_grad():
        return torch.allclose(net.eval()(X), graph.eval()(X), atol=FUNCTION)


@pytest.mark.parametrize("path", ["0", "0.0", "0.2"])
def test_a_hook_that_changes_what_a_part_computes_is_in_the_graph(path):
    net = network()
    net.get_submodule(path).register_forward_hook(lambda module, inputs, out: out.sin())
    net.get_submodule(path).register_forward_pre_hook(lambda module, inputs: inputs[0] / 2)
    assert same(net, trace(net, X))
    moved = fxfuse.permute(net, X, seed=1)
    assert same(net, moved) and fxfuse.find_spaces(net, X).free_units == 8
    for table in ("_forward_hooks", "_forward_pre_hooks"):
        assert not any(getattr(part, table) for part in moved.modules())
    net.load_state_dict(moved.state_dict(), strict=True)
    assert same(net, moved)


def test_a_hook_on_a_part_that_stays_one_node_runs_with_it():
    class Branches(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    net = nn.Sequential(nn.Linear(6, 4), Branches(), nn.Linear(4, 3))
    net[1].register_forward_hook(lambda module, inputs, out: out * 3)
    assert same(net, trace(net, X))


def test_what_hooks_note_belongs_to_copies():
    net, seen = network(), []
    net[0].register_forward_hook(lambda module, inputs, out: seen.append(out))
    graph = trace(net, X)
    assert not seen and same(net, graph) and len(seen) == 1
    assert not isinstance(seen[0], fx.Proxy)


def test_a_hook_may_read_the_model():
    net = network()
    net.register_parameter("scale", nn.Parameter(torch.tensor(3.0)))
    net[0].register_forward_hook(lambda module, inputs, out: out * net.scale)
    graph = trace(net, X)
    assert same(net, graph)
    with torch.no_grad():
        net.scale.fill_(2.0)
    graph.load_state_dict(net.state_dict())
    assert same(net, graph)


class Collects(nn.Module):
    """Returns what hooks have noted, as extractors of features do."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.found = network(), {}
        self.net[0].register_forward_hook(self.note)

    def note(self, module, inputs, out):
        self.found["features"] = out

    def forward(self, x):
        self.net(x)
        return self.found["features"]


def test_a_model_may_return_what_its_hooks_noted():
    net = Collects()
    assert same(net, trace(net, X)) and same(net, fxfuse.permute(net, X))


def test_weights_that_a_hook_computes():
    nets = [randomise(mlp(6, 8, 3), seed=k) for k in range(2)]
    for net in nets:
        nn.utils.weight_norm(net[0])
    assert same(nets[0], fxfuse.permute(nets[0], X))
    fused = fxfuse.fuse(nets, X)
    nets[0].load_state_dict(fused.state_dict(), strict=True)
    assert same(nets[0], fused)


def test_hooks_around_a_whole_model_are_refused_and_the_advice_works():
    net = network()
    net.register_forward_hook(lambda module, inputs, out: 2 * out)
    with pytest.raises(TraceError, match="whole model") as caught:
        trace(net, X)
    assert "model._forward_hooks" in caught.value.do
    net._forward_hooks.clear()
    assert same(net, trace(net, X))


def test_hooks_of_all_modules_are_refused_and_the_advice_works():
    net = network()
    handle = register_module_forward_hook(lambda module, inputs, out: out)
    try:
        with pytest.raises(TraceError, match="all modules"):
            trace(net, X)
    finally:
        handle.remove()
    assert same(net, trace(net, X))
