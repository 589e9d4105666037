"""Fit one contraction of the fused network to what is wanted of it, at a sample of its positions.

Weights are corrected by ridge least squares, first to the mean of the networks' values, then to
that of their activations; then units get back the spread that averaging takes from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .correction import STRETCH, Correction, Regression
from .moments import Moments
from .network import Network
from .refit import gain_of, restate_norm, tensor_of
from .sampling import rows_as_weight, units_as_rows, weight_as_rows
from .targets import Aim

ROUNDING = 1e-5  # a target met but for this share of its spread is met
FAR = 0.5  # share of the variance of a unit's activation that its start may miss


@dataclass(frozen=True, eq=False)
class Task:
    """What a contraction reads and what is wanted of it, at some positions.

    Attributes:
        x: What it reads, `(groups, positions, inputs)`; written to.
        wanted: The mean of the networks' values, `(positions, units)`; written to.
        acted: The mean of their activations, if one alone reads the values.
        rest: What is added to the contraction's own value, if that is part of a sum.
        activation: What that activation makes of values.
        fit: How many of the positions, the first ones, may be fitted to for choosing a ridge.
        thin: See `correction.Regression`.
    """

    x: Tensor
    wanted: Tensor
    acted: Tensor | None
    rest: Tensor | None
    activation: Callable[[Tensor], Tensor]
    fit: int
    thin: int


class Fit:
    """A contraction whose weight is being fitted, in place.

    Args:
        network: The fused network.
        aim: The contraction.
        task: What is wanted of it.
        ridges: See `correction.corrected`.
    """

    def __init__(self, network: Network, aim: Aim, task: Task, ridges: Sequence[float]) -> None:
        self.network, self.aim, self.task, self.ridges = network, aim, task, ridges
        self.producer, self.biased = aim.producer, aim.producer.biased
        self.origin = task.x.mean(1, keepdim=True) * self.biased
        task.x.sub_(self.origin)
        self.regression = Regression(task.x, task.fit, self.biased, task.thin)
        self.values = self._given(self._weight())  # but for a constant

    def __call__(self, steps: int) -> Correction:
        """Fit; return the last correction.

        Args:
            steps: Corrections by the results of the activation, if there is one.
        """
        targets, acted, rest = self.task.wanted, self.task.acted, self.task.rest
        if acted is not None:
            self._revive(targets, acted)
        self.whole = whole = moments_of_rows(targets)
        if rest is not None:
            targets = targets.sub_(rest)
        wanted, found = moments_of_rows(targets), moments_of_rows(self.values)
        gain = self._gain(wanted, found)
        self._scale(gain)
        shift = (wanted.mean - gain * found.mean) * self.biased
        left = targets.sub_(self.values).sub_(_row(shift, targets))
        correction = self._correct(left, whole, acted is None or not steps)
        mean = wanted.mean
        if acted is not None:
            correction, mean = self._descend(acted, correction, mean, steps)
        self._complete(wanted, mean)
        return correction

    def _revive(self, targets: Tensor, acted: Tensor) -> None:
        """Start units within reach of what is wanted of them, in place.

        The mean of a unit that never fires and one that does can be one that never fires.
        """
        missed = moments_of_rows(acted - self.task.activation(targets)).power ** 2
        lost = np.flatnonzero(missed > FAR * moments_of_rows(acted).variance)
        if len(lost):
            units = torch.as_tensor(lost, device=targets.device)
            targets.index_copy_(1, units, acted.index_select(1, units))

    def _descend(
        self, acted: Tensor, correction: Correction, mean: np.ndarray, steps: int
    ) -> tuple[Correction, np.ndarray]:
        """Correct further by what the activation's results lack, as the next layers read these.

        An activation with slopes between 0 and 1 is the gradient of a convex function, so that to
        meet its results is convex too (the loss matched to it), and each step by the plain
        regression's curvature, which bounds that of the loss, descends.
        """
        self.whole = moments_of_rows(acted)
        for step in range(steps):
            shift = (mean - moments_of_rows(self.values).mean) * self.biased
            value = self.values + _row(shift, self.values)
            if self.task.rest is not None:
                value += self.task.rest
            left = acted - self.task.activation(value)
            mean = mean + moments_of_rows(left).mean * self.biased
            correction = self._correct(left, self.whole, step == steps - 1)
            if correction.weight is None:
                break
        return correction, mean

    def _correct(self, left: Tensor, whole: Moments, last: bool) -> Correction:
        """Fit what is left to explain, unless that is nothing but rounding.

        After the last correction, values are followed only where their spread still counts.
        """
        least = ROUNDING**2 * float((whole.power**2).sum())
        rest = units_as_rows(left, self.producer.affine.groups)
        correction = self.regression.correct(rest, self.ridges, least)
        if correction.weight is not None:
            weight = tensor_of(self.network, self.producer.weight)
            added = rows_as_weight(correction.weight, self.producer.affine)
            weight.data.add_((added.T if self.producer.turned else added).to(weight))
            if self.aim.swing or not last:
                self.values += self._given(correction.weight)
        return correction

    def _given(self, weight: Tensor) -> Tensor:
        """Return what a weight `(groups, inputs, out / groups)` gives, `(positions, units)`."""
        return (self.task.x @ weight.to(self.task.x)).transpose(0, 1).flatten(1)

    def _weight(self) -> Tensor:
        weight = tensor_of(self.network, self.producer.weight).detach()
        return weight_as_rows(weight.T if self.producer.turned else weight, self.producer.affine)

    def _scale(self, gain: np.ndarray) -> None:
        """Scale the units that the contraction writes."""
        weight = tensor_of(self.network, self.producer.weight)
        factor = torch.as_tensor(gain).to(weight)
        along = [1] * weight.dim()
        along[int(self.producer.turned)] = -1
        weight.data.mul_(factor.view(along))
        if self.producer.bias is not None:
            tensor_of(self.network, self.producer.bias).data.mul_(factor)
        self.values.mul_(_row(gain, self.values))

    def _complete(self, wanted: Moments, mean: np.ndarray) -> None:
        """Give the units a mean, and the target's spread where that counts."""
        producer = self.producer
        found = moments_of_rows(self.values)  # not of the last, their mean is the same: nothing
        gain = self._gain(wanted, found) if self.aim.swing else np.ones_like(found.mean)
        if producer.norm is not None:
            found.shift = found.shift + self._offset().to(found.shift)
            restate_norm(self.network, producer.roles, found, gain, mean)
            return
        self._scale(gain)
        if producer.bias is not None:
            shift = mean - gain * found.mean
            bias = tensor_of(self.network, producer.bias)
            offset = self._offset() - bias.detach().double()
            bias.data.copy_(torch.as_tensor(shift).to(offset) - offset)

    def _offset(self) -> Tensor:
        """Return what the contraction adds to the values held here, `(units,)`."""
        moved = self.origin.double() @ self._weight().double()
        offset = moved.transpose(0, 1).flatten()
        if self.producer.bias is not None:
            offset = offset + tensor_of(self.network, self.producer.bias).detach().double()
        return offset

    def _gain(self, wanted: Moments, found: Moments) -> np.ndarray:
        one = np.ones_like(found.mean)
        if self.biased:
            return gain_of(wanted.spread, found.spread, one)
        return gain_of(wanted.power, found.power, one)


def moments_of_rows(rows: Tensor) -> Moments:
    """Return the moments of units `(positions, units)`."""
    moments = Moments()
    moments.count, moments.shift = len(rows), rows[:STRETCH].float().mean(0)
    shifted = rows - moments.shift
    moments.total = shifted.sum(0).double()
    moments.squares = shifted.square_().sum(0).double()
    return moments


def _row(units: np.ndarray, rows: Tensor) -> Tensor:
    return torch.as_tensor(units).to(rows)
