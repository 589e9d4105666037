"""Ridge regression of a contraction's weights on data, and how strong the ridge has to be.

The regression fits a correction: what the weights at hand leave to explain. The ridge draws the
correction to zero, so that with little data the weights stay what they are. Its strength is the one
that does best on a held-out part of the samples.

A contraction is seen as rows: what it reads at each position, and what it gives there. A
convolution reads the patches of its kernel. Where positions are plentiful, a part of them is drawn,
one from each of as many equal stretches, so that all samples and places count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, DataError
from .affine import Affine

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


@dataclass(frozen=True, eq=False)
class Sample:
    """Positions of a contraction, numbered sample by sample within each batch.

    Attributes:
        at: Batch by batch, first those to fit on.
        fit: Batch by batch, how many these are; the others are held out.
        thin: If there is to be one equation for each position, not for each input, every
            how-manieth has one; otherwise 0.
    """

    at: list[Tensor]
    fit: list[int]
    thin: int = 0

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Put rows `(..., rows, units)` of all batches behind each other, those to fit on first."""
        pairs = list(zip(parts, self.fit))
        return torch.cat([p[..., :n, :] for p, n in pairs] + [p[..., n:, :] for p, n in pairs], -2)


def sample(places: int, sizes: Sequence[int], wanted: int, thin: int = 0) -> Sample:
    """Draw positions; every fourth sample is held out.

    Args:
        places: Positions of one sample.
        sizes: Samples of each batch.
        wanted: How many positions, about.
        thin: See `Sample`.
    """
    generator, seen, at, fit = torch.Generator().manual_seed(0), 0, [], []
    share = min(wanted / max(places * sum(sizes), 1), 1.0)
    for size in sizes:
        count = round(places * size * share)
        shifts = torch.rand(count, generator=generator, dtype=torch.float64)
        stretch = places * size / max(count, 1)
        drawn = ((torch.arange(count) + shifts * (share < 1)) * stretch + 1e-9).long()
        drawn = drawn.clamp(max=places * size - 1)
        held = (seen + drawn // max(places, 1)) % HELD == HELD - 1
        at.append(torch.cat([drawn[~held], drawn[held]]))
        fit.append(int((~held).sum()))
        seen += size
    return Sample(at, fit, thin)


def rows_at(value: Tensor, axis: int, at: Tensor) -> Tensor:
    """Return a copy `(positions, units)` of what a value holds at some positions.

    Args:
        value: Units along `axis`, samples and places along the others.
        axis: Which.
        at: Positions, numbered as the other axes lie.
    """
    moved = value.movedim(axis, -1)
    found: Tensor = moved[torch.unravel_index(at.to(value.device), moved.shape[:-1])]
    return found


def reads_at(x: Tensor, affine: Affine, at: Tensor) -> Tensor:
    """Return what a map reads at some positions, `(groups, positions, kernel * in / groups)`.

    Args:
        x: What it reads, as a whole.
        affine: The map; of its weight only the shape counts.
        at: Positions of what it gives.
    """
    n, at = len(affine.kernel), at.to(x.device)
    if not n:
        return rows_at(x, -1, at)[None]
    x = F.pad(x, [p for p in reversed(affine.padding) for _ in range(2)])
    sizes = x.shape[2:]
    geometry = zip(sizes, affine.kernel, affine.stride, affine.dilation)
    places = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in geometry]
    sample, *corner = torch.unravel_index(at, (len(x), *places))
    for size, axis, stride in zip(sizes, corner, affine.stride):
        sample = sample * size + axis * stride
    taps = torch.zeros(1, dtype=torch.long, device=x.device)
    for size, k, d in zip(sizes, affine.kernel, affine.dilation):
        taps = (taps[:, None] * size + torch.arange(k, device=x.device) * d).flatten()
    flat = x.movedim(1, -1).reshape(-1, x.shape[1])  # a unit beside the other: copied at a stroke
    seen: Tensor = flat.index_select(0, (sample[:, None] + taps).flatten())
    seen = (
        seen.view(len(at), len(taps), affine.groups, affine.weight.shape[1])
        .permute(2, 0, 1, 3)
        .flatten(2)
    )
    return seen


def weight_as_rows(weight: Tensor, affine: Affine) -> Tensor:
    """Return a weight as `(groups, kernel * in / groups, out / groups)`, to go with `reads_at`."""
    found: Tensor = weight.movedim(1, -1).unflatten(0, (affine.groups, -1)).flatten(2).mT
    return found


def rows_as_weight(rows: Tensor, affine: Affine) -> Tensor:
    """Return `(out, in / groups, *kernel)` from what `weight_as_rows` returns."""
    shape = affine.weight.shape
    return rows.mT.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def units_as_rows(units: Tensor, groups: int) -> Tensor:
    """Return `(positions, units)` as `(groups, positions, units / groups)`."""
    found: Tensor = units.unflatten(1, (groups, -1)).transpose(0, 1)
    return found
