"""Couple the units of each space: one (project, unproject) pair of maps per space and network.

Units are compared by their pre-activations on the calibration data: after every contraction, the
value behind its norm and residual add. A residual stream is one space and gets one coupling from
all its places together. Spaces inside blocks (groups, heads) are coupled in two steps: blocks by the
cost of their best inner match, then units inside matched blocks.

References:
    Singh and Jaggi 2020 (OTFusion). Difference: two maps. With `T` the plan, `P = T / mass of the
    fused units` acts on what is written and `U = T' / mass of the units` on what is read; one map
    for both scales a widened copy of a network by its width ratio at every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csr_array, diags_array, eye_array
from torch import Tensor, fx

from .balancing import Balanced
from .costs import PairMoments
from .data import Calibration
from .errors import DataError, PairingError
from .ir import Axis, Coupling, Space
from .network import Network
from .statistics import Bypass, batch_size, walk

GroundCost = Callable[[Sequence[PairMoments]], np.ndarray]
Solver = Callable[[np.ndarray, np.ndarray, np.ndarray], csr_array]
Maps = Callable[[csr_array], tuple[csr_array, csr_array]]
BATCH_BYTES, BATCH_SAMPLES = 1 << 25, 128


def two_maps(plan: csr_array) -> tuple[csr_array, csr_array]:
    """Turn a plan `(fused, own)` into project and unproject, each with rows that sum to 1."""
    project = diags_array(1.0 / plan.sum(1)) @ plan
    unproject = diags_array(1.0 / plan.sum(0)) @ plan.T
    return csr_array(project), csr_array(unproject)


def one_map(plan: csr_array) -> tuple[csr_array, csr_array]:
    """Use the projection on both sides, as the published codes do (equal for permutations)."""
    project = csr_array(diags_array(1.0 / (plan.sum(1) + 1e-7)) @ plan)
    return project, csr_array(project.T)


@dataclass(frozen=True, eq=False)
class Correspondence:
    """Which space of each network is which, and in whose coordinates the fused space is.

    Attributes:
        base: Space name -> the network whose units the fused units are.
        spaces: Space name -> the space in each network (names are those of the anchor).
        present: Space name -> whether each network really has it.
    """

    base: dict[str, int]
    spaces: dict[str, tuple[Space, ...]]
    present: dict[str, tuple[bool, ...]]


def correspond(balanced: Balanced, anchor: int) -> Correspondence:
    """Match the spaces of balanced networks by the places of their units.

    Raises:
        PairingError: If a network lacks a space, or two fixed axes differ in size.
    """
    networks = balanced.networks
    by_places = [{s.signature: s for s in n.spaces} for n in networks]
    missing = [absent_tensors(n, a) for n, a in zip(networks, balanced.absent)]
    base, spaces, present = {}, {}, {}
    for space in networks[anchor].spaces:
        found = []
        for network, known in zip(networks, by_places):
            other = _same_space(space, networks[anchor], network, known)
            if other is None:
                raise _unmatched(space, networks[anchor], network)
            found.append(other)
        written = {a.tensor for a in space.axes if not a.reads}
        here = tuple(not written or not written <= gone for gone in missing)
        same = [k for k, s in enumerate(found) if here[k] and s.size == space.size]
        base[space.name] = anchor if here[anchor] or not same else same[0]
        spaces[space.name], present[space.name] = tuple(found), here
    _require_equal_sizes(networks, anchor)
    return Correspondence(base, spaces, present)


def _same_space(
    space: Space, ours: Network, theirs: Network, by_places: dict[frozenset, Space]
) -> Space | None:
    """Find a space by its places; a space of blocks that are no axis by a space inside it."""
    if space.axes:
        return by_places.get(space.signature)
    inside = next((s for s in ours.spaces if s.parent == space.name), None)
    other = inside and _same_space(inside, ours, theirs, by_places)
    return theirs.spaces[other.parent] if other and other.parent else None


def absent_tensors(network: Network, absent: Sequence) -> set[str]:
    """Return the parameters and buffers of blocks that a network has only as neutral ones."""
    nodes = {node for a in absent for node in a.inner}
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


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Measurements:
    """What one joint pass over the data found.

    Attributes:
        pairs: `(space, network)` -> moments against the base network, one per place.
        norms: Node of a norm -> per network the mean and standard deviation of its output.
    """

    pairs: dict[tuple[str, int], dict[str, PairMoments]]
    norms: dict[str, tuple[tuple[np.ndarray, np.ndarray] | None, ...]]


def measuring_points(network: Network) -> set[str]:
    """Return the nodes that hold pre-activations: behind each contraction, its norm and add."""
    points = set()
    for node in network.module.graph.nodes:
        if node.name not in network.book.weights:
            continue
        while len(node.users) == 1:
            user = next(iter(node.users))
            adds = {s[1] for s in network.steps(user) if s[0] == "pointwise"} == {"add"}
            if not (network.is_norm(user) or adds or network.is_idle(user)):
                break
            node = user
        points.add(node.name)
    return points


def bypasses(balanced: Balanced) -> list[Bypass]:
    """Return, per network, the nodes that need not run because its layer is absent."""
    found = []
    for absent in balanced.absent:
        found.append({n: (a.entry, n in a.carriers) for a in absent for n in a.nodes})
    return found


def measure(
    balanced: Balanced, match: Correspondence, data: Calibration, norm_samples: int
) -> Measurements:
    """Advance all networks together over the data and gather moments at the measuring points.

    Args:
        balanced: Networks of one structure.
        match: Their spaces.
        data: Calibration inputs.
        norm_samples: How many of the first samples count for the moments of norms.

    Raises:
        DataError: If activations are not finite.
    """
    networks = balanced.networks
    plan = _visits(networks, match)
    pairs: dict[tuple[str, int], dict[str, PairMoments]] = {}
    norms = {n: [None] * len(networks) for n in networks[0].book.norms}
    seen = 0

    def visit(node: fx.Node, values: list) -> None:
        for name, k, a, b in plan.get(node.name, ()):
            x, y = _units(values[match.base[name]], a), _units(values[k], b)
            places = pairs.setdefault((name, k), {})
            places.setdefault(node.name, PairMoments.start(x, y)).add(x, y)
        if node.name in norms and seen < norm_samples:
            for k, value in enumerate(values):
                if value is not None:
                    x = value[: norm_samples - seen].transpose(0, 1).flatten(1)
                    moments = norms[node.name][k] or PairMoments.start(x, x[:0])
                    norms[node.name][k] = moments
                    moments.add(x, x[:0])

    around = bypasses(balanced)
    for batch in data.chunks(batch_size(networks, BATCH_BYTES, BATCH_SAMPLES)):
        walk(networks, batch, visit, around)
        seen += len(batch[0])
    _require_finite(pairs, networks)
    return Measurements(pairs, {n: tuple(map(_mean_and_spread, m)) for n, m in norms.items()})


def _mean_and_spread(moments: PairMoments | None) -> tuple[np.ndarray, np.ndarray] | None:
    return None if moments is None else (moments.means()[0], np.sqrt(moments.variances()[0]))


def _visits(
    networks: Sequence[Network], match: Correspondence
) -> dict[str, list[tuple[str, int, Axis, Axis]]]:
    points = measuring_points(networks[0])
    plan: dict[str, list[tuple[str, int, Axis, Axis]]] = {}
    for name, spaces in match.spaces.items():
        base = match.base[name]
        for k, space in enumerate(spaces):
            if k == base or not (match.present[name][k] and match.present[name][base]):
                continue
            own = {a.tensor: a for a in space.features}
            both = [(a, own[a.tensor]) for a in spaces[base].features if a.tensor in own]
            chosen = [(a, b) for a, b in both if a.tensor in points] or both[:1]
            for a, b in chosen:
                plan.setdefault(a.tensor, []).append((name, k, a, b))
    return plan


def _units(value: Tensor, axis: Axis) -> Tensor:
    """Return the values of a space's units as `(units, positions)`."""
    moved = value.movedim(axis.dim, 0).flatten(1)
    index = axis.index
    if index.shape[1] == 1 and np.array_equal(index[:, 0], np.arange(len(moved))):
        return moved.float()
    return moved[index.reshape(-1)].reshape(len(index), -1).float()


def _require_finite(
    pairs: dict[tuple[str, int], dict[str, PairMoments]], networks: Sequence[Network]
) -> None:
    for (name, k), places in pairs.items():
        for node, moments in places.items():
            if not bool(moments.cross.isfinite().all()):
                raise DataError(
                    "activations that are NaN or infinite",
                    where=f"node '{node}' (space '{name}') of {networks[k].name} or the anchor",
                    expected="finite activations on the calibration data",
                    do="check the data's normalisation and the networks' weights",
                )


# --- solving --------------------------------------------------------------------------------------


def couple(
    match: Correspondence,
    measured: Measurements,
    ground_cost: GroundCost,
    solver: Solver,
    maps: Maps,
) -> dict[tuple[str, int], Coupling]:
    """Solve a coupling for each space and network, `(name, network)` -> maps to the fused space."""
    costs = {key: ground_cost(list(places.values())) for key, places in measured.pairs.items()}
    couplings: dict[tuple[str, int], Coupling] = {}
    plans: dict[tuple[str, int], csr_array] = {}
    for name, spaces in match.spaces.items():
        for k, space in enumerate(spaces):
            base = spaces[match.base[name]]
            if k == match.base[name] or not match.present[name][k]:
                couplings[name, k] = _identity(base.size, space.size, name)
                plans[name, k] = csr_array(eye_array(base.size) / base.size)
                continue
            cost = costs.get((name, k))
            inner = _children(match, costs, name, k)
            if inner:
                cost = _block_cost(base.size, space.size, inner, solver)
            if cost is None:
                couplings[name, k] = _identity(base.size, space.size, name)
                plans[name, k] = csr_array(eye_array(base.size) / base.size)
                continue
            plan = _solve(cost, base, space, plans.get((base.parent, k)), solver)
            plans[name, k] = plan
            project, unproject = maps(plan)
            total = float(plan.multiply(cost).sum() / plan.sum())
            couplings[name, k] = Coupling(project, unproject, total)
    return couplings


def _identity(size: int, other: int, name: str) -> Coupling:
    if size != other:
        raise PairingError(
            f"a space of {size} and {other} units where nothing was measured",
            where=f"space '{name}'",
            expected="equal sizes where the units cannot be compared",
            do="use networks of equal width in this place",
        )
    return Coupling(csr_array(eye_array(size)), csr_array(eye_array(size)))


def _children(
    match: Correspondence, costs: dict[tuple[str, int], np.ndarray], name: str, k: int
) -> list[tuple[Space, Space, np.ndarray]]:
    """Return the measured spaces inside the blocks of a space: of the base, of `k`, their cost."""
    found = []
    for child, spaces in match.spaces.items():
        base = spaces[match.base[child]]
        if base.parent is not None and (child, k) in costs:
            parents = match.spaces[name][match.base[child]].name
            if base.parent == parents:
                found.append((base, spaces[k], costs[child, k]))
    return found


def _members(space: Space) -> list[np.ndarray]:
    return [np.flatnonzero(space.blocks == b) for b in range(int(space.blocks.max()) + 1)]


def _block_cost(
    rows: int, columns: int, inner: list[tuple[Space, Space, np.ndarray]], solver: Solver
) -> np.ndarray:
    total = np.zeros((rows, columns))
    for base, space, cost in inner:
        ours, theirs = _members(base), _members(space)
        for i, here in enumerate(ours):
            for j, there in enumerate(theirs):
                part = cost[np.ix_(here, there)]
                plan = solver(part, *_uniform(part))
                total[i, j] += plan.multiply(part).sum()
    return total


def _uniform(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.full(n, 1.0 / n) for n in cost.shape)


def _solve(
    cost: np.ndarray, base: Space, space: Space, outer: csr_array | None, solver: Solver
) -> csr_array:
    """Solve a plan; inside blocks, follow the plan of the blocks (or keep them in place)."""
    if base.blocks is None:
        return solver(cost, *_uniform(cost))
    ours, theirs = _members(base), _members(space)
    if outer is None:
        outer = csr_array(eye_array(len(ours)) / len(ours))
    outer = coo_array(outer)
    data, rows, columns = [], [], []
    for i, j, mass in zip(outer.row, outer.col, outer.data):
        part = cost[np.ix_(ours[i], theirs[j])]
        plan = coo_array(solver(part, *_uniform(part)))
        rows.append(ours[i][plan.row])
        columns.append(theirs[j][plan.col])
        data.append(plan.data * mass)
    where = (np.concatenate(rows), np.concatenate(columns))
    return csr_array((np.concatenate(data), where), shape=cost.shape)
