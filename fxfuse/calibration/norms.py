"""Batch norms in eval mode: what they compute, how to let them compute something else, and folding.

In eval mode a batch norm computes `scale * x + shift` unit by unit. This module reads scale and
shift off its four tensors, writes four tensors for a scale and a shift that are wanted, and folds
norms into the weights of the contractions in front of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..graph.state import fill, replace_tensor, tensor_at, values_of
from ..spaces.network import Network
from .moments import Moments

Roles = Mapping[str, str | float]  # of a norm: the names of its tensors by role, and `eps`
Units = np.ndarray | float  # one value per unit, or one for all


def scale_and_shift(module: nn.Module, roles: Roles) -> tuple[np.ndarray, np.ndarray]:
    """Return what a norm multiplies each unit by and then adds, `(units,)` in float64."""
    weight, bias, mean, variance = _values(module, roles)
    scale = weight / np.sqrt(variance + float(roles["eps"]))
    return scale, bias - mean * scale


def tensors_for(
    roles: Roles, scale: Units, output_mean: Units, mean: Units = 0.0, variance: Units = 1.0
) -> dict[str, Units]:
    """Return the tensors, by name, with which a norm computes `scale * (x - mean) + output_mean`.

    Args:
        roles: The norm.
        scale: What it multiplies each unit by.
        output_mean: What it gives where a unit has the mean.
        mean: Running mean.
        variance: Running variance. Without a weight of its own, a norm needs it to express its
            scale, and without a bias the mean: then `variance` or `mean` is not kept.
    """
    eps = float(roles["eps"])
    values = {"running_mean": mean, "running_var": variance}
    safe = np.where(np.abs(scale) > 1e-12, scale, 1.0)
    if "weight" in roles:
        values["weight"] = scale * np.sqrt(variance + eps)
    else:
        values["running_var"] = np.maximum(1.0 / safe**2 - eps, 0.0)
    if "bias" in roles:
        values["bias"] = output_mean
    else:
        values["running_mean"] = mean - output_mean / safe
    return {str(roles[role]): value for role, value in values.items()}


def write_norm(
    module: nn.Module,
    roles: Roles,
    scale: np.ndarray,
    output_mean: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
) -> None:
    """Let a norm compute `scale * (x - mean) + output_mean`, see `tensors_for`.

    All arguments are `(units,)`; their number may differ from that of the norm's units.
    """
    for name, values in tensors_for(roles, scale, output_mean, mean, variance).items():
        if tensor_at(module, name).shape == np.shape(values):
            fill(module, name, values)
        else:
            replace_tensor(module, name, np.asarray(values))


def write_statistics(module: nn.Module, roles: Roles, inputs: Moments) -> None:
    """Give a norm the moments of what it reads as its statistics; its function stays.

    A norm without a weight and a bias of its own has no other statistics that keep its function.
    """
    if "weight" in roles and "bias" in roles:
        weight, bias, mean, variance = _values(module, roles)
        scale = weight / np.sqrt(variance + float(roles["eps"]))
        output_mean = bias + scale * (inputs.mean - mean)
        write_norm(module, roles, scale, output_mean, inputs.mean, inputs.variance)


def scale_statistics(module: nn.Module, roles: Roles, factors: np.ndarray) -> np.ndarray:
    """Let a norm give the same as before for inputs that will be multiplied by factors.

    Returns:
        The factors `(units,)` for which it does: raised where its variance would fall below zero.
    """
    mean, variance = (tensor_at(module, str(roles[r])) for r in ("running_mean", "running_var"))
    eps, old = float(roles["eps"]), variance.double().cpu().numpy()
    factors = np.maximum(factors, np.sqrt(eps / (old + eps)))
    variance.data.copy_(torch.as_tensor(factors**2 * (old + eps) - eps))
    mean.data.mul_(torch.as_tensor(factors).to(mean))
    return factors


def _values(module: nn.Module, roles: Roles) -> tuple[np.ndarray, ...]:
    """Return weight, bias, running mean and running variance, `(units,)` in float64."""

    def value(role: str) -> np.ndarray:
        array: np.ndarray = tensor_at(module, str(roles[role])).detach().double().cpu().numpy()
        return array

    mean, variance = value("running_mean"), value("running_var")
    weight = value("weight") if "weight" in roles else np.ones_like(mean)
    bias = value("bias") if "bias" in roles else np.zeros_like(mean)
    return weight, bias, mean, variance


# --- folding --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FoldedState:
    """A network's tensors with norms folded into the weights in front of them.

    Attributes:
        raw: Every floating-point parameter and buffer by name, as it is.
        factors: Tensor that a norm is folded into -> the axis and the factors `(units,)` along it.
        scales: Per norm node, the factor `(units,)` that is left to it: ones where it was folded.
        shifts: Per norm node, what it adds `(units,)`.
    """

    raw: dict[str, np.ndarray]
    factors: dict[str, tuple[int, np.ndarray]]
    scales: dict[str, np.ndarray]
    shifts: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a tensor, folded; computed on demand, so that no second network is held."""
        raw = self.raw[name]
        if name not in self.factors:
            return raw
        dim, factor = self.factors[name]
        return scaled(raw, dim, factor).astype(raw.dtype)


def scaled(weight: np.ndarray, dim: int, factors: np.ndarray) -> np.ndarray:
    """Return a weight times a factor for each of its units `(units,)`.

    Args:
        weight: The weight.
        dim: Its axis of units. In a grouped transposed convolution each block of rows has others.
        factors: The factors.
    """
    shape = [-1 if d == dim else 1 for d in range(weight.ndim)]
    groups = factors.size // weight.shape[dim]
    if groups > 1:
        of_rows = np.repeat(factors.reshape(groups, -1), weight.shape[0] // groups, axis=0)
        factors, shape = of_rows, [*of_rows.shape, *[1] * (weight.ndim - 2)]
    product: np.ndarray = weight * factors.reshape(shape)
    return product


def single_weights(network: Network) -> dict[str, tuple[str, int]]:
    """Return the contractions of one weight that is used nowhere else.

    Returns:
        Node -> the name of the weight, and its axis that holds the node's output units.
    """
    uses = Counter(name for names in network.tensors.values() for name in names)
    single, lone = {}, _before_single_units(network)
    for node, weights in network.weights.items():
        writes = {axis.dim for _, axis in network.spaces.on(weights[0]) if not axis.reads}
        if not writes and node in lone:
            shape = tensor_at(network.module, weights[0]).shape
            writes = {next((dim for dim in (0, 1) if shape[dim : dim + 1] == (1,)), 0)}
        if len(weights) == 1 and uses[weights[0]] == 1 and len(writes) == 1:
            single[node] = weights[0], writes.pop()
    return single


def _before_single_units(network: Network) -> set[str]:
    """Return the contractions in front of a norm over one unit, which no labels show."""
    nodes, found = network.nodes, set()
    for name, roles in network.norms.items():
        if tensor_at(network.module, str(roles["running_mean"])).numel() == 1:
            source = network.inputs_of(nodes[name])[0]
            while network.hands_on(source):
                source = network.inputs_of(source)[0]
            found.add(source.name)
    return found


def foldable_norms(network: Network, through_idle: bool = False) -> dict[str, str]:
    """Return the norms that can be folded into the contraction in front of them.

    Nothing else may read the contraction, its weight and the norm must be used once.

    Args:
        network: The network.
        through_idle: Whether nodes that do nothing in eval mode (dropout) may lie between.

    Returns:
        Norm node -> node of the contraction.
    """
    nodes = {n.name: n for n in network.module.graph.nodes}
    contractions, foldable = single_weights(network), {}
    uses = Counter(str(roles["running_mean"]) for roles in network.norms.values())
    for name, roles in network.norms.items():
        source = network.inputs_of(nodes[name])[0]
        while through_idle and len(source.users) == 1 and network.hands_on(source):
            source = network.inputs_of(source)[0]
        alone = len(source.users) == 1 and uses[str(roles["running_mean"])] == 1
        if source.name in contractions and alone:
            foldable[name] = source.name
    return foldable


def fold_norms(network: Network, norms: Mapping[str, str]) -> FoldedState:
    """Return a network's tensors with some norms folded into the contractions in front of them.

    Args:
        network: The network; not modified.
        norms: Norm node -> node of the contraction, some of `foldable_norms`.
    """
    tensors = {
        name: (t.float() if t.dtype == torch.bool else t).detach().cpu().numpy()
        for name, t in values_of(network.module).items()
    }
    contractions, factors, scales, shifts = single_weights(network), {}, {}, {}
    for name, roles in network.norms.items():
        scale, shift = scale_and_shift(network.module, roles)
        if name in norms:
            weight, dim = contractions[norms[name]]
            for tensor in network.tensors[norms[name]]:
                factors[tensor] = (dim if tensor == weight else 0, scale)
            scale = np.ones_like(scale)
        scales[name], shifts[name] = scale, shift
    return FoldedState(tensors, factors, scales, shifts)
