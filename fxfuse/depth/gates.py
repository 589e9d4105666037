"""Straight lines in place of activations: what merging a layer into the next one needs.

A gate takes what was measured of a layer's units and returns a slope and an offset for each.

References:
    Nguyen et al. (CLAFusion), section 3.2: the sign of the sum, the majority vote and the average
    of the signs of the pre-activations. Beyond the paper: the least-squares line, which for a
    rectifier of normal pre-activations has the average of signs as its slope, and an offset.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import PassError


class Responses:
    """Streamed sums over the pre-activations of units and over what an activation makes of them.

    Args:
        layer: Name of the layer, for errors.
        rectifies: Whether the activation keeps what is far above zero and drops what is far below.
    """

    def __init__(self, layer: str = "", rectifies: bool = True) -> None:
        self.layer, self.rectifies = layer, rectifies
        self.count = 0
        self.z = self.a = self.zz = self.za = self.positive = torch.zeros((), dtype=torch.float64)

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add values `(units, positions)` before and behind the activation."""
        z, a = before.double(), after.double()
        self.count += z.shape[1]
        self.positive = (z > 0).sum(1) + self.positive.to(z.device)
        sums = z.sum(1), a.sum(1), (z * z).sum(1), (z * a).sum(1)
        known = self.z, self.a, self.zz, self.za
        self.z, self.a, self.zz, self.za = (x + y.to(z.device) for x, y in zip(sums, known))


Gate = Callable[[Responses], tuple[Tensor, Tensor]]


def sign_of_sum(units: Responses) -> tuple[Tensor, Tensor]:
    """Keep a unit whose pre-activations sum to no less than zero."""
    return _without_offset(units, (units.z >= 0).double())


def majority_vote(units: Responses) -> tuple[Tensor, Tensor]:
    """Keep a unit that is active on at least half of the samples."""
    return _without_offset(units, (units.positive / units.count >= 0.5).double())


def average_of_signs(units: Responses) -> tuple[Tensor, Tensor]:
    """Scale a unit by the share of the samples on which it is active (above zero)."""
    return _without_offset(units, units.positive.double() / units.count)


def line(units: Responses) -> tuple[Tensor, Tensor]:
    """Fit the least-squares line; right for any activation."""
    z, a, n = units.z / units.count, units.a / units.count, units.count
    spread = (units.zz / n - z * z).clamp(min=0)
    moves = spread > 1e-9 * (units.zz / n)
    slope = torch.where(moves, (units.za / n - z * a) / torch.where(moves, spread, 1.0), 0.0)
    return slope, a - slope * z


def line_through_zero(units: Responses) -> tuple[Tensor, Tensor]:
    """Fit the least-squares line without an offset, for networks without biases."""
    moves = units.zz > 0
    slope = torch.where(moves, units.za / torch.where(moves, units.zz, 1.0), 0.0)
    return slope, torch.zeros_like(slope)


def _without_offset(units: Responses, slope: Tensor) -> tuple[Tensor, Tensor]:
    if not units.rectifies:
        raise PassError(
            "a gate by sign on an activation that is no rectifier",
            where=f"layer '{units.layer}'",
            expected="an activation that keeps what is far above zero and drops what is far below",
            do="use gates.line, which fits any activation, or least squares (no gate)",
        )
    return slope, torch.zeros_like(slope)
