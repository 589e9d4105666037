"""Compare units by their weights: their rows of every tensor, all its other axes mapped.

Running statistics do not count, nor do layers that a network has in name only. The weight of a
grouped convolution counts as the dense one with the same function, zero between groups; with one
input per group only its output axis counts, as each row belongs to one unit whatever it reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

from ..graph.state import floats_of
from ..ir import Axis, Coupling
from ..spaces.network import Network
from .mixing import Couplings, apply_along
from .problem import Problem, foreign_tensors

TIE_BREAK = 1e-3  # weight of the distance beside the angle, relative to the average distance
CHUNK = 1 << 22  # numbers that are turned to double precision at a time


@dataclass(eq=False)
class Weights:
    """The tensors that count when units are matched, and the couplings found so far.

    A matching puts its couplings here one by one, and sees tensors carried by them.

    Attributes:
        problem: The networks.
        states: Per network, its tensors by name, without those that do not count.
        couplings: The coupling of each space and network that has one so far.
        maps: Maps of axes `(tensor, axis, network)` made so far.
    """

    problem: Problem
    states: tuple[dict[str, np.ndarray], ...]
    couplings: dict[tuple[str, int], Coupling] = field(default_factory=dict)
    maps: dict[tuple[str, int, int], csr_array] = field(default_factory=dict)

    @classmethod
    def of(
        cls, problem: Problem, couplings: dict[tuple[str, int], Coupling] | None = None
    ) -> Weights:
        """Gather the tensors of balanced networks.

        Args:
            problem: The networks.
            couplings: What is coupled already; new couplings are added to it.
        """
        states = []
        for network, absent in zip(problem.networks, problem.absent):
            roles = network.norms.values()
            ignored = {r[role] for r in roles for role in ("running_mean", "running_var")}
            ignored |= foreign_tensors(network, absent)
            tensors = floats_of(network.module).items()
            states.append({n: t.detach().cpu().numpy() for n, t in tensors if n not in ignored})
        return cls(problem, tuple(states), {} if couplings is None else couplings)

    def at(self, couplings: dict[tuple[str, int], Coupling]) -> Weights:
        """Return the same tensors with other couplings."""
        return Weights(self.problem, self.states, self.couplings | couplings)

    def having(self, tensor: str) -> list[int]:
        """Return the networks in which a tensor counts."""
        return [k for k, state in enumerate(self.states) if tensor in state]

    def forget(self, name: str, k: int) -> None:
        """Take a coupling away, and the maps made of it."""
        self.couplings.pop((name, k), None)
        for axis in self.problem.spaces[name][k].axes:
            self.maps.pop((axis.tensor, axis.dim, k), None)

    def put(self, name: str, k: int, coupling: Coupling) -> None:
        """Set the coupling of a space."""
        self.forget(name, k)
        self.couplings[name, k] = coupling

    def axes(self, name: str) -> list[Axis]:
        """Return where a space lies in tensors that count, in the anchor's coordinates."""
        axes = self.anchor.spaces[name].axes
        return [a for a in axes if (name, a) in self.places(a.tensor)]

    def places(self, tensor: str) -> list[tuple[str, Axis]]:
        """Return the spaces on the axes of a tensor and where, in the anchor's coordinates."""
        return self._places.get(tensor, [])

    def dims(self, tensor: str) -> list[int]:
        """Return the axes of a tensor along which units lie."""
        return list(dict.fromkeys(axis.dim for _, axis in self.places(tensor)))

    def spaces_on(self, tensor: str, but: int | None = None) -> list[str]:
        """Return the spaces that lie on the axes of a tensor, one axis left out."""
        return [name for name, axis in self.places(tensor) if axis.dim != but]

    @property
    def anchor(self) -> Network:
        """The network whose structure the fused one has."""
        return self.problem.structure

    @cached_property
    def _places(self) -> dict[str, list[tuple[str, Axis]]]:
        """The spaces on each tensor; the input axis of one input per group does not count."""
        counted = {}
        for tensor in dict.fromkeys(name for state in self.states for name in state):
            places = [(space.name, axis) for space, axis in self.anchor.spaces.on(tensor)]
            shapes = [state[tensor].shape for state in self.states if tensor in state]
            counted[tensor] = [
                (name, axis)
                for name, axis in places
                if axis.groups == 1 or any(shape[axis.dim] > 1 for shape in shapes)
            ]
        return counted

    def carried(self, tensor: str, k: int, but: int | None = None) -> np.ndarray:
        """Return one network's tensor, dense if grouped, with every axis mapped `but` one."""
        value = self.dense(tensor, k)
        for dim in self.dims(tensor):
            if dim != but:
                value = apply_along(self.axis_map(tensor, dim, k), value, dim)
        return value

    def dense(self, tensor: str, k: int) -> np.ndarray:
        """Return one network's tensor, dense if grouped."""
        value, places = self.states[k][tensor], self.problem.networks[k].spaces.places
        for dim in self.dims(tensor):
            groups = max((a.groups for _, a in places.get((tensor, dim), ())), default=1)
            if groups > 1:
                value = _without_groups(value, groups)
        return value

    def axis_map(self, tensor: str, dim: int, k: int) -> csr_array:
        """Return the map along one axis of a tensor, kept until a coupling on it changes."""
        key = (tensor, dim, k)
        if key not in self.maps:
            self.maps[key] = Couplings(self.problem, self.couplings).axis_map(*key)
        return self.maps[key]

    def rows(self, name: str, axis: Axis, k: int) -> np.ndarray:
        """Return the units' rows `(units, rest)` of one tensor, all its other axes mapped.

        Args:
            name: The space.
            axis: Where it lies, as the anchor has it.
            k: The network.
        """
        axes = self.problem.spaces[name][k].axes
        same = next(a for a in axes if (a.tensor, a.dim) == (axis.tensor, axis.dim))
        return unit_rows(self.carried(axis.tensor, k, axis.dim), same)

    def settled(self, axis: Axis, *networks: int) -> bool:
        """Tell whether networks have a tensor, with couplings on all its other axes."""
        across = self.spaces_on(axis.tensor, axis.dim)
        return all(axis.tensor in self.states[k] for k in networks) and all(
            (name, k) in self.couplings for name in across for k in networks
        )

    def reference(self, name: str) -> int:
        """Return whose units the others' are compared with: the first's, if the base has none."""
        base, present = self.problem.base[name], self.problem.present[name]
        return base if present[base] or not any(present) else present.index(True)

    def distances(self, name: str, k: int, axes: list[Axis]) -> np.ndarray | None:
        """Compare a network's units with the fused units, as the reference network fills them.

        Args:
            name: The space.
            k: The network.
            axes: Which of the space's axes count; those that are not settled do not.

        Returns:
            The squared distances `(fused units, units)` of their rows; None if there are no rows.
        """
        return squared_distances(self._pieces(name, k, axes))

    def angles(self, name: str, k: int) -> np.ndarray | None:
        """Compare directions only: of what writes the units, and of what reads them.

        Returns:
            One minus the cosine of the rows `(fused units, units)`, the mean of both kinds; None if
            there are no rows.
        """
        axes = self.axes(name)
        kinds = ([a for a in axes if a.reads == reads] for reads in (False, True))
        costs = [squared_distances(self._pieces(name, k, kind), cosine=True) for kind in kinds]
        having = [cost for cost in costs if cost is not None]
        return np.mean(having, 0) if having else None

    def _pieces(
        self, name: str, k: int, axes: list[Axis]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the rows of the reference network and of another, tensor by tensor."""
        other = self.reference(name)
        if other == k or (name, other) not in self.couplings:
            return
        for axis in axes:
            if self.settled(axis, other, k):
                ours = unit_rows(self.carried(axis.tensor, other), axis)
                yield ours, self.rows(name, axis, k)


def weight_cost(weights: Weights, name: str, k: int) -> np.ndarray:
    """Return the cost `(fused units, units)` between units' weights, as far as settled.

    This is the squared distance, or one minus the cosine where rows of equal units may differ in
    size: where no weight reads the units, and where a space is wider, so that each copy of a unit
    is read with a part of the weight. Equal angles, as those of single numbers are, are told apart
    by the distance.

    References:
        Ainsworth et al. 2023 (Git Re-Basin), one step of weight matching.
    """
    problem, axes = weights.problem, weights.axes(name)
    shape = problem.base_space(name).size, problem.spaces[name][k].size
    far = weights.distances(name, k, axes) if shape[0] == shape[1] else None
    if far is not None and name not in problem.unread:
        return far
    cost = weights.angles(name, k)
    if cost is None:
        return np.zeros(shape)
    return cost if far is None else cost + TIE_BREAK * far / max(float(far.mean()), 1e-30)


def squared_distances(
    pieces: Iterable[tuple[np.ndarray, np.ndarray]], cosine: bool = False
) -> np.ndarray | None:
    """Return the squared Euclidean distances `(n, m)` between rows given piece by piece.

    Args:
        pieces: Some columns of the rows, `(n, columns)` and `(m, columns)` at a time.
        cosine: Return one minus the cosines of the rows instead.

    Returns:
        The distances; None if there are no pieces.
    """
    total = None
    for a, b in pieces:
        part = squares(a), squares(b), cross(a, b)
        total = part if total is None else tuple(x + y for x, y in zip(total, part))
    if total is None:
        return None
    ours, theirs, products = total
    if cosine:
        sizes = np.sqrt(np.outer(ours, theirs))
        cosines = np.divide(products, sizes, out=np.zeros_like(sizes), where=sizes > 0)
        angles: np.ndarray = np.maximum(1 - cosines, 0.0)
        return angles
    distances: np.ndarray = np.maximum(ours[:, None] + theirs[None] - 2 * products, 0.0)
    return distances


def unit_rows(tensor: np.ndarray, axis: Axis) -> np.ndarray:
    """Return what a tensor holds of each unit of an axis, `(units, rest)`."""
    moved: np.ndarray = np.moveaxis(tensor, axis.dim, 0)[axis.index]
    return moved.reshape(len(axis.index), -1)


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the inner products `(n, m)` of rows, summed in double precision piece by piece."""
    step = max(CHUNK // max(len(a), len(b), 1), 1)
    total = np.zeros((len(a), len(b)))
    for i in range(0, a.shape[1], step):
        part = slice(i, i + step)
        total += a[:, part].astype(float) @ b[:, part].astype(float).T
    return total


def squares(a: np.ndarray) -> np.ndarray:
    """Return the squared norm of each row, `(n,)`."""
    norms: np.ndarray = np.einsum("ij,ij->i", a, a, dtype=float)
    return norms


def _without_groups(weight: np.ndarray, groups: int) -> np.ndarray:
    """Return the dense weight with the function of a grouped one: zero between groups."""
    rows, inner = weight.shape[0] // groups, weight.shape[1]
    dense = np.zeros((weight.shape[0], groups * inner, *weight.shape[2:]), dtype=weight.dtype)
    for g in range(groups):
        group = slice(g * rows, (g + 1) * rows)
        dense[group, g * inner : (g + 1) * inner] = weight[group]
    return dense
