"""From the ledger of a labelled run to unit spaces.

Ties are solved once as connected components. Two units are exchangeable when they occur in the same
places with the same multiplicity, and in blocks that are exchangeable themselves; everything else
falls apart by itself (padded shortcuts, half-tied streams, concatenations).
"""

from __future__ import annotations

import numpy as np

from .blocks import CROSSED, parents, solve
from .ir import Axis, Frozen, Space, Spaces
from .labels import FIXED, KERNEL, Ledger, TensorAxis, distinct


def spaces_of(book: Ledger) -> Spaces:
    """Solve the ties of a ledger and sort its units into spaces."""
    unit, sets, frozen = solve(book)
    cls = _classes(book, unit)
    parent, crossed = parents(sets, cls)
    frozen[crossed] = True
    cls = _refine_by_blocks(cls, parent, frozen, unit)
    spaces = _build(book, unit, cls, parent, frozen)
    return Spaces(spaces, _report(book, unit, frozen), _sizes(book))


def _sizes(book: Ledger) -> dict[tuple[str, int], int]:
    return {(a.tensor, a.dim): len(a.labels) for a in book.axes}


def _classes(book: Ledger, unit: np.ndarray) -> np.ndarray:
    """Split units by the places they occur in and how often; return a class per label."""
    cls, count = np.zeros(book.size, dtype=np.int64), 1
    for place in book.places:
        units, times = np.unique(unit[place], return_counts=True)
        key = cls[units] * (times.max() + 1) + times
        _, split = np.unique(key, return_inverse=True)
        cls[units] = count + split
        count += split.max() + 1
    return cls


def _refine_by_blocks(
    cls: np.ndarray, parent: np.ndarray, frozen: np.ndarray, unit: np.ndarray
) -> np.ndarray:
    """Split classes until exchangeable units lie in exchangeable blocks of equal make.

    A block with a fixed member stays (marked in `frozen`); its members may move inside it.
    """
    live = distinct(unit)
    inside = live[parent[live] >= 0]
    while not frozen[parent[inside[frozen[inside]]]].all():
        frozen[parent[inside[frozen[inside]]]] = True
    block = parent[live]
    stays = np.where((block < -1) | ((block >= 0) & frozen[block]), block, -1)
    draw = np.random.default_rng(0).integers(1 << 63, size=len(unit) + 1, dtype=np.uint64)
    refined = cls.copy()
    _, refined[live] = np.unique(cls[live], return_inverse=True)
    while True:
        make = np.zeros(len(unit), dtype=np.uint64)  # the sum tells the kinds of all members
        np.add.at(make, parent[inside], draw[refined[inside]])
        outer = np.where(block >= 0, refined[block], -1)
        _, split = _distinct(refined[live], stays, outer, make[live])
        if split.max(initial=-1) == refined[live].max(initial=-1):
            return refined
        refined[live] = split


def _distinct(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct rows of some columns as numbers, and the number of each row."""
    numbers, code = np.zeros(0, dtype=np.int64), np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        names, part = np.unique(column, return_inverse=True)
        numbers, code = np.unique(code * len(names) + part, return_inverse=True)
    return numbers, code


def _build(
    book: Ledger, unit: np.ndarray, cls: np.ndarray, parent: np.ndarray, frozen: np.ndarray
) -> tuple[Space, ...]:
    wide = [a for a in book.axes if len(a.labels) > 1]  # an axis of one position has no symmetry
    parametric = distinct(np.concatenate([unit[a.labels] for a in wide] + [[0]]))
    members_of: dict[int, list[int]] = {}
    for u in _with_blocks(parametric, parent):
        if u > 1 and not frozen[u]:
            members_of.setdefault(int(cls[u]), []).append(int(u))
    position, where = np.full(book.size, -1), np.full(book.size, -1)
    for c, units in members_of.items():
        units.sort(key=lambda u: (min(int(parent[u]), 1 << 60), u) if parent[u] >= 0 else (0, u))
        position[units], where[units] = np.arange(len(units)), c
    reads = np.zeros(book.size, dtype=bool)
    for labels in book.reads:
        reads[labels] = True
    axes: dict[int, list[Axis]] = {c: [] for c in members_of}
    for axis in wide:
        read = axis.groups > 1 or bool(reads[axis.labels].any())
        for c, found in _locate(axis, unit, position, where, read):
            axes[c].append(found)
    features: dict[int, list[Axis]] = {c: [] for c in members_of}
    for outputs in book.features.values():
        for axis in outputs:
            for c, found in _locate(axis, unit, position, where, False):
                features[c].append(found)
    return _name(members_of, axes, features, parent, where, position)


def _with_blocks(units: np.ndarray, parent: np.ndarray) -> np.ndarray:
    """Add the blocks of some units, and the blocks of those blocks."""
    while True:
        outer = parent[units]
        more = distinct(np.concatenate([units, outer[outer > FIXED]]))
        if len(more) == len(units):
            return more
        units = more


def _locate(
    axis: TensorAxis, unit: np.ndarray, position: np.ndarray, where: np.ndarray, reads: bool
) -> list[tuple[int, Axis]]:
    """Return, for each space on an axis, the positions of its units in unit order."""
    units = unit[axis.labels]
    at = np.flatnonzero(where[units] >= 0)
    at = at[np.lexsort((position[units[at]], where[units[at]]))]
    found = []
    for part in np.split(at, np.flatnonzero(np.diff(where[units[at]])) + 1):
        if len(part):
            index = part.reshape(-1, np.count_nonzero(units[part] == units[part[0]]))
            space = int(where[units[part[0]]])
            found.append((space, Axis(axis.tensor, axis.dim, index, reads, axis.groups)))
    return found


def _name(
    members: dict[int, list[int]],
    axes: dict[int, list[Axis]],
    features: dict[int, list[Axis]],
    parent: np.ndarray,
    where: np.ndarray,
    position: np.ndarray,
) -> tuple[Space, ...]:
    outer_of = {c: _outer(units[0], parent, where) for c, units in members.items()}
    within: dict[int, list[str]] = {c: [] for c in (*members, -1)}
    for c, outer in outer_of.items():
        within[outer] += [a.tensor for a in axes[c]]
    names: dict[int, str] = {}
    for c in sorted(members, key=lambda c: members[c][0]):
        writers = [a.tensor for a in axes[c] if not a.reads] or [a.tensor for a in axes[c]]
        inner = within[c]
        module, _, leaf = (writers or inner or ["blocks"])[0].rpartition(".")
        base = module or leaf
        taken, n = set(names.values()), 2
        name = base
        while name in taken:
            name, n = f"{base}#{n}", n + 1
        names[c] = name
    spaces = []
    for c, units in members.items():
        block = parent[units]
        outer = outer_of[c]
        blocks = None
        if outer >= 0:
            blocks = position[block]
        elif (block != -1).any():
            blocks = np.unique(block, return_inverse=True)[1]
        spaces.append(
            Space(
                names[c], len(units), tuple(axes[c]), tuple(features[c]), names.get(outer), blocks
            )
        )
    depth = {s.name: s for s in spaces}
    return tuple(sorted(spaces, key=lambda s: _depth(s, depth)))


def _outer(unit: int, parent: np.ndarray, where: np.ndarray) -> int:
    """Return the space of the block that a unit lies in, -1 if that block moves with nothing."""
    return int(where[parent[unit]]) if parent[unit] >= 0 else -1


def _depth(space: Space, by_name: dict[str, Space]) -> int:
    return 0 if space.parent is None else 1 + _depth(by_name[space.parent], by_name)


def _report(book: Ledger, unit: np.ndarray, frozen: np.ndarray) -> tuple[Frozen, ...]:
    cause = np.full(book.size, -1)
    for i, (labels, _, _) in reversed(list(enumerate(book.frozen))):
        cause[unit[labels]] = i
    report = []
    for axis in book.axes:
        units = unit[axis.labels]
        stuck = units[frozen[units]]
        if not len(stuck) or len(axis.labels) < 2:
            continue
        why = cause[stuck[0]]
        _, node, reason = book.frozen[why] if why >= 0 else (None, "", CROSSED)
        if reason != KERNEL:
            report.append(Frozen(axis.tensor, axis.dim, len(stuck), node, reason))
    return tuple(report)
