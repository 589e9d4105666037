"""Blocks of units: sets of units that travel together with one unit, their block.

Blocks with the same units are one block, and a block whose units all lie in another is a unit of
that other. Two families of blocks that cross like the rows and columns of a table leave the choice
of which of them moves; the other one then stays. Whatever crosses otherwise stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from .labels import FIXED, Ledger, distinct

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
