"""Emit the fused network, and plan what its norms and contractions have to give.

Norms with running statistics are folded into the weights before mixing, because the scale of a raw
filter is arbitrary. The fused network gets the anchor's norms again; a refit settles them by the
plans. At the end `rescale` gives the filters in front of norms the size that they were trained at:
a norm undoes that size, but the smaller a filter, the further a step of gradient descent turns it.

References:
    van Laarhoven 2017, L2 regularization versus batch and weight normalization: the effective
    learning rate is that over the squared norm of the filter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from .._progress import counted
from ..calibration.moments import Moments
from ..calibration.norms import (
    FoldedState,
    fold_norms,
    foldable_norms,
    scale_statistics,
    single_weights,
)
from ..coupling.mixing import Couplings
from ..errors import PairingError
from ..graph.state import fill, floats_of, state_values_of, tensor_at
from ..spaces.network import Network
from ._targets import behind_contractions


@dataclass(frozen=True, eq=False)
class NormPlan:
    """A norm of the fused network, which has to compute `scale * input + shift`.

    Attributes:
        node: The norm's node.
        reads: The node before it.
        scale: `(units,)`.
        shift: `(units,)`.
        target: Moments that its output should have instead, if the refit asked for them.
    """

    node: str
    reads: str
    scale: np.ndarray
    shift: np.ndarray
    target: Moments | None


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
    target: Moments


def outputs_to_settle(network: Network) -> dict[str, int]:
    """Return the nodes whose output moments can be corrected, with their feature axis.

    A bias that is put together from several tensors, or from one of another size, cannot be.
    """
    shapes = {name: tuple(t.shape) for name, t in floats_of(network.module).items()}
    axes = dict.fromkeys(network.norms, 1)
    folded = set(foldable_norms(network).values())
    for node, (weight, dim) in single_weights(network).items():
        dims = set(network.features.get(node, ()))
        biases = {shapes.get(t) for t in network.tensors[node] if t != weight}
        one_bias = biases <= {shapes[weight][dim : dim + 1]}
        if node not in folded and len(dims) == 1 and one_bias:
            axes[node] = dims.pop()
    return axes


def emit(
    couplings: Couplings, outputs: dict[str, list[Moments | None]]
) -> tuple[fx.GraphModule, list[NormPlan | WeightPlan]]:
    """Build the fused network and the plans that are left to settle.

    Args:
        couplings: The maps of the networks.
        outputs: The nodes of `outputs_to_settle` that the refit asked for, with the moments of each
            network's output.

    Returns:
        The network, its norms still the anchor's, and one plan for each norm and each node of
        `outputs`.
    """
    base = couplings.problem.structure
    folded = foldable_norms(base)
    states = [fold_norms(n, folded) for n in couplings.problem.networks]
    module = copy.deepcopy(base.module)
    norm_tensors = {v for roles in base.norms.values() for v in roles.values()}
    tensors = {n: t for n, t in state_values_of(module).items() if n not in norm_tensors}
    weights = [n for n, t in tensors.items() if _is_weight(t)]
    mixed = _mixed(couplings, states, weights, [n for n in base.norms if n not in folded])
    for name, tensor in counted(tensors.items()):
        values = [s[name] for s in states]
        whole = mixed(name, name, values) if name in weights else couplings.pick(name, values)
        whole = np.ascontiguousarray(whole).reshape(tensor.shape)
        fill(module, name, whole >= 0.5 if tensor.dtype == torch.bool else whole)
    norms = [_norm_plan(couplings, mixed, states, node, outputs.get(node)) for node in base.norms]
    contractions = single_weights(base)
    others = [
        _weight_plan(couplings, node, contractions[node], moments)
        for node, moments in outputs.items()
        if node not in base.norms
    ]
    return module, [*norms, *others]


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.dtype != torch.bool


# what is mixed, the tensor along whose axes it lies, and each network's values -> the mixed values
Mixed = Callable[[str, str, Sequence[np.ndarray]], np.ndarray]


def _mixed(
    couplings: Couplings, states: Sequence[FoldedState], weights: Sequence[str], kept: Sequence[str]
) -> Mixed:
    """Return what mixes the tensors of all networks.

    Args:
        couplings: The maps of the networks.
        states: Their tensors.
        weights: Those that are weights.
        kept: The norms that are not folded into weights: their scales and shifts are mixed as well.
    """
    if couplings.mixer is None:
        return lambda what, name, values: couplings.mix(name, values)
    norms = couplings.problem.structure.norms

    def named() -> Iterator[tuple[str, list[np.ndarray]]]:
        for name in weights:
            yield name, couplings.apart(name, [s[name] for s in states])
        for node, roles in norms.items():
            lies = str(roles["running_mean"])
            if node in kept:
                yield f"{node} scale", couplings.apart(lies, [s.scales[node] for s in states])
            yield f"{node} shift", couplings.apart(lies, [s.shifts[node] for s in states])

    _require_everywhere(couplings)
    rule = couplings.mixer(named, couplings.problem.weights)
    return lambda what, name, values: rule(what, couplings.apart(name, values))


def _require_everywhere(couplings: Couplings) -> None:
    """Refuse networks that lack layers, for a mixer that needs all layers of all networks."""
    problem, mixer = couplings.problem, couplings.mixer
    for network, absent in zip(problem.networks, problem.absent):
        if mixer is not None and mixer.everywhere and any(absent):
            raise PairingError(
                f"a layer that {network.name} does not have",
                where=f"layer '{absent[0].name}', {mixer}",
                expected="networks of one depth, as they come from one checkpoint",
                do="use a method that takes the mean of those that have a layer",
            )


def with_outputs_of(fused: Network, mixed: fx.GraphModule) -> Network:
    """Return a copy of a fused network with what writes its outputs as it was mixed."""
    module = copy.deepcopy(fused.module)
    for node in behind_contractions(fused):
        for name in fused.tensors.get(node, ()):
            fill(module, name, tensor_at(mixed, name).detach())
    return replace(fused, module=module)


def _norm_plan(
    couplings: Couplings,
    mixed: Mixed,
    states: Sequence[FoldedState],
    node: str,
    moments: list[Moments | None] | None,
) -> NormPlan:
    base = couplings.problem.structure
    statistics = str(base.norms[node]["running_mean"])
    return NormPlan(
        node,
        base.inputs_of(base.nodes[node])[0].name,
        mixed(f"{node} scale", statistics, [s.scales[node] for s in states]),
        mixed(f"{node} shift", statistics, [s.shifts[node] for s in states]),
        None if moments is None else _target(couplings, statistics, 0, moments),
    )


def _weight_plan(
    couplings: Couplings, node: str, writes: tuple[str, int], moments: list[Moments | None]
) -> WeightPlan:
    base, (weight, dim) = couplings.problem.structure, writes
    bias = next((t for t in base.tensors[node] if t != weight), None)
    axis = base.features[node][0]
    return WeightPlan(node, weight, dim, bias, axis, _target(couplings, weight, dim, moments))


def _target(couplings: Couplings, tensor: str, dim: int, moments: list[Moments | None]) -> Moments:
    """Mix the parents' moments of an axis's units; a layer that a network lacks writes zero."""
    sizes = [n.spaces.sizes[tensor, dim] for n in couplings.problem.networks]
    means = [np.zeros(n) if m is None else m.mean for m, n in zip(moments, sizes)]
    spreads = [np.zeros(n) if m is None else m.spread for m, n in zip(moments, sizes)]
    return Moments.of(couplings.mix(tensor, means, dim), couplings.mix(tensor, spreads, dim))


def rescale(fused: Network, couplings: Couplings) -> None:
    """Scale each filter in front of a norm to the root mean square size of those it came from.

    The statistics of the norm follow, so that the function stays.

    Args:
        fused: The fused network; edited in place.
        couplings: The maps of the networks it is made of.
    """
    problem, module = couplings.problem, fused.module
    base = problem.structure
    contractions = single_weights(base)
    for norm, node in foldable_norms(base).items():
        weight, dim = contractions[node]
        units = [n.spaces.sizes[weight, dim] for n in problem.networks]
        pairs = zip(problem.networks, units)
        sizes = [_squares(tensor_at(n.module, weight), dim, count) for n, count in pairs]
        wanted = couplings.mix(weight, sizes, along=dim)
        size = _squares(tensor_at(module, weight), dim, wanted.size)
        scalable = (size > 0) & (wanted > 0)
        factor = np.sqrt(np.divide(wanted, size, out=np.ones_like(size), where=scalable))
        factor = scale_statistics(module, base.norms[norm], factor)
        for name in base.tensors[node]:
            scale_units(tensor_at(module, name), factor, dim if name == weight else 0)


def _squares(tensor: Tensor, dim: int, units: int) -> np.ndarray:
    """Return the squared size `(units,)` of each filter."""
    filters = _by_unit(tensor.detach(), dim, units).double().flatten(2)
    squares: np.ndarray = filters.square().sum(2).flatten().cpu().numpy()
    return squares


def scale_units(tensor: Tensor, factors: np.ndarray, dim: int) -> None:
    """Multiply the entries of each unit along an axis by its factor, in place."""
    filters = _by_unit(tensor.data, dim, factors.size)
    shape = *filters.shape[:2], *[1] * (filters.dim() - 2)
    filters.mul_(torch.as_tensor(factors).to(tensor).reshape(shape))


def _by_unit(tensor: Tensor, dim: int, units: int) -> Tensor:
    """View a tensor as `(groups, units / groups, ...)`.

    Along the axis of a grouped transposed convolution lie those of one group: each block of its
    rows has others.
    """
    groups = units // tensor.shape[dim]
    if groups == 1:
        return tensor.movedim(dim, 0).unsqueeze(0)
    blocks: Tensor = tensor.unflatten(0, (groups, -1)).movedim(dim + 1, 1)
    return blocks
