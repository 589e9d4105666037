"""Emit the fused network: every weight mixed by the maps of the spaces its axes lie in.

`W* = sum_k w_k P_k W_k U_k` on every tensor: P along axes that are written, U along axes that are
summed over. Norms with running statistics are first folded into the weights before them, because
the scale of a raw filter is arbitrary; `refit` puts them back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array, eye_array
from torch import Tensor, fx

from .balancing import Balanced
from .coupling import Correspondence, Measurements, absent_tensors
from .ir import Axis, Coupling, Spaces
from .network import Network


@dataclass(frozen=True, eq=False)
class NormPlan:
    """What a norm of the fused network has to compute.

    Attributes:
        node: The norm's node.
        reads: The node before it.
        scale: `(units,)` factor on its input, in the mixed network.
        shift: `(units,)` what is added then.
        mean: `(units,)` mean of its output that the parents ask for, None where not measured.
        spread: `(units,)` standard deviation likewise.
    """

    node: str
    reads: str
    scale: np.ndarray
    shift: np.ndarray
    mean: np.ndarray | None
    spread: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Mixer:
    """Carries tensors of every network into the fused network's coordinates and adds them up.

    Attributes:
        balanced: The networks.
        anchor: Index of the network whose structure the fused one has.
        match: Their spaces.
        couplings: The maps.
        weights: `(networks,)` shares, sum 1.
    """

    balanced: Balanced
    anchor: int
    match: Correspondence
    couplings: dict[tuple[str, int], Coupling]
    weights: Sequence[float]

    def mix(self, name: str, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """Return the weighted sum of one tensor over the networks, in fused coordinates."""
        total = 0.0
        for k, (share, tensor) in enumerate(zip(self.shares(name), tensors)):
            if share:
                total = total + share * self.carry(name, tensor, k)
        return total

    def shares(self, name: str) -> list[float]:
        """Return each network's share of a tensor.

        A network without a block adds nothing to the stream the block writes to, which is a real
        value; the inside of the block belongs to the others alone.
        """
        gone = [
            name in absent_tensors(n, a)
            for n, a in zip(self.balanced.networks, self.balanced.absent)
        ]
        shares = [0.0 if g else w for g, w in zip(gone, self.weights)]
        spaces = [
            s for s in self._anchor_spaces() for a in s.axes if a.tensor == name and not a.reads
        ]
        inside = spaces and all(not p for g, p in zip(gone, self._present(spaces)) if g)
        if any(gone) and inside and sum(shares):
            shares = [s / sum(shares) for s in shares]
        return shares

    def _present(self, spaces: Sequence) -> list[bool]:
        """Tell for each network whether it really has any of some spaces."""
        rows = [self.match.present[s.name] for s in spaces]
        return [any(column) for column in zip(*rows)]

    def _anchor_spaces(self) -> Spaces:
        return self.balanced.networks[self.anchor].spaces

    def carry(self, name: str, tensor: np.ndarray, k: int) -> np.ndarray:
        """Return one network's tensor with every axis mapped."""
        axes = {}
        for space in self._anchor_spaces():
            for axis in space.axes:
                if axis.tensor == name:
                    axes.setdefault(axis.dim, []).append((space.name, axis))
        maps = {d: self._axis_map(name, d, found, k) for d, found in axes.items()}
        groups = max((a.groups for found in axes.values() for _, a in found), default=1)
        if groups > 1:
            return _map_grouped(tensor, maps, groups, self._groups(name, k))
        for d, matrix in maps.items():
            tensor = _apply(matrix, tensor, d)
        return tensor

    def _groups(self, name: str, k: int) -> int:
        axes = (a for s in self.balanced.networks[k].spaces for a in s.axes if a.tensor == name)
        return max(a.groups for a in axes)

    def _axis_map(self, name: str, dim: int, found: list[tuple[str, Axis]], k: int) -> csr_array:
        """Return the map `(fused positions, own positions)` of one tensor axis."""
        ours = self._anchor_spaces().sizes[name, dim]
        theirs = self.balanced.networks[k].spaces.sizes[name, dim]
        rows, columns, data = [], [], []
        fixed = np.ones(ours, dtype=bool), np.ones(theirs, dtype=bool)
        for space_name, axis in found:
            own = self.match.spaces[space_name][k]
            other = next(a for a in own.axes if (a.tensor, a.dim) == (name, dim))
            coupling = self.couplings[space_name, k]
            matrix = (coupling.unproject.T if axis.reads else coupling.project).tocoo()
            for m in range(axis.index.shape[1]):
                rows.append(axis.index[matrix.row, m])
                columns.append(other.index[matrix.col, m])
                data.append(matrix.data)
            fixed[0][axis.index], fixed[1][other.index] = False, False
        rows.append(np.flatnonzero(fixed[0]))
        columns.append(np.flatnonzero(fixed[1]))
        data.append(np.ones(len(rows[-1])))
        where = (np.concatenate(rows), np.concatenate(columns))
        return csr_array((np.concatenate(data), where), shape=(ours, theirs))


def _apply(matrix: csr_array, tensor: np.ndarray, dim: int) -> np.ndarray:
    moved = np.moveaxis(tensor, dim, 0)
    if (
        matrix.nnz == matrix.shape[0]
        and (matrix.data == 1).all()
        and (np.diff(matrix.indptr) == 1).all()
    ):
        return np.moveaxis(moved[matrix.indices], 0, dim)  # units move, none mix
    flat = np.ascontiguousarray(moved).reshape(len(moved), -1)
    mapped = matrix.astype(flat.dtype) @ flat
    return np.moveaxis(mapped.reshape(matrix.shape[0], *moved.shape[1:]), 0, dim)


def _map_grouped(
    tensor: np.ndarray, maps: dict[int, csr_array], ours: int, theirs: int
) -> np.ndarray:
    """Map the weight of a grouped convolution, group by group.

    A fused group reads its own inputs only, so the shares of its unproject map are taken within
    the group of the other network that they come from.
    """
    rows, inner = tensor.shape[0] // theirs, tensor.shape[1]
    out = maps.get(0, csr_array(eye_array(tensor.shape[0]))).toarray()
    dense = maps.get(1, csr_array(eye_array(inner * theirs))).toarray()
    out = out.reshape(ours, -1, theirs, rows)
    dense = dense.reshape(ours, -1, theirs, inner)
    mixed = np.zeros((ours, out.shape[1], dense.shape[1], *tensor.shape[2:]), dtype=tensor.dtype)
    own = tensor.reshape(theirs, rows, inner, -1)
    for i, j in np.argwhere(np.abs(out).sum((1, 3)) > 0):
        reads = dense[i, :, j].T
        mass = reads.sum(1, keepdims=True)
        reads = np.divide(reads, mass, out=np.zeros_like(reads), where=mass > 0)
        part = np.einsum("po,oit,iq->pqt", out[i, :, j], own[j], reads, optimize=True)
        mixed[i] += part.reshape(mixed.shape[1:])
    return mixed.reshape(ours * out.shape[1], *mixed.shape[2:])


# --- folding and emitting -------------------------------------------------------------------------


def emit(mixer: Mixer, measured: Measurements) -> tuple[fx.GraphModule, list[NormPlan]]:
    """Build the fused network, with its norms still to be settled, and what they have to compute."""
    base = mixer.balanced.networks[mixer.anchor]
    folds = _folds(base)
    states = [_folded_state(n, folds) for n in mixer.balanced.networks]
    module = copy.deepcopy(base.module)
    norm_tensors = {v for roles in base.book.norms.values() for v in roles.values()}
    for name, tensor in _tensors(module):
        if name not in norm_tensors and tensor.is_floating_point():
            mixed = mixer.mix(name, [s.tensors[name] for s in states])
            tensor.data.copy_(torch.as_tensor(np.ascontiguousarray(mixed)))
    plans = [_norm_plan(mixer, states, measured, node) for node in base.book.norms]
    return module, [p for p in plans if p is not None]


def _tensors(module: fx.GraphModule) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


@dataclass(frozen=True, eq=False)
class _State:
    tensors: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]
    shifts: dict[str, np.ndarray]


def _folds(network: Network) -> dict[str, tuple[str, int]]:
    """Return, per norm node, the weight right before it and the axis that the weight writes."""
    folds = {}
    calls: dict[str, int] = {}
    for names in network.book.tensors.values():
        for name in names:
            calls[name] = calls.get(name, 0) + 1
    nodes = {n.name: n for n in network.module.graph.nodes}
    for name, roles in network.book.norms.items():
        before = network.inputs_of(nodes[name])[0]
        weights = network.book.weights.get(before.name, [])
        alone = len(before.users) == 1 and len(weights) == 1
        once = all(calls[t] == 1 for t in [*weights, str(roles["running_mean"])])
        dim = _written_axis(network, weights[0], str(roles["running_mean"])) if alone else None
        if alone and once and dim is not None:
            folds[name] = (weights[0], dim)
    return folds


def _written_axis(network: Network, weight: str, statistics: str) -> int | None:
    for space in network.spaces:
        own = [a.dim for a in space.axes if a.tensor == weight and not a.reads]
        if len(own) == 1 and any(a.tensor == statistics for a in space.axes):
            return own[0]
    return None


def _folded_state(network: Network, folds: dict[str, tuple[str, int]]) -> _State:
    tensors = {
        n: t.detach().cpu().numpy() for n, t in _tensors(network.module) if t.is_floating_point()
    }
    scales, shifts = {}, {}
    nodes = {n.name: n for n in network.module.graph.nodes}
    for name, roles in network.book.norms.items():
        scale = 1.0 / np.sqrt(tensors[roles["running_var"]].astype(float) + float(roles["eps"]))
        if "weight" in roles:
            scale = scale * tensors[roles["weight"]]
        shift = -tensors[roles["running_mean"]] * scale
        if "bias" in roles:
            shift = shift + tensors[roles["bias"]]
        if name in folds:
            weight, dim = folds[name]
            before = network.inputs_of(nodes[name])[0].name
            for tensor in network.book.tensors[before]:
                old = tensors[tensor]
                axis = dim if tensor == weight else 0
                along = [-1 if d == axis else 1 for d in range(old.ndim)]
                tensors[tensor] = (old * scale.reshape(along)).astype(old.dtype)
            scale = np.ones_like(scale)
        scales[name], shifts[name] = scale, shift
    return _State(tensors, scales, shifts)


def _norm_plan(
    mixer: Mixer, states: Sequence[_State], measured: Measurements, node: str
) -> NormPlan | None:
    base = mixer.balanced.networks[mixer.anchor]
    statistics = str(base.book.norms[node]["running_mean"])
    found = measured.norms.get(node, ())
    zero = np.zeros(1)
    means = [zero if m is None else m[0] for m in found]
    spreads = [zero if m is None else m[1] for m in found]
    shares = mixer.shares(statistics)
    known = all(m is not None or not share for m, share in zip(found, shares))
    nodes = {n.name: n for n in base.module.graph.nodes}
    return NormPlan(
        node,
        base.inputs_of(nodes[node])[0].name,
        mixer.mix(statistics, [s.scales[node] for s in states]),
        mixer.mix(statistics, [s.shifts[node] for s in states]),
        mixer.mix(statistics, means) if known else None,
        mixer.mix(statistics, spreads) if known else None,
    )
