"""From the ledger of a labelled run to unit spaces.

Ties are solved once as connected components. Two units are exchangeable when they occur in the same
places with the same multiplicity, and in blocks that are exchangeable themselves; everything else
falls apart by itself (padded shortcuts, half-tied streams, concatenations).
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .ir import Axis, Frozen, Space, Spaces
from .labels import KERNEL, Ledger, TensorAxis


def spaces_of(book: Ledger) -> Spaces:
    """Solve the ties of a ledger and sort its units into spaces."""
    unit = _solve_ties(book)
    groups = _merge_blocks(unit, book)
    unit, parents = groups
    frozen = np.zeros(book.size, dtype=bool)
    frozen[unit[1]] = True
    for labels, _, _ in book.frozen:
        frozen[unit[labels]] = True
    parent, crossed = _parents(parents, book.size)
    frozen[list(crossed)] = True
    cls = _classes(book, unit)
    cls = _refine_by_blocks(cls, parent, frozen, unit)
    spaces = _build(book, unit, cls, parent, frozen)
    return Spaces(spaces, _report(book, unit, frozen), _sizes(book))


def _sizes(book: Ledger) -> dict[tuple[str, int], int]:
    return {(a.tensor, a.dim): len(a.labels) for a in book.axes}


def _solve_ties(book: Ledger, more: list[tuple[int, int]] | None = None) -> np.ndarray:
    """Return the unit of each label: the smallest label it is tied to."""
    pairs = [np.array([a, b]) for a, b in book.ties] + [np.array(more or []).reshape(-1, 2).T]
    a, b = np.concatenate(pairs, axis=1).astype(int)
    graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(book.size, book.size))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return first[component]


def _merge_blocks(
    unit: np.ndarray, book: Ledger
) -> tuple[np.ndarray, list[tuple[int, tuple[int, ...]]]]:
    """Tie blocks that have the same members; return units and `(block, members)`."""
    more: list[tuple[int, int]] = []
    while True:
        seen: dict[tuple[int, ...], int] = {}
        found, before = [], len(more)
        for blocks, members in book.groups:
            for block, row in zip(unit[blocks], unit[members]):
                key = tuple(np.unique(row))
                if key == (block,):
                    continue
                other = seen.setdefault(key, int(block))
                if other != block:
                    more.append((other, int(block)))
                found.append((int(block), key))
        if len(more) == before:
            return unit, sorted(set(found))
        unit = _solve_ties(book, more)


def _parents(groups: list[tuple[int, tuple[int, ...]]], size: int) -> tuple[np.ndarray, set[int]]:
    """Return each unit's block (-1 for none) and the blocks that cross others, which are fixed.

    A unit in two blocks travels with both: it may only move inside their intersection, which
    becomes its block, and the blocks themselves stay.
    """
    found: dict[int, list[int]] = {}
    for block, members in groups:
        for member in members:
            blocks = found.setdefault(member, [])
            if block not in blocks:
                blocks.append(block)
    parent = np.full(size, -1)
    crossed: set[int] = set()
    virtual: dict[tuple[int, ...], int] = {}
    for member, blocks in found.items():
        key = tuple(sorted(blocks))
        if len(key) > 1:
            crossed.update(key)
            parent[member] = virtual.setdefault(key, -2 - len(virtual))
        else:
            parent[member] = key[0]
    return parent, crossed


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
    live = np.unique(unit)
    while True:
        members: dict[int, list[int]] = {}
        for u in live[parent[live] != -1]:
            members.setdefault(int(parent[u]), []).append(int(u))
        for block, inside in members.items():
            if block >= 0 and frozen[inside].any():
                frozen[block] = True
        keys = []
        for u in live:
            block, make = int(parent[u]), ()
            if u in members:
                make = tuple(
                    zip(*(x.tolist() for x in np.unique(cls[members[u]], return_counts=True)))
                )
            stays = block if block < -1 or block >= 0 and frozen[block] else -1
            keys.append((int(cls[u]), stays, int(cls[block]) if block >= 0 else -1, make))
        names: dict[tuple, int] = {}
        refined = cls.copy()
        for u, key in zip(live, keys):
            refined[u] = names.setdefault(key, len(names))
        if len(names) == len(np.unique(cls[live])):
            return refined
        cls = refined


def _build(
    book: Ledger, unit: np.ndarray, cls: np.ndarray, parent: np.ndarray, frozen: np.ndarray
) -> tuple[Space, ...]:
    wide = [a for a in book.axes if len(a.labels) > 1]  # an axis of one position has no symmetry
    parametric = np.unique(np.concatenate([unit[a.labels] for a in wide] + [[0]]))
    members_of: dict[int, list[int]] = {}
    for u in np.unique(np.concatenate([parametric, parent[parametric][parent[parametric] > 1]])):
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
        for c, found in _locate(axis, unit, position, where, bool(reads[axis.labels].any())):
            axes[c].append(found)
    features: dict[int, list[Axis]] = {c: [] for c in members_of}
    for outputs in book.features.values():
        for axis in outputs:
            for c, found in _locate(axis, unit, position, where, False):
                features[c].append(found)
    return _name(members_of, axes, features, parent, where, position)


def _locate(
    axis: TensorAxis, unit: np.ndarray, position: np.ndarray, where: np.ndarray, reads: bool
) -> list[tuple[int, Axis]]:
    """Return, for each space on an axis, the positions of its units in unit order."""
    units = unit[axis.labels]
    found = []
    for c in np.unique(where[units]):
        if c < 0:
            continue
        at = np.flatnonzero(where[units] == c)
        order = np.lexsort((at, position[units[at]]))
        index = at[order].reshape(len(np.unique(units[at])), -1)
        found.append((int(c), Axis(axis.tensor, axis.dim, index, reads, axis.groups)))
    return found


def _name(
    members: dict[int, list[int]],
    axes: dict[int, list[Axis]],
    features: dict[int, list[Axis]],
    parent: np.ndarray,
    where: np.ndarray,
    position: np.ndarray,
) -> tuple[Space, ...]:
    names: dict[int, str] = {}
    for c in sorted(members, key=lambda c: members[c][0]):
        writers = [a.tensor for a in axes[c] if not a.reads] or [a.tensor for a in axes[c]]
        inner = [
            a.tensor for d in members if axes[d] for a in axes[d] if _inside(d, c, members, parent)
        ]
        base = (writers or inner or ["blocks"])[0].rpartition(".")
        base = base[0] or base[2]
        taken, n = set(names.values()), 2
        name = base
        while name in taken:
            name, n = f"{base}#{n}", n + 1
        names[c] = name
    spaces = []
    for c, units in members.items():
        block = parent[units]
        outer = int(where[block[0]]) if block[0] >= 0 else -1
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


def _inside(c: int, outer: int, members: dict[int, list[int]], parent: np.ndarray) -> bool:
    return int(parent[members[c][0]]) in members[outer]


def _depth(space: Space, by_name: dict[str, Space]) -> int:
    return 0 if space.parent is None else 1 + _depth(by_name[space.parent], by_name)


def _report(book: Ledger, unit: np.ndarray, frozen: np.ndarray) -> tuple[Frozen, ...]:
    why: dict[int, tuple[str, str]] = {}
    for labels, node, reason in reversed(book.frozen):
        for u in np.unique(unit[labels]):
            why[int(u)] = (node, reason)
    report = []
    for axis in book.axes:
        units = unit[axis.labels]
        stuck = units[frozen[units]]
        node, reason = (
            why.get(int(stuck[0]), ("", "its blocks cross others")) if len(stuck) else ("", "")
        )
        if len(stuck) and len(axis.labels) > 1 and reason != KERNEL:
            report.append(Frozen(axis.tensor, axis.dim, len(stuck), node, reason))
    return tuple(report)
