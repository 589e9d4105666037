"""Which space of each balanced network is which, and in whose coordinates the fused space is.

Mix one tensor of all networks: `sum_k w_k P_k W_k U_k`, with the maps of its axes' spaces.

P acts along axes that are written, U along axes that a contraction sums over. Positions that belong
to no space stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array, eye_array

from ..calibration.norms import foldable_norms
from ..depth import AbsentLayer
from ..depth.deepen import Balanced
from ..errors import PairingError
from ..ir import OUTPUTS, Axis, Coupling, Signature, Space, Spaces
from ..spaces.network import Network


@dataclass(frozen=True, eq=False)
class Correspondence:
    """Which space of each network is which, and in whose coordinates the fused space is.

    Attributes:
        base: Space name -> the network whose units the fused units are.
        spaces: Space name -> the space in each network (names are those of the anchor); of size 0
            where a network has none in these places.
        present: Space name -> whether each network really has it.
        lead: The network whose units the fused units are wherever it has them.
    """

    base: dict[str, int]
    spaces: dict[str, tuple[Space, ...]]
    present: dict[str, tuple[bool, ...]]
    lead: int

    def led_by(self, k: int) -> Correspondence | None:
        """Return the same in the units of another network, where it has them.

        None if it has more or fewer of them anywhere, as the fused network's widths are given.
        """
        sizes = {name: found[self.base[name]].size for name, found in self.spaces.items()}
        own = [name for name, here in self.present.items() if here[k]]
        if any(self.spaces[name][k].size != sizes[name] for name in own):
            return None
        return replace(self, base=self.base | dict.fromkeys(own, k), lead=k)


def correspond(balanced: Balanced, anchor: int) -> Correspondence:
    """Match the spaces of balanced networks by the places of their units.

    Raises:
        PairingError: If a network lacks a space, or two fixed axes differ in size.
    """
    networks = balanced.networks
    by_places = [_by_places(n) for n in networks]
    missing = [absent_tensors(n, a) for n, a in zip(networks, balanced.absent)]
    ours = networks[anchor]
    spaces = {
        s.name: tuple(
            _same_space(s, ours, n, p) or Space(s.name, 0, ()) for n, p in zip(networks, by_places)
        )
        for s in ours.spaces
    }
    _require_common_ground(networks, anchor, spaces)
    contracted = {t for names in ours.book.weights.values() for t in names}
    present = {
        s.name: tuple(_has(own, s, contracted, gone) for own, gone in zip(spaces[s.name], missing))
        for s in ours.spaces
        if s.axes
    }
    for space in ours.spaces:
        inside = [present[s.name] for s in ours.spaces if s.parent == space.name and s.axes]
        present.setdefault(space.name, tuple(any(here) for here in zip(*inside)))
    base = {}
    for name, found in spaces.items():
        same = [k for k, s in enumerate(found) if present[name][k] and s.size == found[anchor].size]
        base[name] = anchor if present[name][anchor] or not same else same[0]
    _require_equal_sizes(networks, anchor)
    return Correspondence(base, spaces, present, anchor)


def _has(own: Space, space: Space, contracted: set[str], gone: set[str]) -> bool:
    """Tell whether a network writes a space by anything but layers that it has in name only."""
    written = {a.tensor for a in space.axes if not a.reads}
    written = written & contracted or written
    return own.size > 0 and (not written or not written <= gone)


def _require_common_ground(
    networks: Sequence[Network], anchor: int, spaces: dict[str, tuple[Space, ...]]
) -> None:
    """Refuse networks most of whose units lie in places that another does not have.

    Some may: where streams are cut and interleaved again and again (channel shuffle), the pieces
    of streams of different widths do not all come out alike.
    """
    total = sum(s.size for s in networks[anchor].spaces)
    for k, network in enumerate(networks):
        lost = [s for s in networks[anchor].spaces if not spaces[s.name][k].size]
        if 2 * sum(s.size for s in lost) > total:
            raise _unmatched(lost[0], networks[anchor], network)


def _by_places(network: Network) -> dict[Signature, list[Space]]:
    found: dict[Signature, list[Space]] = {}
    for space in network.spaces:
        found.setdefault(space.signature, []).append(space)
    return found


def _same_space(
    space: Space, ours: Network, theirs: Network, by_places: dict[Signature, list[Space]]
) -> Space | None:
    """Find a space by its places; a space of blocks that are no axis by a space inside it.

    Spaces in the same places (the insides of fixed blocks) correspond in order.
    """
    if space.axes:
        alike = [s.name for s in ours.spaces if s.signature == space.signature]
        there = by_places.get(space.signature, [])
        return there[alike.index(space.name)] if len(there) == len(alike) else None
    inside = next((s for s in ours.spaces if s.parent == space.name), None)
    other = inside and _same_space(inside, ours, theirs, by_places)
    return theirs.spaces[other.parent] if other and other.parent else None


def absent_tensors(network: Network, absent: Sequence[AbsentLayer]) -> set[str]:
    """Return the parameters and buffers of layers that a network has in name only.

    What was set to zero to silence such a layer is not among them, nor the weights that a zeroed
    norm is folded into: it is a fact that the network adds nothing there.
    """
    silent = {t for a in absent for t in a.zeroed}
    folded = foldable_norms(network)
    for norm, roles in network.book.norms.items():
        touched = {t for t in roles.values() if isinstance(t, str)}
        if silent & touched:
            silent |= touched | set(network.book.tensors.get(folded.get(norm, ""), ()))
    return foreign_tensors(network, absent) - silent


def foreign_tensors(network: Network, absent: Sequence[AbsentLayer]) -> set[str]:
    """Return all parameters and buffers of layers that a network has in name only."""
    nodes = {node for a in absent for node in a.foreign}
    own = {t for node in nodes for t in network.book.tensors.get(node, ())}
    kept = {t for n, ts in network.book.tensors.items() if n not in nodes for t in ts}
    return own - kept


def _unmatched(space: Space, a: Network, b: Network) -> PairingError:
    places = ", ".join(sorted(f"{x.tensor}[{x.dim}]" for x in space.axes)[:4])
    return PairingError(
        f"a space of {a.name} that {b.name} does not have",
        where=f"space '{space.name}' on {places}",
        expected="networks whose units lie in the same places once their depths are equal",
        do="compare print(fxfuse.find_spaces(...)) of both; residual streams must agree in kind",
    )


def _require_equal_sizes(networks: Sequence[Network], anchor: int) -> None:
    free = {(a.tensor, a.dim) for s in networks[anchor].spaces for a in s.axes}
    ours = networks[anchor].spaces.sizes
    for network in networks:
        for key, size in network.spaces.sizes.items():
            if key not in free and ours.get(key) != size:
                raise PairingError(
                    f"an axis that must stay in place, of size {ours.get(key)} and {size}",
                    where=f"'{key[0]}' axis {key[1]} of {networks[anchor].name} and {network.name}",
                    expected="the same kernel, input, output and position sizes in all networks",
                    do="fuse networks that agree in everything but depth and width",
                )


LESS = 0.999  # rows of maps that sum to less are of networks that have less of a say there


@dataclass(frozen=True, eq=False)
class Mixer:
    """Carries tensors of every network into the fused network's coordinates and adds them up.

    Attributes:
        balanced: The networks.
        anchor: Index of the network whose structure the fused one has.
        match: Their spaces.
        weights: `(networks,)` shares, sum 1.
        ensemble: `(networks,)` shares of the networks' outputs in what the fused network is to
            give, sum 1; the weights, if not given.
        couplings: The maps of each space and network, filled in by a coupling method.
        layered: Maps of single axes `(space, tensor, dim, network)` that differ from their space's.
        absent_as_zero: Whether layers that a network has only as neutral ones count as zeros, not
            as layers of which the other networks alone have a say.
    """

    balanced: Balanced
    anchor: int
    match: Correspondence
    weights: Sequence[float]
    couplings: dict[tuple[str, int], Coupling] = field(default_factory=dict)
    layered: dict[tuple[str, str, int, int], Coupling] = field(default_factory=dict)
    absent_as_zero: bool = False
    ensemble: Sequence[float] | None = None

    @property
    def output_weights(self) -> Sequence[float]:
        """`(networks,)` shares of the networks' outputs, sum 1."""
        return self.weights if self.ensemble is None else self.ensemble

    def mix(self, name: str, values: Sequence[np.ndarray], along: int | None = None) -> np.ndarray:
        """Return the weighted sum over the networks, in fused coordinates.

        Args:
            name: A parameter or buffer.
            values: Each network's tensor of this name; with `along`, vectors `(units,)` over the
                units of that axis of it.
            along: The axis that the vectors lie along.
        """
        shape = values[self.anchor].shape
        if along is not None:
            shape = (self._anchor_spaces().sizes[name, along],)
        total = np.zeros(shape, dtype=values[self.anchor].dtype)
        shares = self.shares(name)
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

    def _mass(self, name: str, dim: int, shares: Sequence[float]) -> np.ndarray | None:
        """Return what the maps give to each written position, where a network gives less.

        Where all give, with their usual shares, the scale is the coupling method's own.
        """
        written = [(s, a) for s, a in self._on_axis(name, dim) if not a.reads]
        if self.absent_as_zero:
            return None
        mass = np.ones(self._anchor_spaces().sizes[name, dim])
        usual = np.allclose(shares, self.weights)
        for space, axis in written:
            given = np.array([self.couplings[space, k].given for k in range(len(shares))])
            short = (given < LESS).any(0) if usual else True
            here = shares @ given
            mass[axis.index] = np.where(short & (here > 0), here, 1.0)[:, None]
        return mass if (mass != 1.0).any() else None

    def shares(self, name: str) -> list[float]:
        """Return each network's share of a tensor; it belongs to the networks that have it."""
        if self.absent_as_zero:
            return [0.0 if name in gone else w for gone, w in zip(self._absent, self.weights)]
        return self.among([name not in gone for gone in self._absent])

    def among(self, here: Sequence[bool]) -> list[float]:
        """Return each network's share of what only some of them have; equal if none has weight."""
        shares = [w if has else 0.0 for has, w in zip(here, self.weights)]
        if not any(shares):
            shares = [float(has) for has in here]
        return [s / sum(shares) for s in shares]

    @cached_property
    def _absent(self) -> list[set[str]]:
        pairs = zip(self.balanced.networks, self.balanced.absent)
        return [absent_tensors(network, absent) for network, absent in pairs]

    def _anchor_spaces(self) -> Spaces:
        return self.balanced.networks[self.anchor].spaces

    def carry(self, name: str, tensor: np.ndarray, k: int, but: int | None = None) -> np.ndarray:
        """Return one network's tensor with every axis mapped, `but` one."""
        axes = [a for _, a in self._anchor_spaces().on(name) if a.dim != but]
        dims = dict.fromkeys(a.dim for a in axes)
        others = (d for d in range(tensor.ndim) if d != but)
        dims |= {d: None for d in others if (OUTPUTS, name, d, k) in self.layered}
        maps = {d: self.axis_map(name, d, k) for d in dims}
        groups = max((a.groups for a in axes), default=1)
        if groups > 1:
            return _map_grouped(tensor, maps, groups, self._groups(name, k))
        for d, matrix in maps.items():
            tensor = apply_along(matrix, tensor, d)
        return tensor

    def _groups(self, name: str, k: int) -> int:
        return max(a.groups for _, a in self.balanced.networks[k].spaces.on(name))

    def _on_axis(self, name: str, dim: int) -> list[tuple[str, Axis]]:
        return [(s.name, a) for s, a in self._anchor_spaces().places.get((name, dim), ())]

    def axis_map(self, name: str, dim: int, k: int) -> csr_array:
        """Return the map `(fused positions, own positions)` along one axis of a tensor."""
        whole = self._whole(name, dim, k)
        if whole is not None:
            return whole
        spaces = [self.balanced.networks[i].spaces for i in (self.anchor, k)]
        base, here = ({s.name: a for s, a in x.places.get((name, dim), ())} for x in spaces)
        ours, theirs = (x.sizes[name, dim] for x in spaces)
        return self._positions(name, dim, base, here, ours, theirs, k)

    def feature_map(self, node: str, dim: int, k: int) -> csr_array:
        """Return the map `(fused positions, own positions)` along one axis of a node's output."""
        networks = [self.balanced.networks[i] for i in (self.anchor, k)]
        shown = (n.spaces.shown.get((node, dim), ()) for n in networks)
        base, here = ({s.name: a for s, a in pairs} for pairs in shown)
        ours, theirs = (n.book.shapes[node][dim] for n in networks)
        return self._positions(node, dim, base, here, ours, theirs, k)

    def reading_map(self, node: str, dim: int, k: int) -> csr_array:
        """Return the map `(own positions, fused positions)` for what reads a node's output.

        Raises:
            PairingError: If what must stay in place there differs from the anchor's.
        """
        networks = [self.balanced.networks[i] for i in (self.anchor, k)]
        places = [n.spaces.shown.get((node, dim), ()) for n in networks]
        base, here = ({s.name: replace(a, reads=True) for s, a in shown} for shown in places)
        ours, theirs = (n.book.shapes[node][dim] for n in networks)
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
            own = self.match.spaces[space_name][k]
            if not own.size:
                continue
            other = here[own.name]
            own_maps = self.layered.get((space_name, where, dim, k))
            coupling = own_maps or self.couplings[space_name, k]
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
        if (OUTPUTS, where, dim, k) in self.layered:
            matrix = self.layered[OUTPUTS, where, dim, k].project.tocoo()
        rows[-1], columns[-1] = rows[-1][matrix.row], columns[-1][matrix.col]
        data.append(matrix.data)
        places = (np.concatenate(rows), np.concatenate(columns))
        return csr_array((np.concatenate(data), places), shape=(ours, theirs))

    def _whole(self, name: str, dim: int, k: int) -> csr_array | None:
        """Return the map of an axis that is one space and nothing else, unit by unit."""
        found = self._anchor_spaces().places.get((name, dim), ())
        other = self.balanced.networks[k].spaces.places.get((name, dim), ())
        if len(found) != 1 or len(other) != 1:
            return None
        for network, (_, axis) in ((self.anchor, found[0]), (k, other[0])):
            size = self.balanced.networks[network].spaces.sizes[name, dim]
            if not np.array_equal(axis.index, np.arange(size)[:, None]):
                return None
        space = found[0][0].name
        if self.match.spaces[space][k] is not other[0][0]:
            return None
        coupling = self.layered.get((space, name, dim, k)) or self.couplings[space, k]
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
