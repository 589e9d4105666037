"""Put heads behind a fused trunk: each for itself, or their outputs mixed into one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from .cutting import Head
from .grafting import graft
from .interpreter import OPEN
from .mixing import Mixer
from .tracing import copy_modes, run_once


def grafted(
    trunk: fx.GraphModule, mixer: Mixer, heads: Sequence[Head], models: Sequence[nn.Module]
) -> tuple[list[fx.GraphModule], tuple[str, ...]]:
    """Let all heads read the fused trunk; return their modules, and how each reads it.

    Args:
        trunk: The fused trunk.
        mixer: The trunks it was fused from.
        heads: What each model does behind the cut; taken over.
        models: The models, for their modes.
    """
    value = trunk_value(trunk, mixer)
    found = [graft(head, mixer, k, value) for k, head in enumerate(heads)]
    modules = [copy_modes(model, module) for model, (module, _) in zip(models, found)]
    return modules, tuple(how for _, how in found)


def trunk_value(trunk: fx.GraphModule, mixer: Mixer) -> Tensor:
    """Return what the fused trunk makes of a few samples."""
    network = mixer.balanced.networks[mixer.anchor]
    return run_once(trunk, network.example, f"the trunk of {network.name}")[0]


def attach(
    trunk: fx.GraphModule, mixer: Mixer, modules: list[fx.GraphModule], heads: Sequence[Head]
) -> list[fx.Node]:
    """Put heads behind a trunk, as modules `heads.0`, `heads.1` ...; return the calls of them."""
    graph, value = trunk.graph, trunk_value(trunk, mixer)
    name, output = "heads", graph.output_node()
    while hasattr(trunk, name):
        name += "_"
    trunk.add_submodule(name, nn.ModuleList(modules))
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    example = mixer.balanced.networks[mixer.anchor].example
    calls = []
    with graph.inserting_before(output):
        for k, (module, head) in enumerate(zip(modules, heads)):
            source = output.args[0]
            if len(modules) > 1 and _writes(module, (value, *(example[i] for i in head.inputs))):
                source = graph.call_method("clone", (source,))
            inputs = (source, *(placeholders[i] for i in head.inputs))
            calls.append(graph.call_module(f"{name}.{k}", inputs))
    return calls


def _writes(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> bool:
    """Tell whether a head may write to the value it reads, which the others read too."""
    probe, value = copy.deepcopy(module), inputs[0].clone()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for training in (False, True):
                probe.train(training)(value, *inputs[1:])
    except Exception:
        return True  # a batch of two is too small for some norms in training
    return value._version > 0


def give_back(trunk: fx.GraphModule, value: Any) -> None:
    """Let a network that was cut return what is computed from what it returned."""
    output = trunk.graph.output_node()
    output.args = (value,)
    output.meta.pop(OPEN, None)
    trunk.recompile()


def mixed(trunk: fx.GraphModule, calls: list[fx.Node], matrix: Tensor, dim: int) -> fx.Node:
    """Put a constant matrix `(outputs, outputs of all heads)` behind heads, along one axis."""
    owner = str(calls[0].target).rpartition(".")[0]
    trunk.get_submodule(owner).register_buffer("mixing", matrix)
    graph = trunk.graph
    with graph.inserting_before(graph.output_node()):
        joined = graph.call_function(torch.cat, (calls, dim))
        moved = graph.call_function(torch.movedim, (joined, dim, -1))
        mixing = graph.get_attr(f"{owner}.mixing")
        product = graph.call_function(functional.linear, (moved, mixing))
        return graph.call_function(torch.movedim, (product, -1, dim))


def single_layer(module: fx.GraphModule) -> tuple[str, nn.Linear] | None:
    """Return the one linear layer that a head consists of, and its name; None if it is more."""
    calls = [n for n in module.graph.nodes if n.op not in ("placeholder", "output")]
    if len(calls) != 1 or calls[0].op != "call_module":
        return None
    part = module.get_submodule(str(calls[0].target))
    return (str(calls[0].target), part) if type(part) is nn.Linear else None


def one_layer(
    trunk: fx.GraphModule, name: str, layers: list[nn.Linear], mixing: list[Tensor], like: nn.Linear
) -> fx.Node:
    """Put one linear layer behind a trunk that mixes the outputs of several; return its call.

    Args:
        trunk: The trunk.
        name: What the layer is to be called.
        layers: Linear layers that read the trunk.
        mixing: For each, the shares `(outputs, its outputs)`.
        like: One of them, whose modes the new one takes.
    """
    biased = any(x.bias is not None for x in layers)
    whole = nn.utils.skip_init(nn.Linear, like.in_features, len(mixing[0]), bias=biased)
    pairs, trained = list(zip(mixing, layers)), like.weight.requires_grad
    with torch.no_grad():
        weights = [m @ x.weight for m, x in pairs]
        whole.weight = nn.Parameter(sum(weights[1:], weights[0]), trained)
        if biased:
            shifts = [m @ x.bias for m, x in pairs if x.bias is not None]
            whole.bias = nn.Parameter(sum(shifts[1:], shifts[0]), trained)
    trunk.add_submodule(name, whole.train(like.training))
    with trunk.graph.inserting_before(trunk.graph.output_node()):
        return trunk.graph.call_module(name, trunk.graph.output_node().args)
