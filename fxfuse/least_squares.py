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

    While there are fewer rows than inputs, the rows themselves are held, which are less.

    Attributes:
        count: Number of rows so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._sums: tuple[Tensor, ...] | None = None

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add rows `(groups, rows, inputs)` and what each should give `(groups, rows, targets)`."""
        x, y = inputs.double(), targets.double()
        if not self.count:  # sums of what is shifted lose less to cancellation
            self.origin, self.aim = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        self.count += x.shape[1]
        self._rows.append((x - self.origin, y - self.aim))
        if self.count >= x.shape[2]:
            for rows in self._rows:
                sums = _sums(*rows)
                known = self._sums or [torch.zeros_like(s) for s in sums]
                self._sums = tuple(a + b for a, b in zip(known, sums))
            self._rows = []

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
        held = self._sums or [t for rows in self._rows for t in rows]
        if not held or not all(bool(t.isfinite().all()) for t in held):
            raise DataError(
                f"{self.count} rows of which some are not finite" if held else "no rows",
                where="least squares",
                expected="finite values",
                do="check the data's normalisation and the network's weights",
            )
        start = None if prior is None else prior.to(held[0]).mT
        solve = self._from_rows if self._sums is None else self._from_sums
        weight, mean, aim = solve(ridge, start, bias)
        offset = (aim - mean @ weight) if bias else torch.zeros_like(aim)
        return weight.mT, offset[:, 0]

    def _from_sums(
        self, ridge: float, start: Tensor | None, centred: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Solve with one equation for each input; return weights and both means."""
        assert self._sums is not None, "rows were summed up"
        xx, xy, x, y = (s / self.count for s in self._sums)
        xx, xy = xx - x.mT @ x, xy - x.mT @ y
        mean, aim = x + self.origin, y + self.aim
        if not centred:
            xx, xy = xx + mean.mT @ mean, xy + mean.mT @ aim
        power = xx.diagonal(dim1=1, dim2=2).mean(1)
        rest = xy if start is None else xy - xx @ start
        weight = _regularised(xx, ridge * power, rest)
        return weight if start is None else start + weight, mean, aim

    def _from_rows(
        self, ridge: float, start: Tensor | None, centred: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Solve with one equation for each row: the same weights."""
        x, y = (torch.cat(parts, 1) for parts in zip(*self._rows))
        x, y = x + self.origin, y + self.aim
        mean, aim = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        if centred:
            x, y = x - mean, y - aim
        power = x.square().mean((1, 2))
        rest = y if start is None else y - x @ start
        weight = x.mT @ _regularised(x @ x.mT, self.count * ridge * power, rest)
        return weight if start is None else start + weight, mean, aim


def _sums(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x.mT @ x, x.mT @ y, x.sum(1, keepdim=True), y.sum(1, keepdim=True)


def _regularised(system: Tensor, weight: Tensor, right: Tensor) -> Tensor:
    """Solve a symmetric system with a weight `(groups,)` added to its diagonal."""
    extra = weight.clamp(min=1e-30)[:, None].expand(system.shape[:2])
    return torch.cholesky_solve(right, torch.linalg.cholesky(system + torch.diag_embed(extra)))


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
    """Return what each output of a map sees, `(groups, positions, in / groups * kernel)`.

    Args:
        x: What the map reads.
        affine: The map; of its weight only the shape counts.
    """
    if not affine.kernel:
        return x.reshape(-1, x.shape[-1])[None]
    n = len(affine.kernel)
    x = F.pad(x, [p for p in reversed(affine.padding) for _ in range(2)])
    for axis, (k, s, d) in enumerate(zip(affine.kernel, affine.stride, affine.dilation)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.movedim(1, 1 + n)  # samples, places, channels, kernel: a view, copied only below
    seen: Tensor = x.flatten(0, n).unflatten(1, (affine.groups, -1)).flatten(2).transpose(0, 1)
    return seen


def rows(y: Tensor, affine: Affine) -> Tensor:
    """Return the outputs of a map position by position, `(groups, positions, out / groups)`."""
    flat = y.movedim(1, -1) if affine.kernel else y
    return flat.reshape(
        -1, affine.groups, y.shape[1 if affine.kernel else -1] // affine.groups
    ).transpose(0, 1)
