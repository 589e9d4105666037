"""Layers without an exact neutral form, made nearly neutral: what `balance` does beyond `fuse`.

1. A plain layer whose activation is smooth at zero and zero there computes the identity on a small
   signal: its weights are an identity times 2^-17 or less, and the next layer's are divided by
   this and by the slope of the activation.
2. A residual block with a norm behind its sum gets a branch that writes zero, and the affine part
   of the norm in front of it, which then only standardises what is standardised.
3. A layer of any other form gets values that are found by trying (`_measured`).
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, fx

from ..alignment.layers import layers_between
from ..calibration.run import record
from ..graph.compare import TOLERANCE
from ..graph.state import fill, tensor_at, tensors_of
from ..ir import Layer
from ..spaces.network import Network
from ._insert import AbsentLayer
from ._measured import settle
from ._neutral import (
    Insertion,
    LayerCopy,
    apply_activation,
    copy_inputs,
    fill_norm,
    no_neutral_form,
    zero_branch,
)

SMALL = 2.0**-17  # of a signal that an activation bends by no more than about 1e-5 of it


def make_nearly_neutral(network: Network, absent: tuple[AbsentLayer, ...]) -> Network:
    """Return a copy of a network whose layers that would be passed by pass on what they read.

    Args:
        network: A balanced network; not modified.
        absent: Its layers that it has in name only.

    Raises:
        PassError: If such a layer has no form that is near enough.
    """
    passed = [layer for layer in absent if layer.passed]
    if not passed:
        return network
    network = replace(network, module=copy.deepcopy(network.module))
    passed = [x for x in passed if not settle(network, x)]
    pairs = [(x, part) for x in passed for part in layers_between(network, x.entry, x.nodes)]
    for inserted, layer in pairs:
        if layer.branched:
            _move_affine_part(network, inserted, layer)
    for inserted, layer in reversed(pairs):  # the weights behind are those that are divided
        if not layer.branched:
            _pass_small_signal(network, inserted, layer)
    return network


def _copy_of(network: Network, layer: Layer) -> LayerCopy:
    """Return a layer of a network as if it had just been copied into it."""
    paths = {name: name for name in tensors_of(network.module)}
    width = network.shapes[layer.entry][layer.layout[1]]
    return LayerCopy(Insertion(network, layer, network, layer.entry), width, network.module, paths)


# --- blocks with a norm behind --------------------------------------------------------------------


def _move_affine_part(network: Network, inserted: AbsentLayer, layer: Layer) -> None:
    nodes, entry = network.nodes, layer.entry
    norm = nodes[layer.nodes[-1]]
    before = nodes[entry]
    while network.is_idle(before):
        before = network.inputs_of(before)[0]
    alike = network.is_norm(norm) and network.form(norm) == network.form(before)
    tensors = [network.tensors.get(n.name, []) for n in (before, norm)]
    readers = {user.name for user in nodes[entry].users}
    if not alike or len(tensors[0]) != len(tensors[1]) or not readers <= {*layer.nodes}:
        raise no_neutral_form(inserted.name, inserted.passed)
    zero_branch(_copy_of(network, layer))
    for name, other, neutral in zip(*tensors, (1.0, 0.0)):
        fill(network.module, other, tensor_at(network.module, name).detach().clone())
        fill(network.module, name, neutral)


# --- plain layers ---------------------------------------------------------------------------------


def _pass_small_signal(network: Network, inserted: AbsentLayer, layer: Layer) -> None:
    copied, last = _copy_of(network, layer), layer.nodes[-1]
    readers = _contractions_behind(network, last)
    if readers is None:
        raise no_neutral_form(inserted.name, inserted.passed)
    reach = record(network, network.example, {layer.entry: _largest})[layer.entry]
    scale = SMALL * 2.0 ** -max(math.ceil(math.log2(max(reach, 1e-30))), 0)
    weight = copy_inputs(copied, layer)
    behind = [network.nodes[n] for n in layer.nodes[layer.nodes.index(layer.merge) + 1 :]]
    norms = [n for n in behind if network.is_norm(n)]
    for norm in norms:
        fill_norm(copied, norm, scale if norm is norms[0] else 1.0)
    if not norms:
        weight.mul_(scale)
    slope = 1.0
    for node in behind:
        if network.is_activation(node):
            slope *= _slope(network, node, inserted, scale * slope, reach)
    for name in readers:
        tensor_at(network.module, name).data.div_(scale * slope)


def _largest(value: Tensor) -> float:
    return float(value.abs().max())


def _slope(
    network: Network, node: fx.Node, inserted: AbsentLayer, scale: float, reach: float
) -> float:
    """Return the slope of an activation at zero, if it is nearly a straight line on the signal."""
    signal = scale * max(reach, 1.0) * torch.linspace(-4, 4, 81, dtype=torch.float64)
    values = apply_activation(network, node, signal)
    slope = float((values[-1] - values[0]) / (signal[-1] - signal[0]))
    bend = float((values - slope * signal).abs().max())
    if not slope or bend > TOLERANCE * abs(slope) * float(signal[-1]):
        raise no_neutral_form(inserted.name, inserted.passed)  # no slope at zero, or no zero
    return slope


def _contractions_behind(network: Network, name: str) -> list[str] | None:
    """Return the weights of the contractions that alone read a value, scaled or not.

    None if anything else reads it that does not just hand it on, pooled or reshaped.
    """
    weights: dict[str, None] = {}
    waiting = [network.nodes[name]]
    uses = [t for names in network.tensors.values() for t in names]
    while waiting:
        for user in waiting.pop().users:
            tensors = network.weights.get(user.name, [])
            if len(tensors) == 1 and uses.count(tensors[0]) == 1:
                weights[tensors[0]] = None
            elif not _hands_on(network, user):
                return None
            elif network.carries_data(user):
                waiting.append(user)
    return list(weights) or None


def _hands_on(network: Network, node: fx.Node) -> bool:
    """Tell whether a node may do no more than hand its one value on, pooled or reshaped."""
    alone = len(network.inputs_of(node)) <= 1 and node.name not in network.tensors
    bends = network.is_norm(node) or network.is_activation(node)
    return alone and not bends and node.op != "output"
