"""Aligners: from the costs of pairs of layers to a strictly increasing map.

An aligner is called with costs `(m, n)`, `m >= n`, of the layers of a deeper and a shallower
network, infinite where two layers can never pair. It returns `n` rows: for each layer of the
shallower network (a column) its partner in the deeper one (a row). Of equally good maps the one
with the smallest rows is taken.

References:
    Nguyen et al. (CLAFusion), Definition 1. Difference: the printed Algorithm 1 applies the
    first-layer constraint only while backtracking and can miss the optimum; here it restricts the
    table from the start.
    Xu et al., Training-free Heterogeneous Model Merging: segment-wise and layer-wise alignment and
    their baselines. Difference: the recursion of the released code adds the cost of a wrong
    column and rarely attains its optimum.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ArgumentError, PairingError


class Aligner:
    """What aligns the layers of a segment; derive from it for an aligner of your own."""

    def __call__(self, costs: np.ndarray) -> Sequence[int]:
        """Return the row of each column of costs `(m, n)`, strictly increasing."""
        raise NotImplementedError

    def needs_costs(self, possible: np.ndarray) -> bool:
        """Tell whether the map depends on the costs, so that they have to be measured.

        Args:
            possible: `(m, n)` whether a row and a column can pair.
        """
        return count_maps(possible) > 1


@dataclass(frozen=True)
class Monotone(Aligner):
    """The strictly increasing map of least total cost: the paper's cross-layer alignment.

    A constraint that no map of possible pairs meets is dropped: the last one first.

    Attributes:
        first: Map the first column to the first row.
        last: Map the last column to the last row (a single column goes to the first).

    Example:
        >>> costs = np.array([[0.3, 0.9], [0.1, 0.2], [0.5, 0.4]])
        >>> Monotone()(costs), Monotone(last=False)(costs)
        ([0, 2], [0, 1])
    """

    first: bool = True
    last: bool = True

    def __call__(self, costs: np.ndarray) -> list[int]:
        """Return the row of each column of costs `(m, n)`.

        Raises:
            ArgumentError: If there are more columns than rows.
            PairingError: If every map has infinite cost.
        """
        allowed = _constrained(costs, *self._constraints(np.isfinite(costs)))
        m, n = allowed.shape
        table = np.full((n + 1, m + 1), np.inf)  # least cost of the first columns in the first rows
        table[0] = 0.0
        for k in range(1, n + 1):
            for row in range(k, m + 1):
                pair = table[k - 1, row - 1] + allowed[row - 1, k - 1]
                table[k, row] = min(table[k, row - 1], pair)
        if not np.isfinite(table[n, m]):
            raise _out_of_order(m, n)
        rows, row = [0] * n, m
        for k in range(n, 0, -1):
            while row > k and table[k, row] == table[k, row - 1]:
                row -= 1
            rows[k - 1] = row - 1
            row -= 1
        return rows

    def needs_costs(self, possible: np.ndarray) -> bool:
        """Tell whether the constraints and the impossible pairs leave more than one map."""
        return count_maps(possible, *self._constraints(possible)) > 1

    def _constraints(self, possible: np.ndarray) -> tuple[bool, bool]:
        """Return which constraints hold: those asked for, as far as any map meets them."""
        ways = [(self.first, self.last), (self.first, False), (False, self.last)]
        return next((way for way in ways if count_maps(possible, *way)), (False, False))


#: The optimum under both constraints, as the paper has it.
monotone = Monotone()

#: Segment-wise alignment: only the first layers have to pair.
segment_wise = Monotone(last=False)


@dataclass(frozen=True)
class LayerWise(Aligner):
    """Cuts the rows into one run per column, so that the rows of a run are like its column.

    Each row costs what it costs with the column of its run, and the sum over all rows is least. The
    first run is the first row alone. A row that cannot pair with the column of its run costs as
    much as the most expensive pair that can. A column's partner is the last row of its run that
    can pair with it.

    Example:
        >>> costs = [[0.1, 0.9, 0.9], [0.9, 0.1, 0.9], [0.9, 0.1, 0.9], [0.9, 0.9, 0.0]]
        >>> LayerWise()(np.array(costs))
        [0, 2, 3]
    """

    def __call__(self, costs: np.ndarray) -> list[int]:
        """Return the row of each column of costs `(m, n)`.

        Raises:
            ArgumentError: If there are more columns than rows.
            PairingError: If no cut gives every column a row.
        """
        possible = np.isfinite(_constrained(costs, first=True, last=False))
        m, n = possible.shape
        if not count_maps(possible):
            raise _out_of_order(m, n)
        end = 1 + int(np.flatnonzero(possible[:, -1])[-1])
        worst = np.max(costs, where=np.isfinite(costs), initial=0)
        spent = np.where(np.isfinite(costs), costs, worst)
        # least cost of the first rows in the first runs: the last run goes on, or may end here
        inside, closed = np.full((2, n + 1, end + 1), np.inf)
        closed[0, 0] = 0.0
        for k in range(1, n + 1):
            for row in range(k, end + 1):
                before = min(inside[k, row - 1], closed[k - 1, row - 1])
                inside[k, row] = spent[row - 1, k - 1] + before
                closed[k, row] = inside[k, row] if possible[row - 1, k - 1] else np.inf
        rows, row = [0] * (n - 1) + [end - 1], end
        for k in range(n, 1, -1):
            while inside[k, row - 1] <= closed[k - 1, row - 1]:
                row -= 1
            row -= 1
            rows[k - 2] = row - 1
        return rows


#: Layer-wise alignment: every layer of the deeper network counts, not only those that pair.
layer_wise = LayerWise()


@dataclass(frozen=True)
class Nearest(Aligner):
    """A baseline that ignores the costs: the map nearest to rows that are wanted.

    Nearest means the least sum of squared distances between wanted and chosen rows; layers that can
    never pair are avoided.

    Attributes:
        wanted: From the numbers of rows and columns to the row that is wanted for each column.

    Example:
        >>> Nearest(lambda m, n: range(m - n, m))(np.ones((5, 3)))
        [2, 3, 4]
    """

    wanted: Callable[[int, int], Sequence[int]]

    def __call__(self, costs: np.ndarray) -> list[int]:
        """Return the row of each column of costs `(m, n)`.

        Raises:
            ArgumentError: If there are more columns than rows.
            PairingError: If every map has infinite cost.
        """
        m, n = np.shape(costs)
        distances = np.subtract.outer(np.arange(m), np.asarray(self.wanted(m, n))) ** 2
        return Monotone(False, False)(np.where(np.isfinite(costs), distances, np.inf))

    def needs_costs(self, possible: np.ndarray) -> bool:
        """Tell that no costs are needed."""
        return False


def _head(m: int, n: int) -> Sequence[int]:
    return range(n)


def _evenly(m: int, n: int) -> Sequence[int]:
    return [k * round(m / n) for k in range(n)]


def _head_and_tail(m: int, n: int) -> Sequence[int]:
    return [k if 2 * k < n else m - n + k for k in range(n)]


#: Same index, also called head, or the longest chain of heterogeneous model transfer.
same_index = Nearest(_head)

#: Every k-th row from the first one on, where k is the ratio of depths, rounded.
uniform = Nearest(_evenly)

#: The first half of the columns to the first rows, the second half to the last rows.
head_tail = Nearest(_head_and_tail)


@dataclass(frozen=True)
class Random(Aligner):
    """A baseline that draws one of the strictly increasing maps, each with the same probability.

    Cost matrices of one shape with the same impossible pairs get the same map.

    Attributes:
        seed: Seed of the draw.
        first: Map the first column to the first row, as the paper's code does.
        last: Map the last column to the last row.
    """

    seed: int = 0
    first: bool = True
    last: bool = False

    def __call__(self, costs: np.ndarray) -> list[int]:
        """Return the row of each column of costs `(m, n)`.

        Raises:
            ArgumentError: If there are more columns than rows.
            PairingError: If every map has infinite cost.
        """
        counts = _partial_counts(np.isfinite(_constrained(costs, self.first, self.last)))
        k, row = (size - 1 for size in counts.shape)
        if not counts[k, row]:
            raise _out_of_order(row, k)
        # Python's generator draws integers of any size; counts of deep networks exceed 64 bits
        number = random.Random(f"{self.seed} {row} {k}").randrange(counts[k, row])
        rows = []
        while k:
            if number < counts[k, row - 1]:  # of the maps that leave this row out
                row -= 1
            else:
                number -= counts[k, row - 1]
                k, row = k - 1, row - 1
                rows.append(row)
        return rows[::-1]

    def needs_costs(self, possible: np.ndarray) -> bool:
        """Tell that no costs are needed."""
        return False


def count_maps(possible: np.ndarray, first: bool = False, last: bool = False) -> int:
    """Count the strictly increasing maps that use possible pairs only.

    Args:
        possible: `(m, n)` whether a row and a column can pair.
        first: Count only those that map the first column to the first row.
        last: Count only those that map the last of several columns to the last row.
    """
    costs = _constrained(np.where(possible, 0.0, np.inf), first, last)
    return int(_partial_counts(np.isfinite(costs))[-1, -1])


def _partial_counts(allowed: np.ndarray) -> np.ndarray:
    """Return `(n + 1, m + 1)`: the number of maps of the first `k` columns into the first rows."""
    m, n = allowed.shape
    counts = np.zeros((n + 1, m + 1), dtype=object)
    counts[0] = 1
    for k in range(1, n + 1):
        for row in range(k, m + 1):
            pairs = counts[k - 1, row - 1] * int(allowed[row - 1, k - 1])
            counts[k, row] = counts[k, row - 1] + pairs
    return counts


def _constrained(costs: np.ndarray, first: bool, last: bool) -> np.ndarray:
    """Return a copy of costs, infinite where the constraints forbid a pair."""
    allowed = np.array(costs, dtype=float)
    m, n = allowed.shape
    if m < n:
        raise ArgumentError(
            f"a cost matrix of shape ({m}, {n})",
            where="the argument `costs`",
            expected="at least as many rows (layers of the deeper network) as columns",
            do="transpose it",
        )
    if first:
        allowed[1:, 0] = np.inf
    if last and n > 1:
        allowed[:-1, -1] = np.inf
    return allowed


def _out_of_order(m: int, n: int) -> PairingError:
    return PairingError(
        "layers that can only pair out of order",
        where=f"a segment of {m} and {n} layers",
        expected="for each layer of the shallower network one of its kind, in order",
        do="fuse networks of one family, drop a constraint on the first or last layers, or give "
        "the pairs by hand: fxfuse.align(models, data, pairs=...)",
    )
