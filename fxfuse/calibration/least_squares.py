"""Ridge regression of a contraction's weight on rows of what it reads and gives.

What is fitted corrects the weight. The ridge draws it to zero where there are few data; the one
that does best on samples held out is chosen. The primal form solves a system of the inputs'
products, the dual form, for fewer rows than inputs, one of the rows' products.

Of many units, ridges are tried on mixtures with random signs, which have their squares on average
(Hutchinson 1989), and in float32. The choice is compared with no correction on the units
themselves, and solved in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .._ranks import gathered, sums_up, total, total_of
from ..errors import ArgumentError, DataError, SolverError
from .affine import Affine
from .rows import in_groups, input_rows, output_rows, rows_as_weight, weight_as_rows

STRETCH = 4096  # rows whose products are summed in their own precision
BLOCK = 128  # columns of a symmetric product that are formed at a time
ROUNDING = 1e-6  # of a mean square: a variance no larger is that of rounded products
MIXTURES = 32  # of the units, on which ridges are tried where there are more than twice as many
ROUGH_FROM = 512  # equations of a system that is factorised in float32 while ridges are tried


def products(x: Tensor) -> Tensor:
    """Return `x.mT @ x` of `(groups, rows, inputs)`, of which only the lower half is computed."""
    inputs = x.shape[2]
    if inputs < 2 * BLOCK or len(x) > 1:
        return x.mT @ x
    product = x.new_empty(inputs, inputs)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        torch.mm(x[0, :, start:stop].T, x[0, :, :stop], out=product[start:stop, :stop])
        product[:start, start:stop] = product[start:stop, :start].T
    return product[None]


class _System:
    """A symmetric system, factorised with one ridge after the other.

    Args:
        matrix: `(groups, n, n)`, in float64.
        power: `(groups,)` what ridges are relative to, in each group.
    """

    def __init__(self, matrix: Tensor, power: Tensor) -> None:
        self.matrix = matrix
        self.power = power.clamp(min=max(1e-3 * float(power.mean()), 1e-30))  # some hardly vary
        self._factors: dict[tuple[float, torch.dtype], Tensor | None] = {}

    def factor(self, ridge: float, rough: bool = False) -> Tensor | None:
        """Return the Cholesky factor `(groups, n, n)`; see `InputSums.factor`."""
        if rough and self.matrix.shape[1] >= ROUGH_FROM:
            factor = self._factor(ridge, torch.float32)
            if factor is not None:
                return factor
        return self._factor(ridge, self.matrix.dtype)

    def _factor(self, ridge: float, dtype: torch.dtype) -> Tensor | None:
        if (ridge, dtype) not in self._factors:
            matrix = self.matrix.to(dtype, copy=True)
            matrix.diagonal(dim1=1, dim2=2).add_((ridge * self.power)[:, None].to(dtype))
            factor, failed = torch.linalg.cholesky_ex(matrix)
            self._factors[ridge, dtype] = None if bool(failed.any()) else factor
        return self._factors[ridge, dtype]


def _solved(factor: Tensor, right: Tensor) -> Tensor:
    """Return the solution for right sides in their own precision, from a Cholesky factor."""
    return torch.cholesky_solve(right.to(factor), factor).to(right)


def _vary(power: Tensor, squares: Tensor) -> bool:
    """Tell whether variances `(groups,)` are more than rounding, beside the mean squares."""
    return bool((power > ROUNDING * squares).any())


# --- primal: products of inputs -------------------------------------------------------------------


@dataclass(eq=False)
class InputSums:
    """What a regression sums over its inputs, in float64.

    Products are formed in the precision of the rows, some thousand rows at a time.

    Attributes:
        centred: Whether there is a bias, so that only deviations from the means count.
        count: Number of rows.
        xx: `(groups, inputs, inputs)` sums of products.
        x: `(groups, 1, inputs)` sums.
    """

    centred: bool
    count: int = 0
    xx: Tensor = torch.zeros(())
    x: Tensor = torch.zeros(())
    _system: _System | None = None

    def add(self, x: Tensor) -> None:
        """Add inputs `(groups, rows, inputs)`."""
        self._system = None
        for part in x.split(STRETCH, 1):
            self.count += part.shape[1]
            self.xx = self.xx + products(part).double()
            self.x = self.x + part.sum(1, keepdim=True).double()

    def summed(self) -> InputSums:
        """Return the sums over the inputs of all processes, inside `Calibration.summed`."""
        if not sums_up():
            return self
        xx, x = total(self.xx, self.x)
        return InputSums(self.centred, int(total_of(self.count)), xx, x)

    def __add__(self, other: InputSums) -> InputSums:
        """Return the sums over both sets of rows."""
        count, xx, x = self.count + other.count, self.xx + other.xx, self.x + other.x
        return InputSums(self.centred, count, xx, x)

    def factor(self, ridge: float, rough: bool = False) -> Tensor | None:
        """Return the Cholesky factor of the second moments with a ridge; None if singular.

        Args:
            ridge: Relative to the mean variance.
            rough: Float32 will do, if the system is large and not singular in that.
        """
        if self._system is None:
            xx = self.xx / self.count
            if self.centred:
                x = self.x / self.count
                xx.sub_(x.mT @ x)
            power = xx.diagonal(dim1=1, dim2=2).mean(1)
            self._system = _System(xx, power)
        return self._system.factor(ridge, rough)

    def constant(self) -> bool:
        """Tell whether the inputs are constant but for rounding."""
        squares = self.xx.diagonal(dim1=1, dim2=2) / self.count
        variances = squares
        if self.centred:
            variances = squares - (self.x[:, 0] / self.count).square()
        return not _vary(variances.mean(1), squares.mean(1))


@dataclass(eq=False)
class Sums:
    """What a regression sums over its inputs and residuals, in float64.

    Attributes:
        inputs: The sums over the inputs; they may be shared by regressions on other residuals.
        xr: `(groups, inputs, out)` sums of products.
        rr: `(groups, out)` sums of squares of the residuals.
        r: `(groups, 1, out)` sums of the residuals.
    """

    inputs: InputSums
    xr: Tensor = torch.zeros(())
    rr: Tensor = torch.zeros(())
    r: Tensor = torch.zeros(())

    def add(self, x: Tensor, r: Tensor) -> None:
        """Add the residuals `(groups, rows, out)` of inputs that `self.inputs` has already."""
        for a, b in zip(x.split(STRETCH, 1), r.split(STRETCH, 1)):
            self.xr = self.xr + (a.mT @ b).double()
            self.rr = self.rr + (b * b).sum(1).double()
            self.r = self.r + b.sum(1, keepdim=True).double()

    def summed(self, inputs: InputSums) -> Sums:
        """Return the sums of all processes, `inputs` those over what they read."""
        return Sums(inputs, *total(self.xr, self.rr, self.r)) if sums_up() else self

    def joined(self, other: Sums, inputs: InputSums) -> Sums:
        """Return the sums over both sets of rows; `inputs` has those over their inputs."""
        return Sums(inputs, self.xr + other.xr, self.rr + other.rr, self.r + other.r)

    def mixed(self, mixtures: Tensor | None) -> Sums:
        """Return the sums for mixtures `(out, mixtures)` of the units; no squares."""
        if mixtures is None:
            return self
        mixtures = mixtures.to(self.xr)
        return Sums(self.inputs, self.xr @ mixtures, r=self.r @ mixtures)

    def solve(self, ridge: float, rough: bool = False) -> Tensor | None:
        """Return the correction `(groups, inputs, out)`; None if the system is singular.

        Args:
            ridge: Relative to the mean variance of the inputs (mean square, without a bias).
            rough: See `InputSums.factor`.
        """
        count, x = self.inputs.count, self.inputs.x
        if self.inputs.constant():  # they explain nothing
            return torch.zeros_like(self.xr)
        factor, xr = self.inputs.factor(ridge, rough), self.xr / count
        if factor is None:
            return None
        if self.inputs.centred:
            xr = xr - (x / count).mT @ (self.r / count)
        return _solved(factor, xr)

    def squared(self, x: Tensor, r: Tensor, correction: Tensor | None) -> float:
        """Return the squared error on other rows of a correction fitted to these.

        Args:
            x: Their inputs `(groups, rows, inputs)`.
            r: Their residuals `(groups, rows, out)`.
            correction: `(groups, inputs, out)`; none if None.
        """
        bias = self.r / self.inputs.count if self.inputs.centred else torch.zeros_like(self.r)
        if correction is not None:
            if self.inputs.centred:
                bias = bias - self.inputs.x / self.inputs.count @ correction
            r = r - x @ correction.to(x)
        return float((r - bias.to(r)).double().square().sum())

    def error(self, fit: Sums, correction: Tensor | None) -> float:
        """Return the mean squared error on these rows of a correction fitted to others.

        Args:
            fit: What the correction was fitted to; the bias is fitted to it too.
            correction: `(groups, inputs, out)`; none if None.
        """
        centred, count = self.inputs.centred, self.inputs.count
        bias = fit.r / fit.inputs.count if centred else torch.zeros_like(self.r)
        total, linear = self.rr.sum(), self.r
        if correction is not None:
            if centred:
                bias = bias - fit.inputs.x / fit.inputs.count @ correction
            total = total - 2 * (correction * self.xr).sum()
            total = total + (correction * (self.inputs.xx @ correction)).sum()
            linear = linear - self.inputs.x @ correction
        total = total - 2 * (bias * linear).sum() + count * bias.square().sum()
        return max(float(total) / count, 0.0)


# --- dual: products of rows -----------------------------------------------------------------------


class _Dual:
    """Regressions on some rows, by the products of all rows with each other.

    Args:
        products: `(groups, rows, rows)` of the inputs, in float64.
        fit: `(rows,)` which rows to fit to.
        centred: Whether there is a bias.
        inputs: Number of inputs.
    """

    def __init__(self, products: Tensor, fit: Tensor, centred: bool, inputs: int) -> None:
        self.fit, self.centred = fit, centred
        squares = products.diagonal(dim1=1, dim2=2).mean(1)
        if centred:
            mean = products[:, :, fit].mean(2, keepdim=True)
            products = products - mean - mean.mT + mean[:, fit].mean(1, keepdim=True)
        columns = products[:, :, fit]
        matrix, self.across = columns[:, fit], columns[:, ~fit]
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        self.system = _System(matrix, diagonal.sum(1) / inputs)
        self.varies = _vary(diagonal.mean(1), squares)

    def centre(self, r: Tensor) -> Tensor:
        """Return residuals `(groups, rows, out)` about their means over the rows to fit to."""
        return r - r[:, self.fit].mean(1, keepdim=True) if self.centred else r

    def shares(self, r: Tensor, ridge: float, rough: bool = False) -> Tensor | None:
        """Return how much of each row is in the correction, `(groups, rows to fit to, out)`.

        Args:
            r: Centred residuals of all rows.
            ridge: Relative to the mean variance of the inputs.
            rough: See `InputSums.factor`.
        """
        if not self.varies:  # constant inputs explain nothing
            return torch.zeros_like(r[:, self.fit])
        factor = self.system.factor(ridge, rough)
        return None if factor is None else _solved(factor, r[:, self.fit])

    def error(self, r: Tensor, mixtures: Tensor | None, ridge: float) -> float:
        """Return the mean squared error on the other rows; with an infinite ridge, uncorrected."""
        r = self.centre(r if mixtures is None else r @ mixtures.to(r))
        left = r[:, ~self.fit]
        if ridge != math.inf:
            shares = self.shares(r, ridge, rough=True)
            if shares is None:
                return math.inf
            left = left - self.across @ shares
        return float(left.square().sum()) / max(left.shape[1], 1)


def solve_dual(
    x: Tensor, r: Tensor, ridge: float, centred: bool, system: _Dual | None = None
) -> Tensor | None:
    """Return the correction `(groups, inputs, out)`, None if the system is singular.

    Args:
        x: Inputs `(groups, rows, inputs)`.
        r: Residuals `(groups, rows, out)`.
        ridge: Relative to the mean variance of the inputs (mean square, without a bias).
        centred: Whether there is a bias.
        system: That of all rows, if it is known.
    """
    system = system or _dual_of(x, centred)
    shares = system.shares(system.centre(r.double()), ridge)
    if shares is None:
        return None
    x = x - x.mean(1, keepdim=True) if centred else x
    return x.mT @ shares.to(x)


def _dual_of(x: Tensor, centred: bool, known: Tensor | None = None) -> _Dual:
    """Return the system of all rows `(groups, rows, inputs)`; their products may be known."""
    every = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    known = products(x.mT).double() if known is None else known
    return _Dual(known, every, centred, x.shape[2])


# --- which ridge ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Correction:
    """A correction of a weight.

    Attributes:
        weight: `(groups, inputs, out)`, None if the weight stays.
        ridge: The ridge that was chosen; infinite if the weight stays.
        error: Mean squared error, summed over the units, on samples held out of the fit.
    """

    weight: Tensor | None
    ridge: float
    error: float


def best_ridge(error: Callable[[float], float], ridges: Sequence[float]) -> tuple[float, float]:
    """Return the least error that is found, and its ridge; infinite for no correction.

    With a stronger ridge the error falls, then rises. So it is followed downhill from the middle of
    the ridges, and the systems of the others are not solved. No correction is compared in any case.

    Args:
        error: Of a ridge, on rows held out; infinite where the system is singular.
        ridges: The ridges to choose from.
    """
    choices = sorted({*ridges, math.inf})
    known = {math.inf: error(math.inf)}
    at, best = -1, (len(choices) - 1) // 2
    while at != best:
        at = best
        near = range(max(at - 1, 0), min(at + 2, len(choices)))
        for ridge in (choices[i] for i in near):
            if ridge not in known:
                known[ridge] = error(ridge)
        best = min(near, key=lambda i: (known[choices[i]], -i))
    ridge = min((math.inf, choices[best]), key=lambda r: known[r])
    return known[ridge], ridge


def mixtures_of(units: int) -> Tensor | None:
    """Return mixtures `(units, mixtures)` with random signs; None where there are few units.

    The squares of what is mixed sum up to those of the units, on average.
    """
    if units <= 2 * MIXTURES:
        return None
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (units, MIXTURES), generator=generator)
    return (2.0 * signs - 1) / math.sqrt(MIXTURES)


def best_ridge_of_units(
    error: Callable[[Tensor | None, float], float], units: int, ridges: Sequence[float]
) -> tuple[float, float]:
    """Do what `best_ridge` does, on mixtures of the units where there are many.

    Args:
        error: Of mixtures (None for the units themselves) and a ridge, on rows held out.
        units: How many there are.
        ridges: The ridges to choose from.
    """
    mixtures = mixtures_of(units)
    least, ridge = best_ridge(partial(error, mixtures), ridges)
    if mixtures is None:
        return least, ridge
    exact = {choice: error(None, choice) for choice in (math.inf, ridge)}
    ridge = min(exact, key=exact.__getitem__)
    return exact[ridge], ridge


class Regression:
    """Corrections of one contraction's weight, again and again, from the same inputs.

    Args:
        x: Inputs `(groups, rows, inputs)`.
        fit: How many rows, the first ones, to fit to; on the others the ridge is chosen.
        centred: Whether there is a bias.
        dual_every: With 0, solve the primal form with all rows. With a number `n` above 0, solve
            the dual form with every `n`-th row only.
        order: Where the rows stand among those of all processes, see `Positions.order`.
    """

    def __init__(
        self, x: Tensor, fit: int, centred: bool, dual_every: int = 0, order: Tensor | None = None
    ) -> None:
        self.centred, self.dual_every, self.order = centred, dual_every, order
        self.x, self.parts = x, (slice(fit), slice(fit, None))
        if dual_every:
            self.x = self._of_all(x)[:, ::dual_every]
            held = torch.arange(x.shape[1], device=x.device) >= fit
            held = self._of_all(held[None])[0, ::dual_every]
            self.products = products(self.x.mT).double()
            self.fit = _Dual(self.products, ~held, centred, self.x.shape[2])
            self.every: _Dual | None = None  # of all rows
            return
        own = InputSums(centred), InputSums(centred)
        for sums, part in zip(own, self.parts):
            sums.add(x[:, part])
        self.inputs = own[0].summed(), own[1].summed()
        self.every_input = self.inputs[0] + self.inputs[1]

    def _of_all(self, rows: Tensor) -> Tensor:
        """Return the rows `(groups, rows, ...)` of all processes, in their order."""
        if not sums_up() or self.order is None:
            return rows
        order = torch.cat(gathered(self.order)).argsort().to(rows.device)
        return torch.cat(gathered(rows.transpose(0, 1)))[order].transpose(0, 1)

    def correct(self, residuals: Tensor, ridges: Sequence[float], least: float) -> Correction:
        """Return the correction that explains the residuals best.

        Args:
            residuals: `(groups, rows, out)`.
            ridges: The ridges to choose from; no correction at all is a choice, too.
            least: Residuals whose mean square, summed over the units, is no larger are not
                corrected.
        """
        power = total_of(float(residuals.double().square().sum()))
        power /= max(total_of(residuals.shape[1]), 1)
        if power <= least:
            return Correction(None, float("inf"), power)
        correct = self._correct_dual if self.dual_every else self._correct_primal
        return correct(residuals, ridges, power)

    def _correct_primal(self, r: Tensor, ridges: Sequence[float], power: float) -> Correction:
        own = [Sums(inputs) for inputs in self.inputs]
        for sums, part in zip(own, self.parts):
            sums.add(self.x[:, part], r[:, part])
        fit, held = (sums.summed(inputs) for sums, inputs in zip(own, self.inputs))
        if not fit.inputs.count or not held.inputs.count:
            return Correction(None, math.inf, power)
        x, left = (rows[:, self.parts[1]] for rows in (self.x, r))

        def error(mixtures: Tensor | None, ridge: float) -> float:
            some = fit.mixed(mixtures)
            correction = None if ridge == math.inf else some.solve(ridge, rough=True)
            if correction is None and ridge < math.inf:
                return math.inf
            wanted = left if mixtures is None else left @ mixtures.to(left)
            return total_of(some.squared(x, wanted, correction)) / held.inputs.count

        least, ridge = best_ridge_of_units(error, r.shape[2], ridges)
        every = fit.joined(held, self.every_input)
        return Correction(None if ridge == math.inf else every.solve(ridge), ridge, least)

    def _correct_dual(self, r: Tensor, ridges: Sequence[float], power: float) -> Correction:
        r = self._of_all(r)[:, :: self.dual_every]
        if not self.fit.fit.any() or self.fit.fit.all():
            return Correction(None, math.inf, power)
        least, ridge = best_ridge_of_units(partial(self.fit.error, r.double()), r.shape[2], ridges)
        if ridge == math.inf:
            return Correction(None, ridge, least)
        self.every = self.every or _dual_of(self.x, self.centred, self.products)
        return Correction(solve_dual(self.x, r, ridge, self.centred, self.every), ridge, least)


# --- a map from batches of what it reads and what it should give ----------------------------------


class AffineFit:
    """Fits the weight of an affine map to what its outputs should be, batch by batch.

    While there are fewer rows than inputs, the rows themselves are held, which take less memory
    than the products of the inputs.

    Args:
        affine: Its kernel, stride, padding, dilation and groups are those of the fitted map.
        prior: A map of the fitted one's shape, whose weight the ridge draws to; zero if not given.
        biased: Fit a bias too.
    """

    def __init__(self, affine: Affine, prior: Affine | None = None, biased: bool = True) -> None:
        self.affine, self.prior, self.biased = affine, prior, biased
        self.sums, self.count = Sums(InputSums(biased)), 0
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._centre: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add a batch: inputs and wanted outputs, laid out as the map reads and writes them."""
        axis = 1 if self.affine.kernel else -1
        x = input_rows(x.double(), self.affine)
        r = in_groups(output_rows(target.double(), axis), self.affine.groups)
        if self.prior is not None:
            r = r - x @ weight_as_rows(self.prior.weight.to(x), self.affine)
        if self._centre is None:  # sums of what is centred lose less to cancellation
            means = x.mean(1, keepdim=True), r.mean(1, keepdim=True)
            self._centre = means[0] * self.biased, means[1] * self.biased
        self.count += x.shape[1]
        self._rows.append((x - self._centre[0], r - self._centre[1]))
        if self.count >= x.shape[2]:
            for rows in self._rows:
                self.sums.inputs.add(rows[0])
                self.sums.add(*rows)
            self._rows = []

    def solve(self, ridge: float = 1e-3) -> Affine:
        """Return the map of least cost.

        The cost is the mean squared error plus `ridge` times the mean variance of the inputs (their
        mean square, without a bias) times the squared distance of the weight to the prior's.

        Args:
            ridge: How strongly the weight is drawn to the prior's; above 0.

        Raises:
            ArgumentError: If `ridge` is not above 0.
            DataError: If no batch was added, or values are not finite.
            SolverError: If the ridge is too small for inputs that depend on each other.
        """
        _require_ridge(ridge)
        tensors = [t for rows in self._rows for t in rows] or [self.sums.inputs.xx, self.sums.xr]
        _require_finite(tensors, self.count)
        if self._rows:
            x, r = (torch.cat(parts, 1) for parts in zip(*self._rows))
            correction = solve_dual(x, r, ridge, self.biased)
            means = x.mean(1, keepdim=True), r.mean(1, keepdim=True)
        else:
            correction = self.sums.solve(ridge)
            means = self.sums.inputs.x / self.count, self.sums.r / self.count
        assert self._centre is not None, "batches were added"
        if correction is None:
            raise SolverError(
                f"a regression on {self.count} rows that is singular at ridge {ridge:g}",
                where="least squares",
                expected="a ridge large enough for inputs that depend on each other",
                do="give a larger ridge",
            )
        x_mean, r_mean = (mean + centre for mean, centre in zip(means, self._centre))
        weight = rows_as_weight(correction, self.affine.kernel)
        if self.prior is not None:
            weight = weight + self.prior.weight.to(weight)
        bias = (r_mean - x_mean @ correction).flatten() if self.biased else None
        return replace(self.affine, weight=weight, bias=bias)


def _require_ridge(ridge: float) -> None:
    if not ridge > 0:
        raise ArgumentError(
            f"ridge {ridge}",
            where="the argument `ridge`",
            expected="a number above 0, relative to the mean variance of the inputs",
            do="leave it out, or give 1e-9 for a plain regression",
        )


def _require_finite(tensors: Sequence[Tensor], count: int) -> None:
    if not count or not all(bool(t.isfinite().all()) for t in tensors):
        raise DataError(
            f"{count} rows of which some are not finite" if count else "no rows",
            where="least squares",
            expected="finite values",
            do="check the data's normalisation and the network's weights",
        )
