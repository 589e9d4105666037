"""Fit a weight that several nodes use, such as a tied embedding, over all uses at once.

One sweep gathers, for every contraction with such a weight, its inputs and what its outputs lack;
the weight stays as it is. Then one correction is fitted to all uses, with the errors of each
relative to the size of its target. Uses that are no contraction, such as looking up rows, hold the
weight back. A second sweep lets all other layers follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration.affine import users_of
from ..calibration.least_squares import Correction, InputSums, Sums, best_ridge
from ..calibration.moments import moments_of_rows
from ..calibration.rows import in_groups, rows_as_weight, weight_as_rows
from ..graph.state import tensor_at
from ..ir import LayerFit
from ..spaces.network import Network
from ._targets import Aim, Goal


@dataclass(frozen=True, eq=False)
class Use:
    """One of several problems that one correction is to solve.

    Attributes:
        fit: Sums over the rows to fit to.
        held: Sums over others, to choose the ridge.
        power: Mean square of what is wanted, summed over the units: errors are relative to it.
    """

    fit: Sums
    held: Sums
    power: float


def best_joint_correction(uses: Sequence[Use], stay: float, ridges: Sequence[float]) -> Correction:
    """Choose the correction that all uses of a weight want together, and its ridge.

    Args:
        uses: The problems, whose errors relative to their power are added up.
        stay: What the squared size of the correction costs besides, where the weight is used in
            ways that are no problem here.
        ridges: The ridges to choose from; no correction at all is a choice, too.
    """

    def joint(parts: Sequence[tuple[Sums, float]]) -> Sums:
        moments = [(*_moments(sums), power) for sums, power in parts]
        xx = torch.stack([xx / power for xx, _, power in moments]).sum(0)
        xr = torch.stack([xr / power for _, xr, power in moments]).sum(0)
        eye = torch.eye(xx.shape[1]).to(xx)
        return Sums(InputSums(False, 1, xx + stay * eye), xr)

    def error(ridge: float) -> float:
        correction = None if ridge == math.inf else fit.solve(ridge)
        if correction is None and ridge < math.inf:
            return math.inf
        moved = 0.0 if correction is None else stay * float(correction.square().sum())
        return moved + sum(use.held.error(use.fit, correction) / use.power for use in uses)

    fit = joint([(use.fit, use.power) for use in uses])
    least, ridge = best_ridge(error, ridges)
    weight = None if ridge == math.inf else fit.solve(ridge)
    return Correction(weight, ridge, least)


def _moments(sums: Sums) -> tuple[Tensor, Tensor]:
    """Return the mean products of inputs with each other and with residuals."""
    count = sums.inputs.count
    xx, xr = sums.inputs.xx / count, sums.xr / count
    if sums.inputs.centred:
        x = sums.inputs.x / count
        xx, xr = xx - x.mT @ x, xr - x.mT @ (sums.r / count)
    return xx, xr


@dataclass(eq=False)
class SharedFits:
    """What the contractions with shared weights read and lack, gathered in one sweep.

    Attributes:
        network: The fused network.
        ridges: As in `LeastSquares`.
        uses: By weight, the contractions that use it and their problems.
    """

    network: Network
    ridges: Sequence[float]
    uses: dict[str, list[tuple[Aim, Use]]] = field(default_factory=dict)

    def add(self, aim: Aim, goal: Goal, x: Tensor, added: Tensor | None) -> None:
        """Add a contraction.

        Args:
            aim: The contraction.
            goal: What is wanted of it.
            x: What it reads at these positions, `(groups, positions, inputs)`.
            added: What is added to its own value, if that is part of a sum.
        """
        producer, module = aim.producer, self.network.module
        if goal.sample.dual_every:  # too wide for the products of its inputs
            return
        wanted = goal.values if added is None else goal.values - added
        weight = tensor_at(module, producer.weight).detach()
        rows = weight_as_rows(weight.T if producer.transposed else weight, producer.affine)
        left = wanted - (x @ rows.to(x)).transpose(0, 1).flatten(1)
        if producer.bias is not None:
            left = left - tensor_at(module, producer.bias).detach().to(left)
        moments = moments_of_rows(wanted)
        power = float((moments.variance if producer.biased else moments.rms**2).sum())
        if not power:
            return
        fit, parts = sum(goal.sample.fit), []
        for part in (slice(fit), slice(fit, None)):
            sums = Sums(InputSums(producer.biased))
            sums.inputs.add(x[:, part])
            sums.add(x[:, part], in_groups(left, producer.affine.groups)[:, part])
            parts.append(sums.summed(sums.inputs.summed()))
        if all(sums.inputs.count for sums in parts):
            self.uses.setdefault(producer.weight, []).append((aim, Use(parts[0], parts[1], power)))

    def solve(self) -> list[LayerFit]:
        """Correct the weights; return how well each is fitted to all of its uses."""
        fits = []
        for name, uses in self.uses.items():
            layouts = {(a.producer.transposed, a.producer.affine.groups) for a, _ in uses}
            if len(layouts) > 1:
                continue
            producer, weight = uses[0][0].producer, tensor_at(self.network.module, name)
            others = len(users_of(self.network, name)) - len(uses)
            spread = float((weight - weight.mean(0)).double().square().sum())
            stay = others / max(spread, 1e-30)
            found = best_joint_correction([use for _, use in uses], stay, self.ridges)
            if found.weight is not None:
                moved = rows_as_weight(found.weight, producer.affine.kernel)
                weight.data.add_((moved.T if producer.transposed else moved).to(weight))
            fits.append(LayerFit(producer.node, 1 - found.error / len(uses), found.ridge))
        return fits
