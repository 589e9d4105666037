"""Take wrappers such as `DataParallel` off a model, and refuse what is no model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn
from torch.optim.swa_utils import AveragedModel

from ..errors import ModelError
from .module import Graph

_AROUND = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model: Any, name: str = "the model") -> nn.Module:
    """Return the model inside of what compiles, copies or averages it; itself if it is bare.

    Args:
        model: A module, or an exported program.
        name: Its name in errors.

    Raises:
        ModelError: If it is no model, or one that is compiled for good.
    """
    while isinstance(model, _AROUND) or "_orig_mod" in getattr(model, "_modules", {}):
        model = model.module if isinstance(model, _AROUND) else model._orig_mod
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise ModelError(
            "a model compiled by torch.jit, whose Python code is gone",
            where=name,
            expected="a torch.nn.Module with a forward in Python",
            do="pass the model that was given to torch.jit.script or torch.jit.trace, with its "
            "weights: model.load_state_dict(scripted.state_dict())",
        )
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    if isinstance(model, fx.GraphModule) and "train" in vars(model):
        return _free(model)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a {type(model).__name__} instead of a network",
            where=name,
            expected="a torch.nn.Module",
            do="build the model first and load its weights into it",
        )
    return model


def _free(exported: fx.GraphModule) -> fx.GraphModule:
    """Return an exported graph that can change its mode, without the guards on its inputs."""
    graph = copy.deepcopy(exported.graph)
    for node in reversed(graph.nodes):
        if node.op == "call_module" and not node.users:
            graph.erase_node(node)
    return Graph(exported, graph, "Exported")
