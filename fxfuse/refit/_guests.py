"""Targets from guests: their features, mapped to the fused network's units.

The map is a ridge regression on the positions where a contraction is fitted; its ridge is chosen on
samples held out. For a unit that the features do not explain, it gives the unit's mean. Features
that explain nothing are left out of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..calibration.data import Calibration
from ..calibration.least_squares import Regression
from ..calibration.moments import mean_of_rows
from ..calibration.positions import Positions
from ..calibration.rows import output_rows
from ..calibration.run import Track
from ..calibration.spill import SpillStore
from ..coupling.guests import Guest

RIDGES = (1e-8, 1e-6, 1e-4, 1e-2, 1.0)  # relative to the mean variance of a guest's features


class Visits:
    """Guests on their way over the data, each through its own graph.

    Args:
        guests: The networks.
        data: Calibration inputs.
        samples: How many of the first ones.
        size: How many of them are one batch.
        store: Where their values wait between stops.
    """

    def __init__(
        self,
        guests: Sequence[Guest],
        data: Calibration,
        samples: int,
        size: int,
        store: SpillStore,
    ) -> None:
        self.guests, self.tracks = guests, []
        for guest in guests:
            nodes = list(guest.network.module.graph.nodes)
            self.tracks.append(Track(guest.network, data, samples, size, nodes, store))

    def said(
        self, node: str, axis: int, sample: Positions, values: Tensor
    ) -> list[tuple[float, Tensor]]:
        """Return the share of each guest that meets the fused network at a node, and what it says.

        Args:
            node: The node.
            axis: The axis of its units, counted from the front.
            sample: The positions.
            values: `(positions, units)` what the other networks have there.
        """
        told = []
        for guest, track in zip(self.guests, self.tracks):
            if node not in guest.places:
                continue
            theirs, along = guest.places[node]
            rows = _rows(track, theirs, axis if along is None else along, sample)
            said = rows if along is None else _mapped(rows, values, sample)
            if said is not None and guest.share:
                told.append((guest.share, said.to(values)))
        return told

    def outputs(self, batch: int) -> list[tuple[float, Any]]:
        """Take a batch to the end; return the share and the output of each guest."""
        return [
            (guest.share, track.go(batch, len(track.order))[1])
            for guest, track in zip(self.guests, self.tracks)
        ]


def among(values: Tensor, told: Sequence[tuple[float, Tensor]]) -> None:
    """Give guests their share of values `(positions, units)`, in place."""
    if told:
        values.mul_(1 - sum(share for share, _ in told))
    for share, said in told:
        values.add_(said, alpha=share)


def _rows(track: Track, node: str, axis: int, sample: Positions) -> Tensor:
    """Take a guest to a node; return its values at some positions, `(positions, units)`."""
    upto = [n.name for n in track.order].index(node) + 1
    parts = []
    for batch, at in enumerate(sample.at):
        _, value = track.go(batch, upto)
        parts.append(output_rows(value, axis, at))
        track.rest(batch)
    return sample.joined(parts)


def _mapped(rows: Tensor, values: Tensor, sample: Positions) -> Tensor | None:
    """Return what features tell of values; None if that is nothing."""
    x = (rows - mean_of_rows(rows, 0)).to(values)[None]
    mean = mean_of_rows(values, 0)
    regression = Regression(x, sum(sample.fit), True, order=sample.order)
    weight = regression.correct((values - mean)[None], RIDGES, 0.0).weight
    return None if weight is None else torch.addmm(mean, x[0], weight[0].to(x))
