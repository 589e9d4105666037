"""Aligners: from the costs of pairs of layers to the row of each column, strictly increasing.

An aligner is called with a matrix `(m, n)`, `m >= n`, infinite where layers never pair, and returns
`n` rows. Whoever also says through `needs_costs(possible)` that nothing is left to decide spares a
pass over the data. Ties go to the smallest index.

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

Aligner = Callable[[np.ndarray], Sequence[int]]


@dataclass(frozen=True)
class Monotone:
    """The strictly increasing map of least total cost: the paper's cross-layer alignment.

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
        allowed = _constrain(costs, self.first, self.last)
        m, n = allowed.shape
        table = np.full((n + 1, m + 1), np.inf)
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
        return choices(possible, self.first, self.last) > 1


#: The optimum under both constraints, as the paper has it.
monotone = Monotone()


#: Segment-wise alignment: only the first layers are bound to each other.
segment_wise = Monotone(last=False)


def layer_wise(costs: np.ndarray) -> list[int]:
    """Cut the rows into one run per column, so that every row is like the column of its run.

    The sum of costs of all rows, each to the column of its run, is least; the first run is the
    first row alone. A row that cannot pair with the column of its run costs as much as the worst
    pair that can.

    Args:
        costs: `(m, n)` with `m >= n`; infinite where a pair is impossible.

    Returns:
        The last row of each run that can pair with its column.

    Raises:
        ArgumentError: If there are more columns than rows.
        PairingError: If no cut gives every column a row.

    Example:
        >>> layer_wise(np.array([[0.1, 0.9, 0.9], [0.9, 0.1, 0.9], [0.9, 0.1, 0.9], [0.9, 0.9, 0]]))
        [0, 2, 3]
    """
    possible = np.isfinite(_constrain(costs, first=True, last=False))
    m, n = possible.shape
    if not choices(possible):
        raise _out_of_order(m, n)
    end = 1 + int(np.flatnonzero(possible[:, -1])[-1])
    spent = np.where(np.isfinite(costs), costs, np.max(costs, where=np.isfinite(costs), initial=0))
    inside, closed = np.full((2, n + 1, end + 1), np.inf)  # the last run goes on, or may end here
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


@dataclass(frozen=True)
class Nearest:
    """A baseline that looks at no cost: of all maps the nearest to the rows that are wanted.

    Nearest is the least sum of squared distances, so that layers which never pair are avoided.

    Attributes:
        wanted: From the numbers of rows and columns to the row that each column wants.

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
        away = np.subtract.outer(np.arange(m), np.asarray(self.wanted(m, n))) ** 2
        return Monotone(False, False)(np.where(np.isfinite(costs), away, np.inf))

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


#: Every k-th row from the first one on, k the rounded ratio of depths.
uniform = Nearest(_evenly)


#: The upper half of the columns at the head, the lower at the tail.
head_tail = Nearest(_head_and_tail)


@dataclass(frozen=True)
class Random:
    """A baseline that draws one of the strictly increasing maps, each with the same probability.

    Matrices of one shape with the same impossible pairs get the same map.

    Attributes:
        seed: Of the draw.
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
        counts = _counts(np.isfinite(_constrain(costs, self.first, self.last)))
        k, row = (size - 1 for size in counts.shape)
        if not counts[k, row]:
            raise _out_of_order(row, k)
        # counts of deep networks are beyond 64 bits, which this generator does not mind
        left = random.Random(f"{self.seed} {row} {k}").randrange(counts[k, row])
        rows = []
        while k:
            if left < counts[k, row - 1]:
                row -= 1
            else:
                left -= counts[k, row - 1]
                k, row = k - 1, row - 1
                rows.append(row)
        return rows[::-1]

    def needs_costs(self, possible: np.ndarray) -> bool:
        """Tell that no costs are needed."""
        return False


def choices(possible: np.ndarray, first: bool = False, last: bool = False) -> int:
    """Count the strictly increasing maps through pairs that are possible.

    Args:
        possible: `(m, n)` whether a row and a column can pair.
        first: Count those that map the first column to the first row.
        last: Count those that map the last column to the last row (if there are several).
    """
    costs = _constrain(np.where(possible, 0.0, np.inf), first, last)
    return int(_counts(np.isfinite(costs))[-1, -1])


def needs_costs(aligner: Aligner, possible: np.ndarray) -> bool:
    """Tell whether an aligner has to see costs; one that does not say has to, given a choice."""
    ask = getattr(aligner, "needs_costs", None)
    return choices(possible) > 1 if ask is None else ask(possible)


def _counts(allowed: np.ndarray) -> np.ndarray:
    """Return `(n + 1, m + 1)`: in how many ways the first columns map into the first rows."""
    m, n = allowed.shape
    table = np.zeros((n + 1, m + 1), dtype=object)
    table[0] = 1
    for k in range(1, n + 1):
        for row in range(k, m + 1):
            table[k, row] = table[k, row - 1] + table[k - 1, row - 1] * int(allowed[row - 1, k - 1])
    return table


def _constrain(costs: np.ndarray, first: bool, last: bool) -> np.ndarray:
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
        do="fuse networks of one family, bind the first and last layers less tightly, or give "
        "the pairs by hand: fxfuse.align(models, data, pairs=...)",
    )
