"""How much to correct weights by least squares, as a held-out part of the samples tells.

What is fitted is the correction: what the weights at hand leave to explain. The ridge draws it to
zero, so that with little data they stay what they are; where they are right, nothing is corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HELD = 4  # every fourth sample chooses the ridge
STRETCH = 4096  # rows whose products are added up in their own precision
BLOCK = 128  # columns of a symmetric product that are formed at a time


class Sums:
    """The sums a regression needs, group by group, of rows that come in batches.

    Products are formed in the precision of the rows, batch by batch, and added up in float64.

    Args:
        centred: Whether there is a bias, so that only deviations from the means count.
    """

    def __init__(self, centred: bool) -> None:
        self.centred, self.count = centred, 0
        self.xx = self.xr = self.rr = self.x = self.r = torch.zeros(())
        self._factors: dict[float, Tensor | None] = {}  # of the inputs, by ridge

    def add(self, x: Tensor, r: Tensor) -> None:
        """Add inputs `(groups, rows, inputs)` and what is left to explain `(groups, rows, out)`."""
        self.add_inputs(x)
        self.add_rest(x, r)

    def add_inputs(self, x: Tensor) -> None:
        """Add inputs; what they leave to explain comes by `add_rest`."""
        self._factors = {}
        for part in x.split(STRETCH, 1) if x.shape[1] else ():
            self.count += part.shape[1]
            self._add(xx=products(part), x=part.sum(1, keepdim=True))

    def add_rest(self, x: Tensor, r: Tensor) -> None:
        """Add what inputs that were added leave to explain."""
        for a, b in zip(x.split(STRETCH, 1), r.split(STRETCH, 1)) if x.shape[1] else ():
            self._add(xr=a.mT @ b, rr=(b * b).sum(1), r=b.sum(1, keepdim=True))

    def _add(self, **parts: Tensor) -> None:
        for name, part in parts.items():
            setattr(self, name, getattr(self, name) + part.double())

    def of_inputs(self) -> Sums:
        """Return the sums of the inputs alone."""
        alone = Sums(self.centred)
        alone.count, alone.xx, alone.x = self.count, self.xx, self.x
        alone._factors = self._factors
        return alone

    def __add__(self, other: Sums) -> Sums:
        """Return the sums of both sets of rows."""
        both = Sums(self.centred)
        for name in ("count", "xx", "x"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        both.take_rests(self, other)
        return both

    def take_rests(self, one: Sums, other: Sums) -> None:
        """Take what two sets of rows leave to explain, whose inputs are already here."""
        for name in ("xr", "rr", "r"):
            setattr(self, name, getattr(one, name) + getattr(other, name))

    def solve(self, ridges: Sequence[float]) -> list[Tensor | None]:
        """Return the correction `(groups, inputs, out)` at each ridge, None where it has none.

        A ridge is relative to the mean variance of the inputs (mean square, without a bias).
        """
        xr = self.xr / self.count
        if self.centred:
            xr = xr - (self.x / self.count).mT @ (self.r / self.count)
        factors = [self._factor(ridge) for ridge in ridges]
        return [None if f is None else torch.cholesky_solve(xr, f) for f in factors]

    def _factor(self, ridge: float) -> Tensor | None:
        """Return the Cholesky factor of the inputs' second moments with a ridge, if it has one."""
        if ridge not in self._factors:
            xx = self.xx / self.count
            if self.centred:
                x = self.x / self.count
                xx = xx - x.mT @ x
            power = xx.diagonal(dim1=1, dim2=2).mean(1)
            power = power.clamp(min=max(1e-3 * float(power.mean()), 1e-30))  # some hardly vary
            added = (ridge * power)[:, None].expand(xx.shape[:2])
            factor, failed = torch.linalg.cholesky_ex(xx + torch.diag_embed(added))
            self._factors[ridge] = None if bool(failed.any()) else factor
        return self._factors[ridge]

    def error(self, other: Sums, correction: Tensor | None) -> float:
        """Return the mean squared error on these rows of a correction fitted to others.

        Args:
            other: What the correction was fitted to; the bias is fitted to it too.
            correction: `(groups, inputs, out)`; none if None.
        """
        bias = other.r / other.count if self.centred else torch.zeros_like(self.r)
        total, linear = self.rr.sum(), self.r
        if correction is not None:
            if self.centred:
                bias = bias - other.x / other.count @ correction
            total = total - 2 * (correction * self.xr).sum()
            total = total + (correction * (self.xx @ correction)).sum()
            linear = linear - self.x @ correction
        total = total - 2 * (bias * linear).sum() + self.count * bias.square().sum()
        return max(float(total) / self.count, 0.0)


def products(x: Tensor) -> Tensor:
    """Return `x.mT @ x`, of which only the lower half is computed."""
    inputs = x.shape[2]
    if inputs < 2 * BLOCK or len(x) > 1:
        return x.mT @ x
    found = x.new_empty(inputs, inputs)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        torch.mm(x[0, :, start:stop].T, x[0, :, :stop], out=found[start:stop, :stop])
        found[:start, start:stop] = found[start:stop, :start].T
    return found[None]


@dataclass(frozen=True, eq=False)
class Correction:
    """A correction of weights.

    Attributes:
        weight: `(groups, inputs, out)`, None if the weights stay.
        ridge: The ridge that was chosen; infinite if the weights stay.
        error: Mean squared error, summed over the units, on samples held out of the fit.
    """

    weight: Tensor | None
    ridge: float
    error: float


def corrected(
    fit: Sums, held: Sums, ridges: Sequence[float], everything: Sums | None = None
) -> Correction:
    """Choose the ridge by the held-out error and fit with it to everything.

    Args:
        fit: Sums over the samples to fit to.
        held: Sums over the others; if there are none, the weights stay.
        ridges: The ridges to choose from, beside the infinite one.
        everything: Sums over both, if they are known.
    """
    everything = fit + held if everything is None else everything
    if not fit.count or not held.count:
        return Correction(None, float("inf"), everything.error(everything, None))
    tried = [(held.error(fit, None), float("inf"))]
    for ridge, weight in zip(ridges, fit.solve(ridges)):
        if weight is not None:
            tried.append((held.error(fit, weight), ridge))
    error, ridge = min(tried)
    if ridge == float("inf"):
        return Correction(None, ridge, error)
    return Correction(everything.solve([ridge])[0], ridge, error)


def corrected_from_rows(
    x: Tensor,
    r: Tensor,
    held: Tensor,
    centred: bool,
    ridges: Sequence[float],
    products: Tensor | None = None,
) -> Correction:
    """As `corrected`, from the rows themselves: for more inputs than there are rows.

    Args:
        x: Inputs `(groups, rows, inputs)`.
        r: What is left to explain `(groups, rows, out)`.
        held: `(rows,)` which rows are held out of the first fits.
        centred: Whether there is a bias.
        ridges: The ridges to choose from, beside the infinite one.
        products: `(groups, rows, rows)` of the inputs, if they are known.
    """
    products = (x @ x.mT).double() if products is None else products
    r, inputs = r.double(), x.shape[2]
    tried = [(float(r.square().sum()) / max(len(held), 1), float("inf"))]
    if held.any() and not held.all():
        fit = _Rows(products, r, ~held, centred, inputs)
        tried = [(fit.error(held, ridge), ridge) for ridge in (*ridges, float("inf"))]
    error, ridge = min(tried)
    if ridge == float("inf"):
        return Correction(None, ridge, error)
    factors = _Rows(products, r, torch.ones_like(held), centred, inputs).factors(ridge)
    x = x - x.mean(1, keepdim=True) if centred else x
    return Correction(x.mT @ factors.to(x), ridge, error)


class _Rows:
    """A regression on some rows, in terms of the products of all rows with each other."""

    def __init__(
        self, products: Tensor, r: Tensor, fit: Tensor, centred: bool, inputs: int
    ) -> None:
        self.products, self.r, self.fit, self.inputs = products, r, fit, inputs
        if centred:
            mean = products[:, :, fit].mean(2, keepdim=True)
            self.products = products - mean - mean.mT + mean[:, fit].mean(1, keepdim=True)
            self.r = r - r[:, fit].mean(1, keepdim=True)

    def factors(self, ridge: float) -> Tensor:
        """Return how much of each row `(groups, rows of the fit, out)` is in the correction."""
        own = self.products[:, self.fit][:, :, self.fit]
        power = own.diagonal(dim1=1, dim2=2).sum(1) / self.inputs
        power = power.clamp(min=max(1e-3 * float(power.mean()), 1e-30))
        added = (ridge * power)[:, None].expand(own.shape[:2])
        factor = torch.linalg.cholesky(own + torch.diag_embed(added))
        return torch.cholesky_solve(self.r[:, self.fit], factor)

    def error(self, rows: Tensor, ridge: float) -> float:
        """Return the mean squared error on other rows; of no correction at an infinite ridge."""
        left = self.r[:, rows]
        if ridge != float("inf"):
            left = left - self.products[:, rows][:, :, self.fit] @ self.factors(ridge)
        return float(left.square().sum()) / int(rows.sum())


class Regression:
    """Corrections of one contraction's weight, again and again, from the same inputs.

    Args:
        x: Inputs `(groups, rows, inputs)`.
        fit: How many of the rows, the first ones, the ridge's choice is fitted to.
        centred: Whether there is a bias.
        thin: If above 0, solve with one equation for each of every so many rows; otherwise with
            one for each input.
    """

    def __init__(self, x: Tensor, fit: int, centred: bool, thin: int = 0) -> None:
        self.centred, self.thin, self.parts = centred, thin, (slice(fit), slice(fit, None))
        self.products: Tensor | None = None
        if thin:
            self.x = x[:, ::thin]
            self.held = (torch.arange(x.shape[1]) >= fit)[::thin]
            self.products = (self.x @ self.x.mT).double()
            return
        self.x, self.sums = x, [Sums(centred), Sums(centred)]
        for sums, part in zip(self.sums, self.parts):
            sums.add_inputs(x[:, part])
        self.sums.append(self.sums[0] + self.sums[1])

    def correct(self, rest: Tensor, ridges: Sequence[float], least: float) -> Correction:
        """Return the correction that explains best what is left.

        Args:
            rest: What is left to explain, `(groups, rows, out)`.
            ridges: The ridges to choose from, beside the infinite one.
            least: Mean square, summed over the units, that is not worth correcting.
        """
        power = float(rest.double().square().sum()) / max(rest.shape[1], 1)
        if power <= least:
            return Correction(None, float("inf"), power)
        if self.products is not None:
            rest = rest[:, :: self.thin]
            return corrected_from_rows(self.x, rest, self.held, self.centred, ridges, self.products)
        fit, held, both = (sums.of_inputs() for sums in self.sums)
        for sums, part in zip((fit, held), self.parts):
            sums.add_rest(self.x[:, part], rest[:, part])
        both.take_rests(fit, held)
        return corrected(fit, held, ridges, both)
