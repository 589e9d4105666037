"""Ridge regression of a contraction's weights from streamed batches of what it reads and writes.

Batches of any size come in; only Gram matrices are held. A convolution is fitted on the patches its
kernel sees, so that padded borders come out right; each group is a regression of its own.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .composition import Affine
from .errors import ArgumentError, DataError


class NormalEquations:
    """The sums that ridge regressions need, in float64, added up batch by batch.

    Attributes:
        count: Number of rows so far.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add rows `(groups, rows, inputs)` and what each should give `(groups, rows, targets)`."""
        x, y = inputs.double(), targets.double()
        if not self.count:  # sums of what is shifted lose less to cancellation
            self.origin, self.aim = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - self.origin, y - self.aim
        sums = x.mT @ x, x.mT @ y, x.sum(1, keepdim=True), y.sum(1, keepdim=True)
        known = (self.xx, self.xy, self.x, self.y) if self.count else (0.0,) * 4
        self.xx, self.xy, self.x, self.y = (a + b for a, b in zip(known, sums))
        self.count += x.shape[1]

    def solve(
        self, ridge: float = 1e-3, prior: Tensor | None = None, bias: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the weight `(groups, targets, inputs)` and bias `(groups, targets)` of least cost.

        The cost is the mean squared error plus `ridge` times the mean variance of the inputs (their
        mean square, without a bias) times the squared distance of the weights to the prior.

        Args:
            ridge: How strongly the weights are drawn to the prior; above 0.
            prior: `(groups, targets, inputs)`; zero if not given.
            bias: Fit a bias; if not, it is zero.

        Raises:
            ArgumentError: If `ridge` is not above 0.
            DataError: If there are no rows, or some are not finite.
        """
        if not ridge > 0:
            raise ArgumentError(
                f"ridge {ridge}",
                where="the argument `ridge`",
                expected="a number above 0, relative to the mean variance of the inputs",
                do="leave it out, or give 1e-9 for a plain regression",
            )
        if not self.count or not bool(self.xx.isfinite().all() & self.xy.isfinite().all()):
            raise DataError(
                f"{self.count} rows of which some are not finite" if self.count else "no rows",
                where="least squares",
                expected="finite values",
                do="check the data's normalisation and the network's weights",
            )
        xx, xy, mean, aim = self._moments(bias)
        power = xx.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        system = xx + torch.diag_embed((ridge * power)[:, None].expand(xx.shape[:2]))
        start = torch.zeros_like(xy) if prior is None else prior.to(xx).mT
        weight = start + torch.cholesky_solve(xy - xx @ start, torch.linalg.cholesky(system))
        offset = (aim - mean @ weight) if bias else torch.zeros_like(aim)
        return weight.mT, offset[:, 0]

    def _moments(self, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return mean products of inputs, and with targets, and the means; about the means or 0."""
        xx, xy, x, y = (s / self.count for s in (self.xx, self.xy, self.x, self.y))
        xx, xy = xx - x.mT @ x, xy - x.mT @ y
        mean, aim = x + self.origin, y + self.aim
        return (
            (xx, xy, mean, aim) if centred else (xx + mean.mT @ mean, xy + mean.mT @ aim, mean, aim)
        )


class Refit:
    """Fits the weights of an affine map of known geometry to what its outputs should be.

    Args:
        affine: Gives kernel, stride, padding, dilation and groups; its widths need not fit.
    """

    def __init__(self, affine: Affine) -> None:
        self.affine, self.equations = affine, NormalEquations()

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add a batch: inputs and wanted outputs, laid out as the map reads and writes them."""
        self.equations.add(patches(x, self.affine), rows(target, self.affine))

    def solve(self, ridge: float = 1e-3, prior: Affine | None = None, bias: bool = True) -> Affine:
        """Return the fitted map; see `NormalEquations.solve`.

        Args:
            ridge: How strongly the weights are drawn to the prior.
            prior: A map of the fitted one's shape; zero if not given.
            bias: Fit a bias too.
        """
        groups, kernel = self.affine.groups, self.affine.kernel
        start = None if prior is None else prior.weight.flatten(1).unflatten(0, (groups, -1))
        weight, offset = self.equations.solve(ridge, start, bias)
        shape = -1, weight.shape[2] // math.prod(kernel), *kernel
        weight = weight.flatten(0, 1).reshape(shape)
        return replace(self.affine, weight=weight, bias=offset.flatten() if bias else None)


def patches(x: Tensor, affine: Affine) -> Tensor:
    """Return what each output of a map sees, `(groups, positions, in / groups * kernel)`."""
    if not affine.kernel:
        return x.reshape(1, -1, x.shape[-1])
    n = len(affine.kernel)
    x = F.pad(x, [p for p in reversed(affine.padding) for _ in range(2)])
    for axis, (k, s, d) in enumerate(zip(affine.kernel, affine.stride, affine.dilation)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.unflatten(1, (affine.groups, -1))
    places = range(3, 3 + n)
    x = x.permute(1, 0, *places, 2, *range(3 + n, 3 + 2 * n))
    return x.flatten(2 + n).flatten(1, -2)


def rows(y: Tensor, affine: Affine) -> Tensor:
    """Return the outputs of a map position by position, `(groups, positions, out / groups)`."""
    flat = y.movedim(1, -1) if affine.kernel else y
    return flat.reshape(
        -1, affine.groups, y.shape[1 if affine.kernel else -1] // affine.groups
    ).transpose(0, 1)
