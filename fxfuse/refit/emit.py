"""Emit the fused network, and say what its norms and outputs have to look like.

Norms with running statistics are folded into the weights before mixing, because the scale of a raw
filter is arbitrary; the fused network gets the anchor's norms again, to be settled by `refit`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx, nn

from .._progress import counted
from ..calibration.moments import Moments
from ..calibration.norms import FoldedState, fold_norms, foldable_norms, single_weights
from ..coupling.mixing import Couplings
from ..graph.state import fill, floats_of, state_floats_of
from ..spaces.network import Network


@dataclass(frozen=True, eq=False)
class Target:
    """The mean and spread `(units,)` that the parents ask of a node's output."""

    mean: np.ndarray
    spread: np.ndarray

    @property
    def rms(self) -> np.ndarray:
        """`(units,)` root mean squares."""
        found: np.ndarray = np.sqrt(self.mean**2 + self.spread**2)
        return found


@dataclass(frozen=True, eq=False)
class NormPlan:
    """What a norm of the fused network has to compute: `scale * input + shift` before corrections.

    Attributes:
        node: The norm's node.
        reads: The node before it.
        scale: `(units,)`.
        shift: `(units,)`.
        target: Moments its output should have, if they were measured.
    """

    node: str
    reads: str
    scale: np.ndarray
    shift: np.ndarray
    target: Target | None


@dataclass(frozen=True, eq=False)
class WeightPlan:
    """A contraction without a norm behind it, whose output should have given moments.

    Attributes:
        node: Its node.
        weight: Name of its weight.
        dim: The axis the weight writes.
        bias: Name of its bias, if it has one.
        axis: Feature axis of its output.
        target: Moments its output should have.
    """

    node: str
    weight: str
    dim: int
    bias: str | None
    axis: int
    target: Target


def outputs_to_settle(network: Network) -> dict[str, int]:
    """Return the nodes whose output moments can be corrected, with their feature axis.

    A bias that is put together from several tensors, or from one of another size, cannot be.
    """
    shapes = {name: tuple(t.shape) for name, t in floats_of(network.module).items()}
    found = dict.fromkeys(network.norms, 1)
    taken = set(foldable_norms(network).values())
    for node, (weight, dim) in single_weights(network).items():
        axes = set(network.features.get(node, ()))
        biases = {shapes.get(t) for t in network.tensors[node] if t != weight}
        plain = biases <= {shapes[weight][dim : dim + 1]}
        if node not in taken and len(axes) == 1 and plain:
            found[node] = axes.pop()
    return found


def emit(
    couplings: Couplings, outputs: dict[str, list[Moments | None]]
) -> tuple[fx.GraphModule, list[NormPlan | WeightPlan]]:
    """Build the fused network and the plans that are left to settle.

    Args:
        couplings: The maps of the networks.
        outputs: Per node to settle, the moments of each network's output; empty if none are asked
            for.

    Returns:
        The network, its norms still the anchor's, and one plan for each norm and node of
        `outputs`.
    """
    base = couplings.problem.structure
    folded = foldable_norms(base)
    states = [fold_norms(n, folded) for n in couplings.problem.networks]
    module = copy.deepcopy(base.module)
    norm_tensors = {v for roles in base.norms.values() for v in roles.values()}
    for name, tensor in counted(state_floats_of(module).items()):
        if name not in norm_tensors:
            values = [s[name] for s in states]
            mix = couplings.mix if isinstance(tensor, nn.Parameter) else couplings.pick
            fill(module, name, np.ascontiguousarray(mix(name, values)).reshape(tensor.shape))
    norms = [_norm_plan(couplings, states, node, outputs.get(node)) for node in base.norms]
    able = single_weights(base)
    weights = [
        _weight_plan(couplings, node, able[node], moments)
        for node, moments in outputs.items()
        if node not in base.norms
    ]
    return module, [*norms, *weights]


def _norm_plan(
    couplings: Couplings,
    states: Sequence[FoldedState],
    node: str,
    moments: list[Moments | None] | None,
) -> NormPlan:
    base = couplings.problem.structure
    statistics = str(base.norms[node]["running_mean"])
    nodes = {n.name: n for n in base.module.graph.nodes}
    return NormPlan(
        node,
        base.inputs_of(nodes[node])[0].name,
        couplings.mix(statistics, [s.scales[node] for s in states]),
        couplings.mix(statistics, [s.shifts[node] for s in states]),
        None if moments is None else _target(couplings, statistics, 0, moments),
    )


def _weight_plan(
    couplings: Couplings, node: str, writes: tuple[str, int], moments: list[Moments | None]
) -> WeightPlan:
    base, (weight, dim) = couplings.problem.structure, writes
    bias = next((t for t in base.tensors[node] if t != weight), None)
    axis = base.features[node][0]
    return WeightPlan(node, weight, dim, bias, axis, _target(couplings, weight, dim, moments))


def _target(couplings: Couplings, tensor: str, dim: int, moments: list[Moments | None]) -> Target:
    """Mix the parents' moments over the units that a tensor axis holds; no layer writes zero."""
    sizes = [n.spaces.sizes[tensor, dim] for n in couplings.problem.networks]
    means = [np.zeros(n) if m is None else m.mean for m, n in zip(moments, sizes)]
    spreads = [np.zeros(n) if m is None else m.spread for m, n in zip(moments, sizes)]
    return Target(couplings.mix(tensor, means, dim), couplings.mix(tensor, spreads, dim))
