"""From the ledger of a labelled run to unit spaces.

Tied labels are one unit (connected components). Two units are exchangeable if they occur in the
same places equally often and lie in exchangeable blocks. Nothing else is needed for padded
shortcuts, half-tied streams and concatenations to fall into the right spaces.

A block is a unit that a set of units travels with. Blocks of the same units are one block. A block
whose units all lie in another is a unit of that other. Where two families of blocks cross as rows
and columns of a table do, one family moves and the other stays; what crosses otherwise stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from ..ir import Axis, Frozen, Space, Spaces
from ._labels import FIXED, KERNEL, Ledger, distinct

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
    """Return the unit of each label once more pairs are tied; a unit goes by its smallest label."""
    ends, size = (unit[a], unit[b]), len(unit)
    graph = coo_array((np.ones(len(a), dtype=bool), ends), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    units: np.ndarray = first[component][unit]
    return units


def solve(ledger: Ledger) -> tuple[np.ndarray, Sets, np.ndarray]:
    """Solve all ties of a ledger, and those that follow from its blocks.

    Returns:
        The unit of each label, the sets of units that travel together, and whether each unit is
        frozen.
    """
    unit = tied(np.arange(ledger.size), *_concatenate(ledger.ties, 2))
    rows, stays = _rows(ledger), np.zeros(ledger.size, dtype=bool)
    for labels, _, _ in ledger.frozen:
        stays[labels] = True
    while True:
        unit, sets, fixed = _merge(unit, rows)
        stays[fixed] = True
        sets = _nest(sets)
        frozen = np.zeros(ledger.size, dtype=bool)
        frozen[unit[stays]] = frozen[: FIXED + 1] = True
        pairs, rows_that_stay = _move_columns(ledger, unit, sets, _with_frozen_blocks(frozen, sets))
        if not len(pairs):
            return unit, sets, frozen
        stays[rows_that_stay] = True
        unit = tied(unit, *pairs.T)


def _concatenate(parts: Sequence[tuple[np.ndarray, ...]], width: int) -> list[np.ndarray]:
    none = np.zeros(0, dtype=np.int64)
    return [np.concatenate([none, *(p[i].ravel() for p in parts)]) for i in range(width)]


def _rows(ledger: Ledger) -> Sets:
    """Return the sets of a ledger as it wrote them down, by labels."""
    owner, member = _concatenate(ledger.blocks, 2)
    widths = np.repeat(
        [m.shape[1] for _, m in ledger.blocks], [len(b) for b, _ in ledger.blocks]
    ).astype(np.int64)
    return Sets(owner, np.repeat(np.arange(len(owner)), widths), member)


def _with_frozen_blocks(frozen: np.ndarray, sets: Sets) -> np.ndarray:
    """Freeze the blocks that have a frozen member as well."""
    frozen = frozen.copy()
    while True:
        more = sets.owner[sets.index[frozen[sets.member]]]
        if frozen[more].all():
            return frozen
        frozen[more] = True


# --- the same members, the same block -----------------------------------------------------------


def _merge(unit: np.ndarray, rows: Sets) -> tuple[np.ndarray, Sets, np.ndarray]:
    """Tie blocks with the same members; return units, distinct sets, and blocks that stay.

    Sets are compared by the sum of random numbers, one for each member.
    """
    draw = np.random.default_rng(0).integers(1 << 63, size=len(unit), dtype=np.uint64)
    while True:
        owner, member = unit[rows.owner], unit[rows.member]
        fixed = owner[rows.index[member <= FIXED]]
        code = distinct(rows.index[member > FIXED] * len(unit) + member[member > FIXED])
        index, member = np.divmod(code, len(unit))
        row, start, count = np.unique(index, return_index=True, return_counts=True)
        sums = np.add.reduceat(draw[member], start) if len(start) else draw[:0]
        real = (count > 1) | (member[start] != owner[row])  # not a unit that is its own block
        row, sums, start, count = row[real], sums[real], start[real], count[real]
        _, first, same = np.unique(sums, return_index=True, return_inverse=True)
        blocks, blocks_of_same = owner[row], owner[row[first]][same]
        if not (blocks_of_same != blocks).any():
            break
        unit = tied(unit, blocks_of_same, blocks)
    if len(first):
        entries = np.concatenate([np.arange(s, s + n) for s, n in zip(start[first], count[first])])
    else:
        entries = np.zeros(0, dtype=np.int64)
    sets = Sets(blocks[first], np.repeat(np.arange(len(first)), count[first]), member[entries])
    return unit, sets, fixed


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
        replaced = np.asarray((lies.T @ inside)[sets.index, member]).ravel() > 0
        index = np.concatenate([sets.index[~replaced], large[~between]])
        member = np.concatenate([sets.member[~replaced], sets.owner[small[~between]]])
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
        """The table with rows and columns exchanged."""
        return _Table(self.units, self.column, self.row)


def _move_columns(
    ledger: Ledger, unit: np.ndarray, sets: Sets, frozen: np.ndarray
) -> tuple[np.ndarray, list[int]]:
    """Let the columns of each table move: its units are tied to their columns, its rows stay.

    Columns are the family with more blocks that can move.

    Returns:
        The `(pairs, 2)` to tie, and the blocks that stay.
    """
    pairs, rows = [np.zeros((0, 2), dtype=np.int64)], []
    tables = _tables(sets)
    for table, axes in zip(tables, _axes_of(ledger, unit, tables)):
        ways = []
        for way in (table, table.turned):
            blocks = sets.owner[distinct(way.column)]
            ways.append((len(distinct(blocks[~frozen[blocks]])), way))
        for movable, way in sorted(ways, key=lambda w: -w[0]):
            if movable > 1 and all(_in_order(way, units) for units in axes):
                pairs.append(np.stack([way.units, sets.owner[way.column]], axis=1))
                rows.extend(sets.owner[distinct(way.row)].tolist())
                break
    return np.concatenate(pairs), rows


def _tables(sets: Sets) -> list[_Table]:
    """Return the groups of sets that cross as rows and columns do, and touch no other set."""
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
    tables = []
    for name, b, n in zip(names, begin, length):
        entries = sorting[b : b + n]
        if whole[name] == 2 * n:
            table = _table(crossing[entries], one[entries], two[entries])
            tables += [table] if table is not None else []
    return tables


def _table(units: np.ndarray, one: np.ndarray, two: np.ndarray) -> _Table | None:
    """Make a table of units in two sets each; None if these are no rows and columns.

    Two sets of one family share no unit.
    """
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


def _axes_of(ledger: Ledger, unit: np.ndarray, tables: list[_Table]) -> list[list[np.ndarray]]:
    """Return for each table the units on every parameter axis that holds some of its units."""
    owner = np.full(len(unit), -1)
    for i, table in enumerate(tables):
        owner[table.units] = i
    axes: list[list[np.ndarray]] = [[] for _ in tables]
    for labels in ledger.axes.values() if tables else ():
        units = unit[labels]
        for i in distinct(owner[units]):
            if i >= 0:
                axes[i].append(units[owner[units] == i])
    return axes


def _in_order(table: _Table, units: np.ndarray) -> bool:
    """Tell whether every column of an axis has the rows in the same order.

    Otherwise a column that moves would not fit in the place of another.
    """
    order = np.argsort(table.units)
    at = order[np.searchsorted(table.units[order], units)]
    row, column = table.row[at], table.column[at]
    row = row[np.argsort(column, kind="stable")]
    _, count = np.unique(column, return_counts=True)
    return len(set(count)) == 1 and bool((row.reshape(len(count), -1) == row[: count[0]]).all())


# --- which block a unit travels with ------------------------------------------------------------


def parents(sets: Sets, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the block of each unit, -1 for none, and the blocks that stay.

    A unit in two blocks may only move inside their intersection; this gets a number below -1, and
    the two blocks stay. So it is with a block of several sets of units of one class: units may not
    go from one set to another.

    Args:
        sets: Which units travel with which block.
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
    intersections: dict[tuple[int, ...], int] = {}
    for u, s, n in zip(units[~plain], start[~plain], count[~plain]):
        key = tuple(sorted(sets.index[order[s : s + n]].tolist()))
        parent[u] = intersections.setdefault(key, -2 - len(intersections))
        crossed.append(sets.owner[list(key)])
    crossed.append(_leave_circles(parent))
    return parent, distinct(np.concatenate(crossed))


def _mixed(sets: Sets, kind: np.ndarray) -> np.ndarray:
    """Tell which sets share their block with another set of units of the same class."""
    entries = np.stack([sets.owner[sets.index], kind[sets.member], sets.index])
    entries = np.unique(entries, axis=1)
    _, same, count = np.unique(entries[:2], axis=1, return_inverse=True, return_counts=True)
    mixed = np.zeros(len(sets.owner), dtype=bool)
    mixed[entries[2][count[same.ravel()] > 1]] = True
    return np.isin(sets.owner, sets.owner[mixed])


def _leave_circles(parent: np.ndarray) -> np.ndarray:
    """Take units that would travel with themselves out of their blocks, in place; return them."""
    child = np.flatnonzero(parent >= 0)
    ends = (child, parent[child])
    graph = coo_array((np.ones(len(child), dtype=bool), ends), shape=(len(parent),) * 2)
    _, part = connected_components(graph, connection="strong")
    circular: np.ndarray = child[(np.bincount(part)[part[child]] > 1) | (parent[child] == child)]
    parent[circular] = -1
    return circular


# --- units to spaces ------------------------------------------------------------------------------


def spaces_of(ledger: Ledger) -> Spaces:
    """Solve the ties of a ledger and sort its units into spaces."""
    unit, sets, frozen = solve(ledger)
    cls = _classes(ledger, unit)
    parent, crossed = parents(sets, cls)
    frozen[crossed] = True
    cls = _refine_by_blocks(cls, parent, frozen, unit)
    spaces = _build(ledger, unit, cls, parent, frozen)
    sizes = {place: len(labels) for place, labels in ledger.axes.items()}
    return Spaces(spaces, _report(ledger, unit, frozen), sizes)


def _classes(ledger: Ledger, unit: np.ndarray) -> np.ndarray:
    """Return the class of each label: units of one class occur equally often in the same places."""
    cls, count = np.zeros(ledger.size, dtype=np.int64), 1
    for place in (p for p in ledger.places if len(p)):
        units, times = np.unique(unit[place], return_counts=True)
        key = cls[units] * (times.max() + 1) + times
        _, split = np.unique(key, return_inverse=True)
        cls[units] = count + split
        count += split.max() + 1
    return cls


def _refine_by_blocks(
    cls: np.ndarray, parent: np.ndarray, frozen: np.ndarray, unit: np.ndarray
) -> np.ndarray:
    """Split classes until their units lie in exchangeable blocks, and blocks have alike members.

    A block with a frozen member is frozen too, in place; its other members may move inside it.
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
        members = np.zeros(len(unit), dtype=np.uint64)  # the sum tells the classes of all members
        np.add.at(members, parent[inside], draw[refined[inside]])
        outer = np.where(block >= 0, refined[block], -1)
        split = _row_numbers(refined[live], stays, outer, members[live])
        if split.max(initial=-1) == refined[live].max(initial=-1):
            return refined
        refined[live] = split


def _row_numbers(*columns: np.ndarray) -> np.ndarray:
    """Number the rows that some columns make, equal rows alike, from 0."""
    number = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        values, code = np.unique(column, return_inverse=True)
        _, number = np.unique(number * len(values) + code, return_inverse=True)
    return number


def _build(
    ledger: Ledger, unit: np.ndarray, cls: np.ndarray, parent: np.ndarray, frozen: np.ndarray
) -> tuple[Space, ...]:
    wide = {place: x for place, x in ledger.axes.items() if len(x) > 1}  # one unit has no symmetry
    parametric = distinct(np.concatenate([unit[labels] for labels in wide.values()] + [[0]]))
    members_of: dict[int, list[int]] = {}
    for u in _with_blocks(parametric, parent):
        if u > 1 and not frozen[u]:
            members_of.setdefault(int(cls[u]), []).append(int(u))
    position, space = np.full(ledger.size, -1), np.full(ledger.size, -1)  # of each unit
    for c, units in members_of.items():
        units.sort(key=lambda u: (min(int(parent[u]), 1 << 60), u) if parent[u] >= 0 else (0, u))
        position[units], space[units] = np.arange(len(units)), c
    reads = np.zeros(ledger.size, dtype=bool)
    for labels in ledger.reads:
        reads[labels] = True
    for labels in ledger.written:
        reads[labels] = False
    axes: dict[int, list[Axis]] = {c: [] for c in members_of}
    for (tensor, dim), labels in wide.items():
        groups = ledger.grouped.get((tensor, dim), 1)
        # of a grouped convolution, one axis reads and the other writes
        read = bool(reads[labels].any()) if groups == 1 else not reads[wide[tensor, 0]].any()
        for c, index in _locate(unit[labels], position, space):
            axes[c].append(Axis(tensor, dim, index, read, groups))
    features: dict[int, list[Axis]] = {c: [] for c in members_of}
    for node, outputs in ledger.outputs.items():
        for dim, labels in outputs:
            for c, index in _locate(unit[labels], position, space):
                features[c].append(Axis(node, dim, index))
    return _name(members_of, axes, features, parent, space, position)


def _with_blocks(units: np.ndarray, parent: np.ndarray) -> np.ndarray:
    """Add the blocks of some units, and the blocks of those blocks."""
    while True:
        outer = parent[units]
        more = distinct(np.concatenate([units, outer[outer > FIXED]]))
        if len(more) == len(units):
            return more
        units = more


def _locate(
    units: np.ndarray, position: np.ndarray, space: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Return each space on an axis, and the positions `(units, times)` of its units there."""
    at = np.flatnonzero(space[units] >= 0)
    at = at[np.lexsort((position[units[at]], space[units[at]]))]
    for part in np.split(at, np.flatnonzero(np.diff(space[units[at]])) + 1):
        if len(part):
            times = np.count_nonzero(units[part] == units[part[0]])
            yield int(space[units[part[0]]]), part.reshape(-1, times)


def _name(
    members: dict[int, list[int]],
    axes: dict[int, list[Axis]],
    features: dict[int, list[Axis]],
    parent: np.ndarray,
    space: np.ndarray,
    position: np.ndarray,
) -> tuple[Space, ...]:
    outer_of = {c: _outer(units[0], parent, space) for c, units in members.items()}
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


def _outer(unit: int, parent: np.ndarray, space: np.ndarray) -> int:
    """Return the space of the block that a unit lies in, -1 if that block moves with nothing."""
    return int(space[parent[unit]]) if parent[unit] >= 0 else -1


def _depth(space: Space, by_name: dict[str, Space]) -> int:
    return 0 if space.parent is None else 1 + _depth(by_name[space.parent], by_name)


def _report(ledger: Ledger, unit: np.ndarray, frozen: np.ndarray) -> tuple[Frozen, ...]:
    cause = np.full(ledger.size, -1)  # of each unit, its first entry among the frozen ones
    for i, (labels, _, _) in reversed(list(enumerate(ledger.frozen))):
        cause[unit[labels]] = i
    report = []
    for (tensor, dim), labels in ledger.axes.items():
        units = unit[labels]
        stay = units[frozen[units]]
        if not len(stay) or len(labels) < 2:
            continue
        first = cause[stay[0]]
        _, node, reason = ledger.frozen[first] if first >= 0 else (None, "", CROSSED)
        if reason != KERNEL:
            report.append(Frozen(tensor, dim, len(stay), node, reason))
    return tuple(report)
