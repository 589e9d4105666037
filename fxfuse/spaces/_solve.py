"""Blocks of units: sets of units that travel together with one unit, their block.

Blocks with the same units are one block, and a block whose units all lie in another is a unit of
that other. Two families of blocks that cross like the rows and columns of a table leave the choice
of which of them moves; the other one then stays. Whatever crosses otherwise stays.

From the ledger of a labelled run to unit spaces.

Ties are solved once as connected components. Two units are exchangeable when they occur in the same
places with the same multiplicity, and in blocks that are exchangeable themselves; everything else
falls apart by itself (padded shortcuts, half-tied streams, concatenations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from ..ir import Axis, Frozen, Space, Spaces
from ._ledger import FIXED, KERNEL, Ledger, TensorAxis, distinct

CROSSED = "its blocks cross others"


@dataclass(frozen=True)
class Sets:
    """Sets of units, each with its block; a block may own several sets.

    Attributes:
        owner: `(sets,)` the block of each set.
        index: `(entries,)` the set of each entry, ascending.
        member: `(entries,)` the unit of each entry, ascending within its set.
    """

    owner: np.ndarray
    index: np.ndarray
    member: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Number of members of each set."""
        return np.bincount(self.index, minlength=len(self.owner))


def tied(unit: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the unit of each label once more pairs of labels are tied: the smallest label."""
    ends, size = (unit[a], unit[b]), len(unit)
    graph = coo_array((np.ones(len(a), dtype=bool), ends), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    found: np.ndarray = first[component][unit]
    return found


def solve(book: Ledger) -> tuple[np.ndarray, Sets, np.ndarray]:
    """Solve all ties of a ledger, those that follow from blocks included.

    Returns:
        The unit of each label, the sets of units that travel together, and which units are frozen.
    """
    unit = tied(np.arange(book.size), *_concatenate(book.ties, 2))
    rows, held = _rows(book), np.zeros(book.size, dtype=bool)
    for labels, _, _ in book.frozen:
        held[labels] = True
    while True:
        unit, sets, stuck = _merge(unit, rows)
        held[stuck] = True
        sets = _nest(sets)
        frozen = np.zeros(book.size, dtype=bool)
        frozen[unit[held]] = frozen[: FIXED + 1] = True
        pairs, stay = _straighten(book, unit, sets, _spread(frozen, sets))
        if not len(pairs):
            return unit, sets, frozen
        held[stay] = True
        unit = tied(unit, *pairs.T)


def _concatenate(parts: Sequence[tuple[np.ndarray, ...]], width: int) -> list[np.ndarray]:
    none = np.zeros(0, dtype=np.int64)
    return [np.concatenate([none, *(p[i].ravel() for p in parts)]) for i in range(width)]


def _rows(book: Ledger) -> Sets:
    owner, member = _concatenate(book.groups, 2)
    widths = np.repeat(
        [m.shape[1] for _, m in book.groups], [len(b) for b, _ in book.groups]
    ).astype(np.int64)
    return Sets(owner, np.repeat(np.arange(len(owner)), widths), member)


def _spread(frozen: np.ndarray, sets: Sets) -> np.ndarray:
    """A block with a fixed member stays."""
    frozen = frozen.copy()
    while True:
        more = sets.owner[sets.index[frozen[sets.member]]]
        if frozen[more].all():
            return frozen
        frozen[more] = True


# --- the same members, the same block -----------------------------------------------------------


def _merge(unit: np.ndarray, rows: Sets) -> tuple[np.ndarray, Sets, np.ndarray]:
    """Tie blocks with the same members; return units, distinct sets, and blocks that stay."""
    draw = np.random.default_rng(0).integers(1 << 63, size=len(unit), dtype=np.uint64)
    while True:
        owner, member = unit[rows.owner], unit[rows.member]
        stuck = owner[rows.index[member <= FIXED]]
        code = distinct(rows.index[member > FIXED] * len(unit) + member[member > FIXED])
        index, member = np.divmod(code, len(unit))
        row, start, count = np.unique(index, return_index=True, return_counts=True)
        name = np.add.reduceat(draw[member], start) if len(start) else draw[:0]
        real = (count > 1) | (member[start] != owner[row])
        row, name, start, count = row[real], name[real], start[real], count[real]
        _, first, same = np.unique(name, return_index=True, return_inverse=True)
        other, own = owner[row[first]][same], owner[row]
        if not (other != own).any():
            break
        unit = tied(unit, other, own)
    if len(first):
        entries = np.concatenate([np.arange(s, s + n) for s, n in zip(start[first], count[first])])
    else:
        entries = np.zeros(0, dtype=np.int64)
    sets = Sets(own[first], np.repeat(np.arange(len(first)), count[first]), member[entries])
    return unit, sets, stuck


# --- blocks within blocks -----------------------------------------------------------------------


def _nest(sets: Sets) -> Sets:
    """Put a block whose units all lie in another block into that block, in place of its units."""
    while len(sets.owner):
        labels, member = np.unique(sets.member, return_inverse=True)
        ones = np.ones(len(member), dtype=np.int64)
        inside = csr_array((ones, (sets.index, member)), shape=(len(sets.owner), len(labels)))
        common, sizes = (inside @ inside.T).tocoo(), sets.sizes
        small, large = common.coords
        within = (common.data == sizes[small]) & (sizes[small] < sizes[large])
        within &= sets.owner[small] != sets.owner[large]
        if not within.any():
            break
        small, large = small[within], large[within]
        shape = (len(sets.owner),) * 2
        lies = csr_array((np.ones(len(small), dtype=np.int64), (small, large)), shape=shape)
        between = (lies @ lies)[small, large] > 0
        gone = np.asarray((lies.T @ inside)[sets.index, member]).ravel() > 0
        index = np.concatenate([sets.index[~gone], large[~between]])
        member = np.concatenate([sets.member[~gone], sets.owner[small[~between]]])
        index, member = np.unique(np.stack([index, member]), axis=1)
        sets = Sets(sets.owner, index, member)
    return sets


# --- rows and columns ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """Units that lie in one row and one column each, every place taken once."""

    units: np.ndarray
    row: np.ndarray
    column: np.ndarray

    @property
    def turned(self) -> _Table:
        return _Table(self.units, self.column, self.row)


def _straighten(
    book: Ledger, unit: np.ndarray, sets: Sets, frozen: np.ndarray
) -> tuple[np.ndarray, list[int]]:
    """Tie the units of each column of a table, so that columns move and rows stay.

    Columns are the family with more blocks that can move.

    Returns:
        The `(pairs, 2)` to tie, and the blocks that stay.
    """
    pairs, stay = [np.zeros((0, 2), dtype=np.int64)], []
    tables = _tables(sets)
    axes = _axes_of(book, unit, tables)
    for table, found in zip(tables, axes):
        movable = [
            len(distinct(own[~frozen[own]]))
            for own in (sets.owner[distinct(table.row)], sets.owner[distinct(table.column)])
        ]
        ways = [(movable[1], table), (movable[0], table.turned)]
        for count, way in sorted(ways, key=lambda w: -w[0]):
            if count > 1 and all(_in_order(way, units) for units in found):
                pairs.append(np.stack([way.units, sets.owner[way.column]], axis=1))
                stay.extend(sets.owner[distinct(way.row)].tolist())
                break
    return np.concatenate(pairs), stay


def _tables(sets: Sets) -> list[_Table]:
    order = np.argsort(sets.member, kind="stable")
    units, start, count = np.unique(sets.member[order], return_index=True, return_counts=True)
    twice = count == 2
    one, two = sets.index[order][start[twice]], sets.index[order][start[twice] + 1]
    crossing = units[twice]
    graph = coo_array((np.ones(len(one), dtype=bool), (one, two)), shape=(len(sets.owner),) * 2)
    _, part = connected_components(graph, directed=False)
    whole = np.bincount(part[sets.index], minlength=len(sets.owner))
    sorting = np.argsort(part[one], kind="stable")
    names, begin, length = np.unique(part[one][sorting], return_index=True, return_counts=True)
    found = []
    for name, b, n in zip(names, begin, length):
        here = sorting[b : b + n]
        if whole[name] == 2 * n:
            table = _table(crossing[here], one[here], two[here])
            found += [table] if table is not None else []
    return found


def _table(units: np.ndarray, one: np.ndarray, two: np.ndarray) -> _Table | None:
    """Tell rows from columns: two sets are of one family when they share no unit."""
    columns = np.union1d(two[one == one[0]], one[two == one[0]])
    turned = np.isin(one, columns)
    row, column = np.where(turned, two, one), np.where(turned, one, two)
    rows, columns = distinct(row), distinct(column)
    full = (
        len(units) == len(rows) * len(columns) == len(np.unique(np.stack([row, column]), axis=1).T)
    )
    if not full or len(np.intersect1d(rows, columns)):
        return None
    return _Table(units, row, column)


def _axes_of(book: Ledger, unit: np.ndarray, tables: list[_Table]) -> list[list[np.ndarray]]:
    """Return for each table the units on every parameter axis that holds some of its units."""
    owner = np.full(len(unit), -1)
    for i, table in enumerate(tables):
        owner[table.units] = i
    found: list[list[np.ndarray]] = [[] for _ in tables]
    for axis in book.axes if tables else ():
        units = unit[axis.labels]
        for i in distinct(owner[units]):
            if i >= 0:
                found[i].append(units[owner[units] == i])
    return found


def _in_order(table: _Table, units: np.ndarray) -> bool:
    """Tell whether the rows follow each other in the same order in every column of an axis.

    A unit that occurs several times takes the places of another one in their order.
    """
    order = np.argsort(table.units)
    at = order[np.searchsorted(table.units[order], units)]
    row, column = table.row[at], table.column[at]
    row = row[np.argsort(column, kind="stable")]
    _, count = np.unique(column, return_counts=True)
    return len(set(count)) == 1 and bool((row.reshape(len(count), -1) == row[: count[0]]).all())


# --- whom a unit travels with -------------------------------------------------------------------


def parents(sets: Sets, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each unit's block (-1 for none) and the blocks that stay.

    A unit in two blocks travels with both: it may only move inside their intersection, which gets
    a number below -1, and the blocks stay. The same holds for a block of several sets of units of
    one kind: its units may not go from one set to another.

    Args:
        sets: Who travels with whom.
        kind: Class of each unit; units of different classes never change places.
    """
    parent = np.full(len(kind), -1)
    mixed = _mixed(sets, kind)
    order = np.argsort(sets.member, kind="stable")
    units, start, count = np.unique(sets.member[order], return_index=True, return_counts=True)
    first = sets.index[order][start]
    plain = (count == 1) & ~mixed[first]
    parent[units[plain]] = sets.owner[first[plain]]
    crossed = [sets.owner[mixed]]
    virtual: dict[tuple[int, ...], int] = {}
    for u, s, n in zip(units[~plain], start[~plain], count[~plain]):
        key = tuple(sorted(sets.index[order[s : s + n]].tolist()))
        parent[u] = virtual.setdefault(key, -2 - len(virtual))
        crossed.append(sets.owner[list(key)])
    crossed.append(_in_circles(parent))
    return parent, distinct(np.concatenate(crossed))


def _mixed(sets: Sets, kind: np.ndarray) -> np.ndarray:
    """Tell which sets share their block with another set of units of the same kind."""
    entries = np.stack([sets.owner[sets.index], kind[sets.member], sets.index])
    entries = np.unique(entries, axis=1)
    _, same, count = np.unique(entries[:2], axis=1, return_inverse=True, return_counts=True)
    mixed = np.zeros(len(sets.owner), dtype=bool)
    mixed[entries[2][count[same.ravel()] > 1]] = True
    return np.isin(sets.owner, sets.owner[mixed])


def _in_circles(parent: np.ndarray) -> np.ndarray:
    """Free the units that would travel with themselves from their blocks, and return them."""
    child = np.flatnonzero(parent >= 0)
    ends = (child, parent[child])
    graph = coo_array((np.ones(len(child), dtype=bool), ends), shape=(len(parent),) * 2)
    _, part = connected_components(graph, connection="strong")
    found: np.ndarray = child[(np.bincount(part)[part[child]] > 1) | (parent[child] == child)]
    parent[found] = -1
    return found


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
