"""How tensors of the networks come together: `sum_k w_k P_k W_k U_k`, axis by axis.

P acts along axes that are written, U along axes that a contraction sums over. Positions that belong
to no space stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.sparse import csr_array, eye_array

from ..errors import PairingError
from ..ir import OUTPUTS, Axis, Coupling, Spaces
from .problem import Problem

LESS = 0.999  # rows of maps that sum to less are of networks that have less of a say there


@dataclass(frozen=True, eq=False)
class Couplings:
    """The maps of all spaces and networks of a problem, and what they make of tensors.

    Attributes:
        problem: The networks, their spaces and shares.
        maps: The coupling of each space and network.
        of_axes: Couplings of single axes `(space, tensor or node, dim, network)` that differ from
            their space's.
    """

    problem: Problem
    maps: Mapping[tuple[str, int], Coupling]
    of_axes: Mapping[tuple[str, str, int, int], Coupling] = field(default_factory=dict)

    def weighted(self, weights: Sequence[float]) -> Couplings:
        """Return the same maps with other shares in the units."""
        return replace(self, problem=self.problem.weighted(weights))

    def mix(self, name: str, values: Sequence[np.ndarray], along: int | None = None) -> np.ndarray:
        """Return the weighted sum over the networks, in fused coordinates.

        Args:
            name: A parameter or buffer.
            values: Each network's tensor of this name; with `along`, vectors `(units,)` over the
                units of that axis of it.
            along: The axis that the vectors lie along.
        """
        shape = values[self.problem.anchor].shape
        if along is not None:
            shape = (self._anchor_spaces().sizes[name, along],)
        total = np.zeros(shape, dtype=values[self.problem.anchor].dtype)
        shares = self.problem.shares(name)
        for k, (share, value) in enumerate(zip(shares, values)):
            if not share:
                continue
            if along is None:
                total += share * self.carry(name, value, k)
            else:
                total += share * (self.axis_map(name, along, k) @ value)
        for dim in range(total.ndim):
            mass = self._mass(name, dim if along is None else along, shares)
            if mass is not None:
                total /= mass.reshape([-1 if d == dim else 1 for d in range(total.ndim)])
        return total

    def pick(self, name: str, values: Sequence[np.ndarray]) -> np.ndarray:
        """Return each entry from one network, in fused coordinates: from the lead, if it has it.

        For buffers, which are no weights: the mean of two masks, or of two tables, is neither.

        Args:
            name: A buffer.
            values: Each network's tensor of this name.
        """
        shares, lead = self.problem.shares(name), self.problem.lead
        having = [k for k, share in enumerate(shares) if share] or [lead]
        picked = np.zeros_like(values[self.problem.anchor])
        empty = np.ones(picked.shape, dtype=bool)
        for k in sorted(having, key=lambda k: (k != lead, -shares[k])):
            carried = self.carry(name, values[k], k)
            mass = self.carry(name, np.ones_like(values[k]), k)
            entries = empty & (mass > 0)
            picked[entries] = carried[entries] / mass[entries]
            empty &= ~entries
        return picked

    def _mass(self, name: str, dim: int, shares: Sequence[float]) -> np.ndarray | None:
        """Return what the maps give to each written position, where a network gives less.

        Where all give, with their usual shares, the scale is the coupling method's own.
        """
        written = [(s, a) for s, a in self._on_axis(name, dim) if not a.reads]
        if self.problem.absent_as_zero:
            return None
        mass = np.ones(self._anchor_spaces().sizes[name, dim])
        usual = np.allclose(shares, self.problem.weights)
        for space, axis in written:
            given = np.array([self.maps[space, k].given for k in range(len(shares))])
            short = (given < LESS).any(0) if usual else True
            here = shares @ given
            mass[axis.index] = np.where(short & (here > 0), here, 1.0)[:, None]
        return mass if (mass != 1.0).any() else None

    def _anchor_spaces(self) -> Spaces:
        return self.problem.structure.spaces

    def carry(self, name: str, tensor: np.ndarray, k: int, but: int | None = None) -> np.ndarray:
        """Return one network's tensor with every axis mapped, `but` one."""
        axes = [a for _, a in self._anchor_spaces().on(name) if a.dim != but]
        dims = dict.fromkeys(a.dim for a in axes)
        others = (d for d in range(tensor.ndim) if d != but)
        dims |= {d: None for d in others if (OUTPUTS, name, d, k) in self.of_axes}
        maps = {d: self.axis_map(name, d, k) for d in dims}
        groups = max((a.groups for a in axes), default=1)
        if groups > 1:
            return _map_grouped(tensor, maps, groups, self._groups(name, k))
        for d, matrix in maps.items():
            tensor = apply_along(matrix, tensor, d)
        return tensor

    def _groups(self, name: str, k: int) -> int:
        return max(a.groups for _, a in self.problem.networks[k].spaces.on(name))

    def _on_axis(self, name: str, dim: int) -> list[tuple[str, Axis]]:
        return [(s.name, a) for s, a in self._anchor_spaces().places.get((name, dim), ())]

    def axis_map(self, name: str, dim: int, k: int) -> csr_array:
        """Return the map `(fused positions, own positions)` along one axis of a tensor."""
        whole = self._whole(name, dim, k)
        if whole is not None:
            return whole
        spaces = [self.problem.networks[i].spaces for i in (self.problem.anchor, k)]
        base, here = ({s.name: a for s, a in x.places.get((name, dim), ())} for x in spaces)
        ours, theirs = (x.sizes[name, dim] for x in spaces)
        return self._positions(name, dim, base, here, ours, theirs, k)

    def feature_map(self, node: str, dim: int, k: int) -> csr_array:
        """Return the map `(fused positions, own positions)` along one axis of a node's output."""
        networks = [self.problem.networks[i] for i in (self.problem.anchor, k)]
        shown = (n.spaces.feature_places.get((node, dim), ()) for n in networks)
        base, here = ({s.name: a for s, a in pairs} for pairs in shown)
        ours, theirs = (n.shapes[node][dim] for n in networks)
        return self._positions(node, dim, base, here, ours, theirs, k)

    def reading_map(self, node: str, dim: int, k: int) -> csr_array:
        """Return the map `(own positions, fused positions)` for what reads a node's output.

        Raises:
            PairingError: If what must stay in place there differs from the anchor's.
        """
        networks = [self.problem.networks[i] for i in (self.problem.anchor, k)]
        places = [n.spaces.feature_places.get((node, dim), ()) for n in networks]
        base, here = ({s.name: replace(a, reads=True) for s, a in shown} for shown in places)
        ours, theirs = (n.shapes[node][dim] for n in networks)
        return csr_array(self._positions(node, dim, base, here, ours, theirs, k).T)

    def _positions(
        self,
        where: str,
        dim: int,
        base: dict[str, Axis],
        here: dict[str, Axis],
        ours: int,
        theirs: int,
        k: int,
    ) -> csr_array:
        """Return the map `(ours, theirs)`, given the spaces on an axis of the anchor and of `k`."""
        rows, columns, data = [], [], []
        fixed = np.ones(ours, dtype=bool), np.ones(theirs, dtype=bool)
        for axis in here.values():
            fixed[1][axis.index] = False
        for space_name, axis in base.items():
            fixed[0][axis.index] = False
            own = self.problem.spaces[space_name][k]
            if not own.size:
                continue
            other = here[own.name]
            own_maps = self.of_axes.get((space_name, where, dim, k))
            coupling = own_maps or self.maps[space_name, k]
            matrix = (coupling.unproject.T if axis.reads else coupling.project).tocoo()
            for m in range(axis.index.shape[1]):
                rows.append(axis.index[matrix.row, m])
                columns.append(other.index[matrix.col, m])
                data.append(matrix.data)
        rows.append(np.flatnonzero(fixed[0]))
        columns.append(np.flatnonzero(fixed[1]))
        if len(rows[-1]) != len(columns[-1]):
            raise _fixed_apart(where, len(rows[-1]), len(columns[-1]))
        matrix = eye_array(len(rows[-1])).tocoo()
        if (OUTPUTS, where, dim, k) in self.of_axes:
            matrix = self.of_axes[OUTPUTS, where, dim, k].project.tocoo()
        rows[-1], columns[-1] = rows[-1][matrix.row], columns[-1][matrix.col]
        data.append(matrix.data)
        places = (np.concatenate(rows), np.concatenate(columns))
        return csr_array((np.concatenate(data), places), shape=(ours, theirs))

    def _whole(self, name: str, dim: int, k: int) -> csr_array | None:
        """Return the map of an axis that is one space and nothing else, unit by unit."""
        found = self._anchor_spaces().places.get((name, dim), ())
        other = self.problem.networks[k].spaces.places.get((name, dim), ())
        if len(found) != 1 or len(other) != 1:
            return None
        for network, (_, axis) in ((self.problem.anchor, found[0]), (k, other[0])):
            size = self.problem.networks[network].spaces.sizes[name, dim]
            if not np.array_equal(axis.index, np.arange(size)[:, None]):
                return None
        space = found[0][0].name
        if self.problem.spaces[space][k] is not other[0][0]:
            return None
        coupling = self.of_axes.get((space, name, dim, k)) or self.maps[space, k]
        return csr_array(coupling.unproject.T) if found[0][1].reads else coupling.project


def _fixed_apart(where: str, ours: int, theirs: int) -> PairingError:
    return PairingError(
        f"{ours} and {theirs} positions that must stay in place",
        where=f"'{where}'",
        expected="equally many in all networks",
        do="fuse networks that agree in everything but depth and width, or cut them elsewhere",
    )


def apply_along(matrix: csr_array, tensor: np.ndarray, dim: int) -> np.ndarray:
    """Apply a map `(new, old)` along one axis of a tensor."""
    if (np.diff(matrix.indptr) == 1).all():  # one unit for each: no sums
        still = np.array_equal(matrix.indices, np.arange(matrix.shape[1]))
        taken = tensor if still else np.take(tensor, matrix.indices, axis=dim)
        if (matrix.data == 1).all():
            return taken
        along = [-1 if d == dim else 1 for d in range(tensor.ndim)]
        factors = matrix.data.astype(tensor.dtype).reshape(along)
        scaled: np.ndarray = np.multiply(taken, factors, out=None if still else taken)
        return scaled
    moved = np.moveaxis(tensor, dim, 0)
    flat = np.ascontiguousarray(moved).reshape(len(moved), -1)
    matrix = matrix.astype(flat.dtype)
    dense = matrix.nnz * 32 > matrix.shape[0] * matrix.shape[1]
    mapped = (matrix.toarray() if dense else matrix) @ flat
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
