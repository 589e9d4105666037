"""Compare units by their weights: their rows of every tensor, all its other axes mapped.

Running statistics have no say, and neither have layers that a network has in name only. The weight
of a grouped convolution counts as the dense one it stands for, zero between groups; with one input
per group only its output axis counts, since each row then belongs to one unit whatever it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

from ..calibration.norms import fold_norms, foldable_norms
from ..graph.state import floats_of
from ..ir import Axis, Coupling
from ..spaces.network import Network
from .mixing import Couplings, apply_along
from .problem import Problem, foreign_tensors

CHUNK = 1 << 22  # numbers that are turned to double precision at a time


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products of two networks' rows, summed over tensors.

    Attributes:
        ours: `(n,)` squared norms.
        theirs: `(m,)` squared norms.
        cross: `(n, m)` inner products.
    """

    ours: np.ndarray
    theirs: np.ndarray
    cross: np.ndarray


@dataclass(eq=False)
class Weights:
    """The tensors of all networks that have a say in how their units match, as far as they do.

    A matching puts couplings here as it finds them, and sees tensors carried by these.

    Attributes:
        problem: The networks.
        states: Per network, its tensors by name, without those that have no say.
        couplings: The coupling of each space and network, as far as it is known.
        maps: Maps of axes `(tensor, axis, network)` made so far.
    """

    problem: Problem
    states: tuple[dict[str, np.ndarray], ...]
    couplings: dict[tuple[str, int], Coupling] = field(default_factory=dict)
    maps: dict[tuple[str, int, int], csr_array] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        problem: Problem,
        couplings: dict[tuple[str, int], Coupling] | None = None,
        folded: bool = False,
    ) -> Weights:
        """Gather the tensors of balanced networks, as they are or with norms folded in.

        Args:
            problem: The networks.
            couplings: What is coupled already; what is put is added to it.
            folded: Fold norms by running statistics into the weights before them; what such a
                norm adds counts as a bias, under the name of its running mean.
        """
        alone = foldable_norms(problem.structure)
        states = []
        for network, absent in zip(problem.networks, problem.absent):
            found = _folded(network, alone) if folded else _raw(network)
            foreign = foreign_tensors(network, absent)
            states.append({n: t for n, t in found.items() if n not in foreign})
        return cls(problem, tuple(states), {} if couplings is None else couplings)

    def at(self, couplings: dict[tuple[str, int], Coupling]) -> Weights:
        """Return the same tensors with other couplings."""
        return Weights(self.problem, self.states, self.couplings | couplings)

    def having(self, tensor: str) -> list[int]:
        """Return the networks in which a tensor has a say."""
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
        """Return where a space lies in tensors with a say, in the anchor's coordinates."""
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
        """The spaces on each tensor; the input axis of one input per group follows the other."""
        found = {}
        for tensor in dict.fromkeys(name for state in self.states for name in state):
            places = [(space.name, axis) for space, axis in self.anchor.spaces.on(tensor)]
            shapes = [state[tensor].shape for state in self.states if tensor in state]
            found[tensor] = [
                (name, axis)
                for name, axis in places
                if axis.groups == 1 or any(shape[axis.dim] > 1 for shape in shapes)
            ]
        return found

    def carried(self, tensor: str, k: int, but: int | None = None) -> np.ndarray:
        """Return one network's tensor with every axis mapped, `but` one; dense, if grouped."""
        value = self.dense(tensor, k)
        for dim in self.dims(tensor):
            if dim != but:
                value = apply_along(self.axis_map(tensor, dim, k), value, dim)
        return value

    def dense(self, tensor: str, k: int) -> np.ndarray:
        """Return one network's tensor as it is; dense, if grouped."""
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
        own = self.problem.spaces[name][k].axes
        here = next(a for a in own if (a.tensor, a.dim) == (axis.tensor, axis.dim))
        return unit_rows(self.carried(axis.tensor, k, axis.dim), here)

    def settled(self, axis: Axis, *networks: int) -> bool:
        """Tell whether networks have a tensor, with couplings on all its other axes."""
        across = self.spaces_on(axis.tensor, axis.dim)
        pairs = [(s, k) for s in across for k in networks]
        mapped = all(pair in self.couplings for pair in pairs)
        return mapped and all(axis.tensor in self.states[k] for k in networks)

    def reference(self, name: str) -> int:
        """Return whose units the others' are compared with: the first's, if the base has none."""
        base, here = self.problem.base[name], self.problem.present[name]
        return base if here[base] or not any(here) else here.index(True)

    def products(self, name: str, k: int, axes: list[Axis]) -> Products | None:
        """Compare a network's units with the fused units, as the reference network fills them.

        Args:
            name: The space.
            k: The network.
            axes: Which of the space's axes count; those that are not settled do not.

        Returns:
            Their inner products, or None if there was nothing to compare.
        """
        other, total = self.reference(name), None
        if other == k or (name, other) not in self.couplings:
            return None
        for axis in axes:
            if not self.settled(axis, other, k):
                continue
            a = unit_rows(self.carried(axis.tensor, other), axis)
            b = self.rows(name, axis, k)
            part = Products(squares(a), squares(b), cross(a, b))
            total = part if total is None else _sum(total, part)
        return total


def weight_cost(weights: Weights, name: str, k: int) -> np.ndarray:
    """Return the squared distance `(fused units, units)` between units' weights, as far as settled.

    References:
        Ainsworth et al. 2023 (Git Re-Basin), one step of weight matching.
    """
    found = weights.products(name, k, weights.axes(name))
    if found is None:
        spaces = weights.problem.spaces[name]
        return np.zeros((spaces[weights.problem.base[name]].size, spaces[k].size))
    return squared_distance(found)


def squared_distance(found: Products) -> np.ndarray:
    """Squared Euclidean distance between rows, `(n, m)`."""
    both = found.ours[:, None] + found.theirs[None]
    squares: np.ndarray = np.maximum(both - 2 * found.cross, 0.0)
    return squares


def distance(found: Products) -> np.ndarray:
    """Euclidean distance between rows, `(n, m)`: the ground metric of OTFusion's scripts."""
    root: np.ndarray = np.sqrt(squared_distance(found))
    return root


def unit_norm(found: Products) -> Products:
    """Return the products of the same rows scaled to norm 1; rows of zeros stay."""
    ours, theirs = (np.sqrt(x) for x in (found.ours, found.theirs))
    scale = np.outer(ours, theirs)
    cosine = np.divide(found.cross, scale, out=np.zeros_like(scale), where=scale > 0)
    return Products((ours > 0).astype(float), (theirs > 0).astype(float), cosine)


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
    found: np.ndarray = np.einsum("ij,ij->i", a, a, dtype=float)
    return found


def _sum(a: Products, b: Products) -> Products:
    return Products(a.ours + b.ours, a.theirs + b.theirs, a.cross + b.cross)


def _raw(network: Network) -> dict[str, np.ndarray]:
    roles = network.norms.values()
    statistics = {r[role] for r in roles for role in ("running_mean", "running_var")}
    tensors = floats_of(network.module)
    return {n: t.detach().cpu().numpy() for n, t in tensors.items() if n not in statistics}


def _folded(network: Network, alone: Mapping[str, str]) -> dict[str, np.ndarray]:
    state, roles = fold_norms(network, dict(alone)), network.norms
    of_norms = {t for r in roles.values() for t in r.values()}
    found = {name: state[name] for name in state.raw if name not in of_norms}
    for node, role in roles.items():
        found[str(role["running_mean"])] = state.shifts[node]
        if node not in alone:
            found[str(role["running_var"])] = state.scales[node]
    return found


def _without_groups(weight: np.ndarray, groups: int) -> np.ndarray:
    """Return the dense weight that a grouped one stands for: zero between groups."""
    rows, inner = weight.shape[0] // groups, weight.shape[1]
    dense = np.zeros((weight.shape[0], groups * inner, *weight.shape[2:]), dtype=weight.dtype)
    for g in range(groups):
        here = slice(g * rows, (g + 1) * rows)
        dense[here, g * inner : (g + 1) * inner] = weight[here]
    return dense
