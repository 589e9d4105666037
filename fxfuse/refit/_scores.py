"""Fit the layer of class scores by the divergence of its class probabilities from those wanted.

Least squares weighs an error of a score the same where a class is ruled out as where it is in
doubt. In few units, which cannot give what many gave, this spoils what the network was sure of.

The divergence is convex in the layer's weights, and its curvature at most half that of the plain
regression. So a network's own weights and those of least squares are followed downhill by steps of
one factorised system. How far, and how strongly they are held back, shows on samples held out. One
factor for all scores changes no decision: what is not clearly nearer there than the own weights
times such a factor leaves these, and what that is not, the own weights.

References:
    Boehning 1992, Multinomial logistic regression algorithm: the bound on the curvature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._ranks import total, total_of

STEPS = 100  # at most, from each start with each ridge
WORK = 1 << 36  # multiply-adds of all steps together, which take fewer of large layers
ROUNDING = 1e-9  # share of all variance that is added, so that rounding leaves a system regular
BOUND = 0.5  # of the curvature, relative to the plain regression's
OF_ONE, OF_MANY = 2.0, 3.0  # times its chance that a gain has to be: of one trial, of the best
LARGEST, HALVINGS = 16.0, 20  # the factor of all scores, and how often its range is halved


@dataclass(frozen=True, eq=False)
class Scores:
    """What a layer reads and what it should say.

    Attributes:
        x: `(rows, inputs)`, in float64; a column of ones is last, if there is a bias.
        wanted: `(rows, classes)` logits, in float64.
        fit: How many rows, the first ones, to fit to.
        biased: Whether there is a bias.
    """

    x: Tensor
    wanted: Tensor
    fit: int
    biased: bool

    def nearest(self, starts: Sequence[Tensor], ridges: Sequence[float]) -> Tensor:
        """Return the weights `(inputs, classes)` that come nearest, fitted to all rows.

        Args:
            starts: Weights to start from; where nothing is clearly nearer, the first stay, but for
                a factor.
            ridges: Strengths with which weights are held at their start, relative to the mean
                variance of the inputs.
        """
        held, first = slice(self.fit, None), slice(self.fit)
        if not total_of(self.fit) or not total_of(len(self.x) - self.fit):
            return starts[0]
        tries = len(starts) * len(ridges)
        rows = 3 * int(total_of(len(self.x))) + 2 * self.x.shape[1]
        work = tries * rows * starts[0].numel()
        most = min(STEPS, WORK // max(work, 1))
        best, nearest, chosen = math.inf, starts[0], (starts[0], 0.0, 0)
        for start in starts:
            for ridge in ridges:
                for step, weights in enumerate(self._descend(start, ridge, first, most)):
                    far = total_of(float(self._apart(weights, held).sum()))
                    if far < best:
                        best, nearest, chosen = far, weights, (start, ridge, step)
        own, scaled = (self._apart(w, held) for w in (starts[0], self._scaled(starts[0], first)))
        scales = _clearly(own - scaled, OF_ONE)
        gains = (scaled if scales else own) - self._apart(nearest, held)
        if not _clearly(gains, OF_MANY):
            return self._scaled(starts[0], slice(None)) if scales else starts[0]
        start, ridge, steps = chosen
        *_, weights = self._descend(start, ridge, slice(None), steps)
        return weights

    def _descend(self, start: Tensor, ridge: float, rows: slice, steps: int) -> Iterator[Tensor]:
        """Yield weights that are ever nearer on some rows, from the start on."""
        yield start
        x, p = self.x[rows], self.wanted[rows].softmax(1)
        count = total_of(len(x))
        products, sums = (t / count for t in total(x.T @ x, x.sum(0)))
        hold = ridge * (products.diagonal() - sums.square()).clamp(min=0).mean()
        holds = hold.expand(len(products)).clone()
        holds[-1] *= not self.biased
        system = BOUND * products + holds.diag()
        system.diagonal().add_(ROUNDING * system.trace())
        factor, failed = torch.linalg.cholesky_ex(system)
        weights = start
        for _ in range(0 if bool(failed) else steps):
            (lacking,) = total(x.T @ (p - (x @ weights).softmax(1)))
            lacking = lacking / count - holds[:, None] * (weights - start)
            weights = weights + torch.cholesky_solve(lacking, factor)
            yield weights

    def _scaled(self, weights: Tensor, rows: slice) -> Tensor:
        """Return weights times the factor with which their scores come nearest on some rows."""
        scores, p = self.x[rows] @ weights, self.wanted[rows].softmax(1)
        low, high = -math.log(LARGEST), math.log(LARGEST)
        for _ in range(HALVINGS):  # the divergence is convex in the factor
            middle = (low + high) / 2
            slope = ((math.exp(middle) * scores).softmax(1) - p) * scores
            low, high = (low, middle) if total_of(float(slope.sum())) > 0 else (middle, high)
        return math.exp((low + high) / 2) * weights

    def _apart(self, weights: Tensor, rows: slice) -> Tensor:
        """Return the divergence (nats) from what is wanted, `(rows,)`, but for a constant."""
        p = self.wanted[rows].softmax(1)
        return -(p * (self.x[rows] @ weights).log_softmax(1)).sum(1)


def _clearly(gains: Tensor, times: float) -> bool:
    """Tell whether gains `(rows,)` are more than some times what chance gives their mean."""
    count = total_of(len(gains))
    mean = total_of(float(gains.sum())) / count
    spread = math.sqrt(max(total_of(float(gains.square().sum())) / count - mean**2, 0.0))
    return mean > times * spread / math.sqrt(count)
