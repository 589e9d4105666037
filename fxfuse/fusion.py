"""The entry functions; they read as the way of the data: trace, align, balance, couple, emit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from .alignment import Aligner, align_networks, monotone
from .balancing import balance_networks
from .canonical import canonical
from .correspondence import correspond
from .costs import correlation
from .coupling import GroundCost, Maps, Solver, couple, two_maps
from .data import Calibration
from .emit import emit, outputs_to_settle
from .errors import ArgumentError, ModelError
from .ir import Alignment
from .measuring import measure
from .mixing import Mixer
from .modes import cut_to, evaluating_part
from .network import Network
from .refit import finite, frontier_samples, settle
from .report import report_on
from .segments import partition
from .solvers import Exact
from .tracing import as_example, copy_modes, device_of, plain_modes, run_once, trace
from .verify import lint

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Method:
    """The choices that make a fusion method; call it like `fuse`.

    Attributes:
        aligner: Cost matrix of a segment to the alignment of its layers.
        ground_cost: Moments of two spaces to the cost between their units.
        solver: Ground cost and marginals to a transport plan.
        maps: Plan to project and unproject.
        match_moments: Give the fused norms the parents' means and spreads.
        anchor: Which network's widths the fused one takes, when the caller does not say.
    """

    aligner: Aligner = monotone
    ground_cost: GroundCost = correlation
    solver: Solver = Exact()
    maps: Maps = two_maps
    match_moments: bool = True
    anchor: Callable[[Sequence[int]], int] = field(default=lambda depths: depths.index(max(depths)))

    def __call__(self, models: Sequence[nn.Module], data: Any, **options: Any) -> fx.GraphModule:
        """Fuse models by this method; takes the arguments of `fuse`."""
        return fuse(models, data, method=self, **options)


@plain_modes()
def fuse(
    models: Sequence[nn.Module],
    data: Any,
    *,
    alignment: Alignment | None = None,
    weights: Sequence[float] | None = None,
    anchor: int | None = None,
    method: Method | None = None,
    progress: Progress | None = None,
) -> fx.GraphModule:
    """Fuse trained networks of different depth and width into one.

    Args:
        models: One or more networks with the same inputs and outputs; not modified.
        data: Unlabelled calibration inputs: a tensor `(N, ...)` or an iterable of batches, each a
            tensor or a tuple, list or dict whose first entry is the input.
        alignment: Which layers correspond; found by `align` if not given.
        weights: Non-negative share of each network, normalised to sum 1; equal if not given.
        anchor: Index of the network whose widths and coordinates the result takes; the deepest if
            not given.
        method: The choices along the way; the default is the best one known.
        progress: Called with the name of a stage and the share of it that is done.

    Returns:
        An ordinary `GraphModule` with the module names of the network whose structure it has. Its
        `meta["fxfuse"]` holds a `Report`.

    Raises:
        ArgumentError: If an argument is out of range or of the wrong number.
        TraceError: If a model cannot be traced.
        ModelError: If weights are not finite, or outputs differ in shape.
        DataError: If the data are empty, refused by a model, or not finite.
        PairingError: If the networks do not belong to one family.
        PassError: If a layer that one network lacks has no neutral form.

    Example:
        >>> def net(*widths):
        ...     pairs = zip((4, *widths), widths)
        ...     hidden = [m for i, o in pairs for m in (nn.Linear(i, o), nn.ReLU())]
        ...     return nn.Sequential(*hidden, nn.Linear(widths[-1], 3))
        >>> fused = fuse([net(8, 8, 6), net(5, 5)], torch.randn(64, 4))
        >>> [tuple(p.shape) for p in fused.parameters() if p.dim() == 2]
        [(8, 4), (8, 8), (6, 8), (3, 6)]
    """
    method, clock = method or Method(), _Clock(progress)
    shares = _shares(weights, models)
    networks, calibration = _networks(models, data, clock)
    depths = [sum(len(s.layers) for s in partition(n)) for n in networks]
    target = _anchor(anchor, method.anchor(depths), len(networks))
    if alignment is None:
        clock.start("align layers")
        alignment = align_networks(networks, calibration, method.aligner, False, clock.tick)
    clock.start("balance depths")
    balanced = balance_networks(networks, alignment)
    mixer = Mixer(balanced, target, correspond(balanced, target), shares)
    fused = _mix(mixer, calibration, method, clock)
    fused.meta["fxfuse"] = report_on(mixer, alignment, clock.stop())
    return copy_modes(models[target], fused)


def _mix(mixer: Mixer, data: Calibration, method: Method, clock: _Clock) -> fx.GraphModule:
    """Measure, couple, emit and settle: from balanced networks to the fused one."""
    networks, base = mixer.balanced.networks, mixer.balanced.networks[mixer.anchor]
    clock.start("measure units")
    samples = min(data.samples, frontier_samples(networks))
    outputs = outputs_to_settle(base)
    measured = measure(mixer.balanced, mixer.match, data, outputs, samples, clock.tick)
    clock.start("couple units")
    couple(mixer, measured, method.ground_cost, method.solver, method.maps)
    clock.start("emit")
    module, plans = emit(mixer, measured.outputs)
    clock.start("settle norms and moments")
    fused = replace(base, name=f"the fusion of {base.name}", module=module)
    settle(fused, plans, data, samples, method.match_moments, clock.tick)
    _require_sound(fused)
    return _cleaned(module)


@plain_modes()
def align(
    models: Sequence[nn.Module],
    data: Any,
    *,
    method: Method | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Find which layers of networks of different depth correspond.

    Args:
        models: Two or more networks; not modified.
        data: Calibration inputs, as for `fuse`.
        method: The choices along the way.
        progress: Called with the name of a stage and the share of it that is done.

    Returns:
        The alignment; print it, draw it, or hand it to `fuse`.

    Raises:
        PairingError: If the segments of the networks do not pair.
    """
    clock = _Clock(progress)
    networks, calibration = _networks(models, data, clock)
    clock.start("align layers")
    return align_networks(networks, calibration, (method or Method()).aligner, tick=clock.tick)


@plain_modes()
def balance(
    models: Sequence[nn.Module],
    data: Any,
    *,
    alignment: Alignment | None = None,
    method: Method | None = None,
) -> list[fx.GraphModule]:
    """Give networks of different depth one structure without changing their functions.

    Args:
        models: The networks; not modified.
        data: Calibration inputs, as for `fuse`.
        alignment: Which layers correspond; found by `align` if not given.
        method: The choices along the way.

    Returns:
        One `GraphModule` per network, equal node for node and name for name, each computing what
        its model computes.

    Raises:
        PairingError: If the networks do not belong to one family.
        PassError: If a layer that one network lacks has no neutral form.
        NotEquivalent: If a network's function would change.
    """
    networks, calibration = _networks(models, data, _Clock(None))
    if alignment is None:
        aligner = (method or Method()).aligner
        alignment = align_networks(networks, calibration, aligner, measure_forced=False)
    balanced = balance_networks(networks, alignment)
    pairs = zip(balanced.networks, models)
    return [copy_modes(model, _cleaned(n.module)) for n, model in pairs]


class _Clock:
    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.seconds = progress, {}
        self.stage, self.since = "", time.perf_counter()

    def start(self, stage: str) -> None:
        self.stop()
        self.stage, self.since = stage, time.perf_counter()
        self.tick(0.0)

    def tick(self, share: float) -> None:
        if self.progress is not None:
            self.progress(self.stage, share)

    def stop(self) -> dict[str, float]:
        if self.stage:
            self.seconds[self.stage] = time.perf_counter() - self.since
            self.stage = ""
        return self.seconds


def _networks(
    models: Sequence[nn.Module], data: Any, clock: _Clock
) -> tuple[list[Network], Calibration]:
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
    graphs = [trace(m, name) for m, name in zip(models, names)]
    example = calibration.example()
    inputs = [as_example(example, device_of(g)) for g in graphs]
    outputs = [run_once(g, x, name) for g, x, name in zip(graphs, inputs, names)]
    _require_same_outputs(outputs, names)
    _agree_on_heads(graphs)
    networks = []
    for name, x in zip(names, inputs):  # giants: hold no second copy of more than one network
        networks.append(Network.of(name, canonical(graphs.pop(0), x), x))
    return networks, calibration


def _agree_on_heads(graphs: list[fx.GraphModule]) -> None:
    """Leave out heads that exist in training mode only where not all networks have such."""
    parts = [evaluating_part(g) for g in graphs]
    if not all(parts):
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
                do="replace the heads, or fuse the networks without them",
            )


def _shares(weights: Sequence[float] | None, models: Sequence[nn.Module]) -> tuple[float, ...]:
    count = len(models) if isinstance(models, Sequence) else 0
    given = [1.0] * count if weights is None else [float(w) for w in weights]
    total = sum(given)
    good = all(w >= 0 and w < float("inf") for w in given) and (total > 0 or not count)
    if len(given) != count or not good:
        raise ArgumentError(
            f"weights {given}",
            where="the argument `weights`",
            expected=f"{count} non-negative numbers, one for each model, not all zero",
            do="leave them out for equal weights",
        )
    return tuple(w / total for w in given)


def _anchor(given: int | None, default: int, count: int) -> int:
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


def _require_sound(fused: Network) -> None:
    if not finite(fused.module):
        raise ModelError(
            "fused weights that are NaN or infinite",
            where=fused.name,
            expected="finite weights",
            do="check the activations of the models on the calibration data for overflow",
        )
    lint(fused.module)
    run_once(fused.module, fused.example, fused.name)


def _cleaned(module: fx.GraphModule) -> fx.GraphModule:
    """Take the traces of the work out of a graph that is handed to the user."""
    for node in module.graph.nodes:
        for key in ("inserted", "neutral_to"):
            node.meta.pop(key, None)
    return module
