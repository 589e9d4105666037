"""Choose the positions at which a contraction is fitted, and those held out of the fit.

A position is a sample and a place in it, such as a pixel or a token. Where there are more than
needed, some are drawn, one from each of as many equal stretches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

HELD_OUT = 4  # every fourth sample is held out of fits, to choose the ridge


@dataclass(frozen=True, eq=False)
class Positions:
    """Positions that were drawn, numbered within each batch: sample by sample, place by place.

    Attributes:
        at: The positions of each batch: first those to fit to, then those held out.
        fit: How many of each batch are to fit to.
        dual_every: How the fit is to be solved, see `least_squares.Regression`.
        numbers: Of the positions of each batch, among those that were drawn of all samples.
    """

    at: list[Tensor]
    fit: list[int]
    dual_every: int = 0
    numbers: list[Tensor] = field(default_factory=list)

    def keep(self, batch: int, which: Tensor | None) -> None:
        """Leave out, in place, the positions of a batch that do not count.

        Args:
            batch: Which batch.
            which: Whether each of its positions counts; None if all do.
        """
        if which is not None:
            self._keep_those(batch, which.to(self.at[batch].device)[self.at[batch]])

    def keep_below(self, batch: int, count: int) -> None:
        """Leave out, in place, the positions that a batch has not, as a graph with fewer nodes."""
        below = self.at[batch] < count
        if not bool(below.all()):
            self._keep_those(batch, below)

    def _keep_those(self, batch: int, kept: Tensor) -> None:
        fit = kept[: self.fit[batch]]
        self.at[batch] = self.at[batch][kept]
        self.numbers[batch] = self.numbers[batch][kept.cpu()]
        self.fit[batch] = int(fit.sum())

    @property
    def order(self) -> Tensor:
        """The numbers of all batches, as rows are joined."""
        return self.joined([numbers[:, None] for numbers in self.numbers]).flatten()

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Join the rows `(..., rows, units)` of all batches: first those to fit to."""
        pairs = list(zip(parts, self.fit))
        return torch.cat([p[..., :n, :] for p, n in pairs] + [p[..., n:, :] for p, n in pairs], -2)


def draw_positions(
    places: int, numbers: Sequence[Tensor], samples: int, count: int, dual_every: int = 0
) -> Positions:
    """Draw positions evenly; those of every fourth sample are held out, if there are so many.

    They do not depend on which process has which samples.

    Args:
        places: Number of places in one sample.
        numbers: Of the samples of each batch, increasing.
        samples: How many samples there are, of all processes together.
        count: Number of positions to draw, of all samples; all if there are no more.
        dual_every: See `Positions`.
    """
    every, count = places * samples, min(count, places * samples)
    drawn = torch.arange(count)
    if count < every:
        shifts = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        drawn = ((drawn + shifts) * (every / count)).long().clamp(max=every - 1)
    of, place = drawn // max(places, 1), drawn % max(places, 1)
    # of few samples, as one graph with many nodes, every fourth position is
    apart = of if samples >= HELD_OUT else torch.arange(count)
    held = apart % HELD_OUT == HELD_OUT - 1
    order = held.long().argsort(stable=True).argsort()
    own = torch.cat([*numbers])
    index = torch.searchsorted(own, of).clamp(max=len(own) - 1)
    mine = own[index] == of
    index, place, held, order = (t[mine] for t in (index, place, held, order))
    ends = torch.tensor([len(batch) for batch in numbers]).cumsum(0)
    batch = torch.searchsorted(ends, index, right=True)
    at = (index - torch.cat([ends.new_zeros(1), ends])[batch]) * places + place
    counts = batch.bincount(minlength=len(numbers)).tolist()
    parts = zip(*(t.split(counts) for t in (at, order, held)))
    sorted_parts = [[torch.cat([t[~h], t[h]]) for t in both] for *both, h in parts]
    fit = [n - int(h.sum()) for n, h in zip(counts, held.split(counts))]
    return Positions([at for at, _ in sorted_parts], fit, dual_every, [o for _, o in sorted_parts])
