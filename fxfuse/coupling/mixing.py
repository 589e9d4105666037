"""How tensors of the networks come together: `sum_k w_k P_k W_k U_k`, axis by axis.

P acts along axes that are written, U along axes that a contraction sums over. Positions that belong
to no space stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, TypeVar

import numpy as np
from scipy.sparse import csr_array, eye_array
from torch import Tensor

from ..errors import PairingError
from ..ir import OUTPUTS, Axis, Coupling, Space, Spaces
from .problem import Problem

Values = TypeVar("Values", np.ndarray, Tensor)
OnAxis = Sequence[tuple[Space, Axis]]  # the spaces on an axis, and where

Tensors = Sequence[np.ndarray]  # of each network, in the same units
Named = Iterable[tuple[str, Tensors]]
Rule = Callable[[str, Tensors], np.ndarray]  # name and tensors to one tensor

LESS = 0.999  # a row of a map that sums to less: the network counts less in that fused unit


class Mixer(Protocol):
    """What becomes of the networks' tensors once they lie in the same units.

    Inherit from it for the defaults. Without one, it is their weighted mean.

    Attributes:
        everywhere: Whether every network must have every layer.
    """

    everywhere: ClassVar[bool] = False

    def shares(self, given: tuple[float, ...]) -> tuple[float, ...]:
        """Return the networks' shares in the outputs that are wanted, sum 1.

        Args:
            given: Those that the caller gave, sum 1.
        """
        return given

    def __call__(self, named: Callable[[], Named], shares: Sequence[float]) -> Rule:
        """Look at all tensors, if that is needed; return the rule for each.

        Args:
            named: Goes through the tensors of all networks by name, as often as it is called.
            shares: What `shares` returned; of the networks that have it, for each tensor.
        """


@dataclass(frozen=True, eq=False)
class Couplings:
    """The maps of all spaces and networks of a problem, and what they make of tensors.

    Attributes:
        problem: The networks, their spaces and shares.
        maps: The coupling of each space and network.
        of_axes: Couplings of single axes `(space, tensor or node, dim, network)` that differ from
            their space's.
        siblings: Whether the units of all networks agree by index and are matched so.
        mixer: What becomes of tensors in the same units; None for their weighted mean.
    """

    problem: Problem
    maps: Mapping[tuple[str, int], Coupling]
    of_axes: Mapping[tuple[str, str, int, int], Coupling] = field(default_factory=dict)
    siblings: bool = False
    mixer: Mixer | None = None

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
            shape = (self._spaces.sizes[name, along],)
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
                if along is None and len(mass) != total.shape[dim]:  # a group stores its own
                    rows = mass.reshape(-1, total.shape[dim])
                    mass = np.repeat(rows, len(total) // len(rows), axis=0)
                    total /= mass.reshape(*mass.shape, *[1] * (total.ndim - 2))
                else:
                    total /= mass.reshape([-1 if d == dim else 1 for d in range(total.ndim)])
        return total

    def apart(self, name: str, values: Tensors) -> list[np.ndarray]:
        """Return each network's tensor in fused coordinates, as if it alone were fused.

        Args:
            name: A parameter or buffer.
            values: Each network's tensor of this name.
        """
        count = len(values)
        alone = [[float(j == k) for j in range(count)] for k in range(count)]
        return [self.weighted(shares).mix(name, values) for shares in alone]

    def pick(self, name: str, values: Sequence[np.ndarray]) -> np.ndarray:
        """Return each entry from one network, in fused coordinates: from the lead, if it has it.

        For buffers, which are no weights: the mean of two masks is no mask.

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
        if self.problem.absent_as_zero:
            return None
        mass = np.ones(self._spaces.sizes[name, dim])
        usual = np.allclose(shares, self.problem.weights)
        for space, axis in self._spaces.places.get((name, dim), ()):
            if not axis.reads:
                given = np.array([self.maps[space.name, k].given for k in range(len(shares))])
                less = (given < LESS).any(0) if usual else True
                total = shares @ given
                mass[axis.index] = np.where(less & (total > 0), total, 1.0)[:, None]
        return mass if (mass != 1.0).any() else None

    @property
    def _spaces(self) -> Spaces:
        return self.problem.structure.spaces

    def carry(self, name: str, tensor: np.ndarray, k: int) -> np.ndarray:
        """Return one network's tensor with every axis mapped."""
        axes = [a for _, a in self._spaces.on(name)]
        dims = dict.fromkeys(a.dim for a in axes)
        dims |= {d: None for d in range(tensor.ndim) if (OUTPUTS, name, d, k) in self.of_axes}
        maps = {d: self.axis_map(name, d, k) for d in dims}
        groups = max((a.groups for a in axes), default=1)
        if groups > 1:
            theirs = max(a.groups for _, a in self.problem.networks[k].spaces.on(name))
            grouped = max(axes, key=lambda a: a.groups)
            return _map_grouped(tensor, maps, (groups, theirs), grouped.reads)
        for d, matrix in maps.items():
            tensor = apply_along(matrix, tensor, d)
        return tensor

    def axis_map(self, name: str, dim: int, k: int) -> csr_array:
        """Return the map `(fused positions, own positions)` along one axis of a tensor."""
        both = self._spaces, self.problem.networks[k].spaces
        axes: list[OnAxis] = [spaces.places.get((name, dim), ()) for spaces in both]
        sizes = [spaces.sizes[name, dim] for spaces in both]
        if len(axes[0]) == len(axes[1]) == 1:
            (space, axis), (same, other) = axes[0][0], axes[1][0]
            whole = [np.arange(size)[:, None] for size in sizes]
            if (
                self.problem.spaces[space.name][k] is same
                and np.array_equal(axis.index, whole[0])
                and np.array_equal(other.index, whole[1])
            ):  # one space and nothing else, unit by unit
                coupling = self._coupling(space.name, name, dim, k)
                return csr_array(coupling.unproject.T) if axis.reads else coupling.project
        return self._positions(name, dim, k, axes, sizes)

    def feature_map(self, node: str, dim: int, k: int, reads: bool = False) -> csr_array:
        """Return the map `(fused positions, own positions)` along one axis of a node's output.

        Args:
            node: The node.
            dim: The axis.
            k: The network.
            reads: Whether the map is for what reads the output, which takes its transpose.

        Raises:
            PairingError: If what must stay in place there differs from the anchor's.
        """
        both = self.problem.structure, self.problem.networks[k]
        axes = [
            [
                (space, replace(axis, reads=reads))
                for space, axis in n.spaces.feature_places.get((node, dim), ())
            ]
            for n in both
        ]
        return self._positions(node, dim, k, axes, [n.shapes[node][dim] for n in both])

    def _coupling(self, space: str, where: str, dim: int, k: int) -> Coupling:
        return self.of_axes.get((space, where, dim, k)) or self.maps[space, k]

    def _positions(
        self,
        where: str,
        dim: int,
        k: int,
        axes: Sequence[OnAxis],
        sizes: Sequence[int],
    ) -> csr_array:
        """Return the map of all positions along an axis of the anchor and one of network `k`.

        Args:
            where: The tensor or node.
            dim: The axis.
            k: The network.
            axes: The spaces that lie on the axis, of the anchor and of the network.
            sizes: The sizes of the axis in both.
        """
        rows, columns, data = [], [], []
        fixed = [np.ones(size, dtype=bool) for size in sizes]
        for mask, spaces in zip(fixed, axes):
            for _, axis in spaces:
                mask[axis.index] = False
        theirs = {space.name: axis for space, axis in axes[1]}
        for space, axis in axes[0]:
            same = self.problem.spaces[space.name][k]
            if not same.size:
                continue
            coupling = self._coupling(space.name, where, dim, k)
            matrix = (coupling.unproject.T if axis.reads else coupling.project).tocoo()
            for m in range(axis.index.shape[1]):
                rows.append(axis.index[matrix.row, m])
                columns.append(theirs[same.name].index[matrix.col, m])
                data.append(matrix.data)
        still = [np.flatnonzero(mask) for mask in fixed]
        if len(still[0]) != len(still[1]):
            raise _fixed_apart(where, len(still[0]), len(still[1]))
        matrix = eye_array(len(still[0])).tocoo()
        if (OUTPUTS, where, dim, k) in self.of_axes:
            matrix = self.of_axes[OUTPUTS, where, dim, k].project.tocoo()
        rows.append(still[0][matrix.row])
        columns.append(still[1][matrix.col])
        data.append(matrix.data)
        places = (np.concatenate(rows), np.concatenate(columns))
        return csr_array((np.concatenate(data), places), shape=(sizes[0], sizes[1]))


def _fixed_apart(where: str, ours: int, theirs: int) -> PairingError:
    return PairingError(
        f"{ours} and {theirs} positions that must stay in place",
        where=f"'{where}'",
        expected="equally many in all networks",
        do="fuse networks that agree in everything but depth and width, or cut them elsewhere",
    )


def apply_along(matrix: csr_array, tensor: np.ndarray, dim: int) -> np.ndarray:
    """Apply a map `(new, old)` along one axis of a tensor."""
    if (np.diff(matrix.indptr) == 1).all():  # each position takes one: nothing is summed
        still = np.array_equal(matrix.indices, np.arange(matrix.shape[1]))
        taken = tensor if still else np.take(tensor, matrix.indices, axis=dim)
        if (matrix.data == 1).all():
            return taken
        shape = [-1 if d == dim else 1 for d in range(tensor.ndim)]
        factors = matrix.data.astype(tensor.dtype).reshape(shape)
        scaled: np.ndarray = np.multiply(taken, factors, out=None if still else taken)
        return scaled
    moved = np.moveaxis(tensor, dim, 0)
    flat = np.ascontiguousarray(moved).reshape(len(moved), -1)
    matrix = matrix.astype(flat.dtype)
    dense = matrix.nnz * 32 > matrix.shape[0] * matrix.shape[1]
    mapped = (matrix.toarray() if dense else matrix) @ flat
    return np.moveaxis(mapped.reshape(matrix.shape[0], *moved.shape[1:]), 0, dim)


def _map_grouped(
    tensor: np.ndarray, maps: dict[int, csr_array], counts: tuple[int, int], reads: bool
) -> np.ndarray:
    """Map the weight of a grouped convolution, group by group.

    A fused group reads its own inputs only, so the shares of its unproject map are taken within
    the group of the other network that they come from.

    Args:
        tensor: The weight.
        maps: The map along each axis that has one.
        counts: Number of groups of the fused network, and of that of the weight.
        reads: Whether the second axis is that of the inputs; if not, the convolution is transposed.
    """
    ours, theirs = counts
    if not reads:
        exchanged = {1 - d: matrix for d, matrix in maps.items()}
        return turned(_map_grouped(turned(tensor, theirs), exchanged, counts, True), ours)
    rows, inner = tensor.shape[0] // theirs, tensor.shape[1]
    write = maps.get(0, csr_array(eye_array(tensor.shape[0]))).toarray()
    read = maps.get(1, csr_array(eye_array(inner * theirs))).toarray()
    write = write.reshape(ours, -1, theirs, rows)
    read = read.reshape(ours, -1, theirs, inner)
    mixed = np.zeros((ours, write.shape[1], read.shape[1], *tensor.shape[2:]), dtype=tensor.dtype)
    groups = tensor.reshape(theirs, rows, inner, -1)
    for i, j in np.argwhere(np.abs(write).sum((1, 3)) > 0):
        share = read[i, :, j].T
        mass = share.sum(1, keepdims=True)
        share = np.divide(share, mass, out=np.zeros_like(share), where=mass > 0)
        part = np.einsum("po,oit,iq->pqt", write[i, :, j], groups[j], share, optimize=True)
        mixed[i] += part.reshape(mixed.shape[1:])
    return mixed.reshape(ours * write.shape[1], *mixed.shape[2:])


def turned(weight: Values, groups: int) -> Values:
    """Exchange the axes of inputs and outputs of a grouped weight, an array or a tensor."""
    parts = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
    return parts.reshape(-1, *parts.shape[2:])
