"""Which contractions a norm stands behind, and networks with these norms folded in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, fx

from .network import Network


@dataclass(frozen=True, eq=False)
class FoldedState:
    """A network's tensors with its norms folded into the weights before them.

    Attributes:
        raw: Every floating-point parameter and buffer by name, as it is.
        factors: Tensor that a norm is folded into -> the axis and the factors `(units,)` along it.
        scales: Per norm node, the factor `(units,)` left to it: ones where it was folded.
        shifts: Per norm node, what it adds `(units,)`.
    """

    raw: dict[str, np.ndarray]
    factors: dict[str, tuple[int, np.ndarray]]
    scales: dict[str, np.ndarray]
    shifts: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a tensor, folded; computed when asked for, so that no second network is held."""
        raw = self.raw[name]
        if name not in self.factors:
            return raw
        dim, factor = self.factors[name]
        along = [-1 if d == dim else 1 for d in range(raw.ndim)]
        folded: np.ndarray = (raw * factor.reshape(along)).astype(raw.dtype)
        return folded


def tensors_of(module: fx.GraphModule) -> list[tuple[str, Tensor]]:
    """Return the floating-point parameters and buffers of a module by name."""
    found = [*module.named_parameters(), *module.named_buffers()]
    return [(name, t) for name, t in found if t.is_floating_point()]


def producers(network: Network) -> dict[str, tuple[str, int]]:
    """Return the nodes that contract one weight used once: its name and the axis it writes."""
    calls: dict[str, int] = {}
    for names in network.book.tensors.values():
        for name in names:
            calls[name] = calls.get(name, 0) + 1
    found = {}
    for node, weights in network.book.weights.items():
        writes = [a.dim for _, a in network.spaces.on(weights[0]) if not a.reads]
        if len(weights) == 1 and calls[weights[0]] == 1 and len(set(writes)) == 1:
            found[node] = (weights[0], writes[0])
    return found


def folds(network: Network) -> dict[str, str]:
    """Return the norm nodes that stand alone behind a producer, and that producer's node."""
    nodes = {n.name: n for n in network.module.graph.nodes}
    able, found = producers(network), {}
    users: dict[str, int] = {}
    for roles in network.book.norms.values():
        users[str(roles["running_mean"])] = users.get(str(roles["running_mean"]), 0) + 1
    for name, roles in network.book.norms.items():
        before = network.inputs_of(nodes[name])[0]
        alone = len(before.users) == 1 and users[str(roles["running_mean"])] == 1
        if before.name in able and alone:
            found[name] = before.name
    return found


def fold(network: Network, folded: dict[str, str]) -> FoldedState:
    """Return a network's tensors with some norms folded into the producers before them.

    Args:
        network: The network; not modified.
        folded: Norm node -> producer node.
    """
    tensors = {n: t.detach().cpu().numpy() for n, t in tensors_of(network.module)}
    able, factors, scales, shifts = producers(network), {}, {}, {}
    for name, roles in network.book.norms.items():
        mean, variance = (tensors[str(roles[r])] for r in ("running_mean", "running_var"))
        spread = np.sqrt(variance.astype(float) + float(roles["eps"]))
        scale = tensors.get(str(roles.get("weight")), 1.0) / spread
        shift = tensors.get(str(roles.get("bias")), 0.0) - mean * scale
        if name in folded:
            weight, dim = able[folded[name]]
            for tensor in network.book.tensors[folded[name]]:
                factors[tensor] = (dim if tensor == weight else 0, scale)
            scale = np.ones_like(scale)
        scales[name], shifts[name] = scale, shift
    return FoldedState(tensors, factors, scales, shifts)
