"""The entry functions; they read as the way of the data: trace, align, balance, couple, emit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from .alignment import Aligner, align_networks, monotone
from .balancing import balance_networks
from .correspondence import correspond
from .coupling import CouplingMethod
from .data import Calibration
from .emit import emit, outputs_to_settle
from .errors import ModelError
from .intake import Clock, Progress, anchor_of, shares_of, take_in
from .ir import Alignment
from .measuring import measure
from .mixing import Mixer
from .network import Network
from .refit import finite, frontier_samples, settle
from .report import report_on
from .segments import partition
from .tracing import copy_modes, plain_modes, run_once
from .transport import Transport
from .verify import lint


@dataclass(frozen=True)
class Method:
    """The choices that make a fusion method; call it like `fuse`.

    Attributes:
        aligner: Cost matrix of a segment to the alignment of its layers.
        coupling: How the units of the networks find each other.
        match_moments: Give the fused norms the parents' means and spreads.
        anchor: Which network's widths the fused one takes, when the caller does not say.
    """

    aligner: Aligner = monotone
    coupling: CouplingMethod = Transport()
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
        >>> import torch
        >>> def net(*widths):
        ...     pairs = zip((4, *widths), widths)
        ...     hidden = [m for i, o in pairs for m in (nn.Linear(i, o), nn.ReLU())]
        ...     return nn.Sequential(*hidden, nn.Linear(widths[-1], 3))
        >>> fused = fuse([net(8, 8, 6), net(5, 5)], torch.randn(64, 4))
        >>> [tuple(p.shape) for p in fused.parameters() if p.dim() == 2]
        [(8, 4), (8, 8), (6, 8), (3, 6)]
    """
    method, clock = method or Method(), Clock(progress)
    shares = shares_of(weights, models)
    networks, calibration = take_in(models, data, clock)
    depths = [sum(len(s.layers) for s in partition(n)) for n in networks]
    target = anchor_of(anchor, method.anchor(depths), len(networks))
    if alignment is None:
        clock.start("align layers")
        alignment = align_networks(networks, calibration, method.aligner, False, clock.tick)
    clock.start("balance depths")
    balanced = balance_networks(networks, alignment)
    mixer = Mixer(balanced, target, correspond(balanced, target), shares)
    fused = _mix(mixer, calibration, method, clock)
    fused.meta["fxfuse"] = report_on(mixer, alignment, clock.stop())
    return copy_modes(models[target], fused)


def _mix(mixer: Mixer, data: Calibration, method: Method, clock: Clock) -> fx.GraphModule:
    """Measure, couple, emit and settle: from balanced networks to the fused one."""
    networks, base = mixer.balanced.networks, mixer.balanced.networks[mixer.anchor]
    clock.start("measure units")
    samples = min(data.samples, frontier_samples(networks))
    outputs = outputs_to_settle(base) if method.match_moments else {}
    view = method.coupling.view
    measured = measure(mixer.balanced, mixer.match, data, view, outputs, samples, clock.tick)
    clock.start("couple units")
    method.coupling(mixer, measured)
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
    clock = Clock(progress)
    networks, calibration = take_in(models, data, clock)
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
    networks, calibration = take_in(models, data, Clock(None))
    if alignment is None:
        aligner = (method or Method()).aligner
        alignment = align_networks(networks, calibration, aligner, measure_forced=False)
    balanced = balance_networks(networks, alignment)
    pairs = zip(balanced.networks, models)
    return [copy_modes(model, _cleaned(n.module)) for n, model in pairs]


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
