"""What a caller hands in: models and data made ready, weights and anchor checked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from .canonical import canonical
from .data import Calibration
from .errors import ArgumentError, ModelError
from .modes import cut_to, evaluating_part
from .network import Network
from .progress import Tick, in_parts, part, silent
from .tracing import Example, as_example, device_of, run_once, trace

Progress = Callable[[str, float], None]
TRACED = 0.25  # share of the work once all networks are traced


class Clock:
    """Times the stages and tells the caller how far they are.

    Attributes:
        seconds: Wall time of each stage.
        memory: Peak resident bytes of the process so far, at the end of each stage, where the
            system tells them.
    """

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.stage, self.since = "", time.perf_counter()

    def start(self, stage: str) -> None:
        """Begin a stage; the one before ends."""
        self.stop()
        self.stage, self.since = stage, time.perf_counter()
        self.tick(0.0)

    def tick(self, share: float) -> None:
        """Say which share of the stage is done."""
        if self.progress is not None:
            self.progress(self.stage, share)

    def stop(self) -> dict[str, float]:
        """End the last stage; return the seconds of all."""
        if self.stage:
            self.seconds[self.stage] = time.perf_counter() - self.since
            peak = peak_memory()
            if peak is not None:
                self.memory[self.stage] = peak
            self.stage = ""
        return self.seconds


def peak_memory() -> int | None:
    """Return the largest resident size of this process so far in bytes, None if nobody tells."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def take_in(
    models: Sequence[nn.Module], data: Any, clock: Clock, apart: bool = False
) -> tuple[list[Network], Calibration]:
    """Trace and analyse models that have the same inputs and outputs.

    Args:
        models: The networks; not modified.
        data: What they are calibrated on.
        clock: Told what is being done.
        apart: Outputs may differ; what training alone computes is left out.

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
    clock.start("read data")
    calibration = data if isinstance(data, Calibration) else Calibration(data)
    clock.start("trace and find spaces")
    names = _names(models)
    graphs = []
    for model, name in zip(models, names):
        graphs.append(trace(model, name))
        clock.tick(TRACED * len(graphs) / len(models))
    example = calibration.example()
    inputs = [as_example(example, device_of(g)) for g in graphs]
    outputs = [run_once(g, x, name) for g, x, name in zip(graphs, inputs, names)]
    if not apart:
        _require_same_outputs(outputs, names)
    _agree_on_heads(graphs, apart)
    networks = []
    steps = in_parts(list(zip(names, inputs)), part(clock.tick, TRACED, 1.0))
    for (name, x), tick in steps:  # giants: hold no second copy of more than one network
        networks.append(Network.of(name, canonical(graphs.pop(0), x), x, tick))
    clock.tick(1.0)
    return networks, calibration


def analysed(model: nn.Module, example: Example, name: str, tick: Tick = silent) -> Network:
    """Trace and analyse one model; `tick` is called with the share that is done.

    Raises:
        TraceError: If the model cannot be traced.
        DataError: If it refuses the example.
    """
    graph = trace(model, name)
    inputs = as_example(example, device_of(graph))
    tick(TRACED)
    run_once(graph, inputs, name)
    return Network.of(name, canonical(graph, inputs), inputs, part(tick, TRACED, 1.0))


def _agree_on_heads(graphs: list[fx.GraphModule], apart: bool) -> None:
    """Leave out heads that exist in training mode only where not all networks share such."""
    parts = [evaluating_part(g) for g in graphs]
    if apart or not all(parts):
        for graph, part in zip(graphs, parts):
            if part is not None:
                cut_to(graph, part)


def _names(models: Sequence[nn.Module]) -> list[str]:
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


def is_automatic(weights: Sequence[float] | str | None, apart: bool) -> bool:
    """Tell whether the weights are to be chosen.

    Args:
        weights: As for `fuse`.
        apart: Whether the networks are of different tasks.

    Raises:
        ArgumentError: If they are a word that means nothing.
    """
    if isinstance(weights, str) and (weights != "auto" or apart):
        raise ArgumentError(
            f"weights '{weights}'" + (" for networks of different tasks" if apart else ""),
            where="the argument `weights`",
            expected="numbers, or 'auto' for networks of one task, which have an ensemble",
            do="give one number for each model, or leave them out for equal weights",
        )
    return weights == "auto"


def shares_of(weights: Sequence[float] | None, models: Sequence[nn.Module]) -> tuple[float, ...]:
    """Return the share of each model, sum 1; refuse what is no weights."""
    count = len(models) if isinstance(models, Sequence) else 0
    given = [1.0] * count if weights is None else [float(w) for w in weights]
    total = sum(given)
    good = all(w >= 0 for w in given) and (0 < total < float("inf") or not count)
    if len(given) != count or not good:
        raise ArgumentError(
            f"weights {given}",
            where="the argument `weights`",
            expected=f"{count} non-negative numbers, one for each model, not all zero",
            do="leave them out for equal weights",
        )
    return tuple(w / total for w in given)


def anchor_of(given: int | None, default: int, count: int) -> int:
    """Return the index of the anchor; refuse what is no index."""
    if given is None:
        return default
    if isinstance(given, int) and 0 <= given < count:
        return given
    raise ArgumentError(
        f"anchor {given!r}",
        where="the argument `anchor`",
        expected=f"an index from 0 to {count - 1}",
        do="leave it out to take the deepest network",
    )
