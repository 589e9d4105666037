"""From what a caller hands in to analysed networks and data that can be read again.

Models are traced, checked for having the same outputs, and run once to find their spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from .._progress import Clock, counted, part, tell
from ..errors import ArgumentError, ModelError
from ..graph.canonical import canonical
from ..graph.modes import cut_to, evaluating_part
from ..graph.trace import Example, as_example, at_least_single, device_of, run_once, trace
from ..spaces.network import Network
from .data import Batch, Calibration

TRACED = 0.25  # share of the work that is done once all networks are traced


def prepare(
    models: Sequence[nn.Module], data: Any, clock: Clock, outputs_may_differ: bool = False
) -> tuple[list[Network], Calibration]:
    """Trace and analyse models that have the same inputs and outputs.

    Args:
        models: The networks; not modified.
        data: Calibration inputs.
        clock: Times the stages.
        outputs_may_differ: Take networks with different outputs, too. Heads that exist in training
            mode only are then left out.

    Raises:
        ArgumentError: If there are no models.
        TraceError: If a model cannot be traced.
        ModelError: If weights are not finite, or outputs differ in shape.
        DataError: If the data are empty or refused by a model.
    """
    if not isinstance(models, Sequence) or not len(models):
        raise ArgumentError(
            "no models" if isinstance(models, Sequence) else f"a {type(models).__name__}",
            where="the argument `models`",
            expected="a list of one or more networks",
            do="pass them as a list: fxfuse.fuse([a, b], data)",
        )
    with clock.stage("read data"):
        calibration = data if isinstance(data, Calibration) else Calibration(data)
    with clock.stage("trace and find spaces"):
        return _analyse_all(models, calibration.example(), outputs_may_differ), calibration


def _analyse_all(
    models: Sequence[nn.Module], example: Batch, outputs_may_differ: bool
) -> list[Network]:
    """Trace all models, then analyse one after the other."""
    names = _names(models)
    with part(0.0, TRACED):
        graphs = [trace(model, name) for model, name in counted(list(zip(models, names)))]
    inputs = [as_example(example, device_of(g)) for g in graphs]
    outputs = [run_once(g, x, name) for g, x, name in zip(graphs, inputs, names)]
    if not outputs_may_differ:
        _require_same_outputs(outputs, names)
    _drop_training_heads(graphs, outputs_may_differ)
    networks = []
    with part(TRACED, 1.0):
        for name, x in counted(list(zip(names, inputs))):
            graph = graphs.pop(0)  # huge perhaps, and `canonical` returns a copy: this one goes
            networks.append(Network.of(name, canonical(graph, x), x))
    return networks


def analyse(model: nn.Module, example: Example, name: str) -> Network:
    """Trace and analyse one model.

    Args:
        model: The model; not modified.
        example: Inputs for one run of it.
        name: How to call it in errors.

    Raises:
        TraceError: If the model cannot be traced.
        DataError: If it refuses the example.
    """
    graph = trace(model, name)
    inputs = tuple(map(at_least_single, as_example(example, device_of(graph))))
    tell(TRACED)
    run_once(graph, inputs, name)
    with part(TRACED, 1.0):
        return Network.of(name, canonical(graph, inputs), inputs)


def _drop_training_heads(graphs: list[fx.GraphModule], always: bool) -> None:
    """Cut off heads that exist in training mode only, unless all networks have such heads."""
    parts = [evaluating_part(g) for g in graphs]
    if always or not all(parts):
        for graph, part in zip(graphs, parts):
            if part is not None:
                cut_to(graph, part)


def _names(models: Sequence[nn.Module]) -> list[str]:
    """Name models by their classes, numbered where several are of one class."""
    kinds = [type(m).__name__ for m in models]
    return [f"{kind} {i}" if kinds.count(kind) > 1 else kind for i, kind in enumerate(kinds)]


def _require_same_outputs(outputs: list[list[torch.Tensor]], names: list[str]) -> None:
    shapes = [[tuple(t.shape[1:]) for t in out] for out in outputs]
    for other, name in zip(shapes, names):
        if other != shapes[0]:
            raise ModelError(
                f"outputs of shape {shapes[0]} and {other}",
                where=f"{names[0]} and {name}",
                expected="networks with the same outputs",
                do="keep a head for each, heads=fxfuse.heads.Separate(), or give one the labels "
                "of all, heads=fxfuse.heads.Union(labels=[...])",
            )
