"""Layer costs: how unlike two layers of different networks are.

A layer cost is called with the layers of two networks. It returns their costs `(rows, columns)` at
once, or a `Meter`: this is shown the layers' pre-activations batch by batch, or their weights, and
gives the costs at the end. What meters keep does not grow with the number of samples.

References:
    Nguyen et al. 2021 (CLAFusion), sections 2.1, 3.1 and table 9: number of neurons with squared
    difference, pre-activations with linear CKA or Wasserstein distance, weight matrices.
    Kornblith et al. 2019, linear CKA; Song et al. 2012 and Nguyen et al. 2020, its unbiased
    estimate from batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ranks import total
from ..calibration.least_squares import products
from ..calibration.moments import Moments, PairMoments, euclidean
from ..errors import DataError
from ..ir import Layer
from ..solvers import Exact, Solver


class Meter:
    """Measures the costs of the layers of two networks; derive from it for a cost of your own.

    All meters that one layer cost returns must have the same attributes and the same `reduce`.

    Attributes:
        of_weights: Whether it is shown the weights of the layers, once, and no data.
        batch: Samples of one batch, if its size matters; None if samples count one by one.
        samples: Number of samples after which it needs no more; None for all.
        adds_up: Whether several processes may show it different batches, which `summed` adds up;
            if not, each process shows it all.
    """

    of_weights: bool = False
    batch: int | None = None
    samples: int | None = None
    adds_up: bool = False

    @property
    def quick(self) -> bool:
        """Whether it needs no more than some samples, so that it can show what decides nothing."""
        return self.of_weights or self.samples is not None

    def reduce(self, x: Any) -> Any:
        """Return what `add` needs of one layer.

        It is called once per layer and batch, and what it returns is handed to all meters.

        Args:
            x: Pre-activations `(samples, units, ...)` of a batch. With `of_weights`, a list of the
                weights that the layer contracts, norms folded in, as arrays.
        """
        return x

    def add(self, rows: Sequence[Any], columns: Sequence[Any]) -> None:
        """Add one batch, or the weights: what `reduce` returned for each layer of both networks."""
        raise NotImplementedError

    def summed(self) -> None:
        """Add what the meters of the other processes have seen, if it adds up."""

    def costs(self) -> np.ndarray:
        """Return the costs `(rows, columns)`."""
        raise NotImplementedError


LayerCost = Callable[[Sequence[Layer], Sequence[Layer]], Meter | np.ndarray]


# --- from the layers alone ------------------------------------------------------------------------


def neuron_counts(rows: Sequence[Layer], columns: Sequence[Layer]) -> np.ndarray:
    """Squared difference of the numbers of units."""
    a, b = (np.array([x.width for x in layers], dtype=float) for layers in (rows, columns))
    costs: np.ndarray = np.subtract.outer(a, b) ** 2
    return costs


@dataclass(frozen=True)
class WeightDistributions:
    """Wasserstein distance between the distributions of the layers' single weights.

    In one dimension it is the mean distance of quantiles. It depends on neither the order nor the
    number of units. Norms behind the layers are folded into the weights first, so that the weights
    of different layers have a common scale.

    Attributes:
        levels: Number of quantiles that are compared.
    """

    levels: int = 1000

    def __call__(self, rows: Sequence[Layer], columns: Sequence[Layer]) -> Meter:
        """Return what compares the layers of two networks."""
        return _Quantiles(self.levels)


#: The default: by a thousand quantiles.
weight_distributions = WeightDistributions()


class _Quantiles(Meter):
    """Quantiles of the weights of every layer."""

    of_weights = True

    def __init__(self, levels: int) -> None:
        self.shares = (np.arange(levels) + 0.5) / levels

    def reduce(self, x: list[np.ndarray]) -> np.ndarray:
        """Return the quantiles of all weights together."""
        weights = np.sort(np.concatenate([w.ravel() for w in x]).astype(np.float32))
        count = len(weights)
        at = self.shares * count - 0.5
        quantiles: np.ndarray = np.interp(at, np.arange(count), weights.astype(float))
        return quantiles

    def add(self, rows: Sequence[np.ndarray], columns: Sequence[np.ndarray]) -> None:
        self.rows, self.columns = rows, columns

    def costs(self) -> np.ndarray:
        return np.array([[np.abs(a - b).mean() for b in self.columns] for a in self.rows])


# --- linear CKA -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearCKA:
    """One minus linear centred kernel alignment of pre-activations, all positions features.

    Each batch adds its Hilbert-Schmidt inner products; the ratio is taken at the end.

    Attributes:
        unbiased: Estimate these products without bias (HSIC_1), so that they do not depend on the
            size of batches; otherwise one batch gives the biased estimate of the paper's code.
        batch: Samples compared at a time; fewer where memory is short.
        samples: How many of the first samples are used, in whole batches.
    """

    unbiased: bool = False
    batch: int = 256
    samples: int = 256

    def __call__(self, rows: Sequence[Layer], columns: Sequence[Layer]) -> Meter:
        """Return what compares the layers of two networks."""
        return _Kernels(len(rows), len(columns), self)


#: The default: of one batch of up to 256 samples.
linear_cka = LinearCKA()


def gram(x: Tensor) -> Tensor:
    """Return the centred Gram matrix `(n, n)` of `n` samples, every other axis a feature."""
    flat = x.flatten(1).float()
    flat = flat - flat.mean(0)
    return products(flat.T[None])[0].double()


def unbiased_gram(x: Tensor) -> Tensor:
    """Return a Gram matrix `(n, n)` whose inner products are HSIC_1, the unbiased estimate.

    Rows of its off-diagonal sum to zero (U-centring, Szekely and Rizzo 2014). Fewer than four
    samples have no such estimate; they give zeros, which add nothing.
    """
    g, n = gram(x), len(x)
    if n < 4:
        return torch.zeros_like(g)
    g.fill_diagonal_(0.0)
    sums = g.sum(0) / (n - 2)
    g = g - sums[:, None] - sums[None] + sums.sum() / (n - 1)
    g.fill_diagonal_(0.0)
    return g / math.sqrt(n * (n - 3))


class _Kernels(Meter):
    """Inner products of the Gram matrices of every layer of one network and of another."""

    adds_up = True

    def __init__(self, rows: int, columns: int, cost: LinearCKA) -> None:
        self.cross = np.zeros((rows, columns))
        self.squares = np.zeros(rows), np.zeros(columns)
        self.largest, self.least = 0, 4 if cost.unbiased else 1  # samples of one batch
        self.batch = cost.batch
        self.samples = cost.samples
        self.gram = unbiased_gram if cost.unbiased else gram

    def reduce(self, x: Tensor) -> Tensor:
        """Return the Gram matrix `(n, n)` of samples."""
        return self.gram(x)

    def add(self, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
        left = torch.stack([g.flatten() for g in rows])
        right = torch.stack([g.flatten() for g in columns])
        self.cross += (left @ right.T).cpu().numpy()
        for squares, grams in zip(self.squares, (left, right)):
            squares += grams.square().sum(1).cpu().numpy()
        self.largest = max(self.largest, len(rows[0]))

    def summed(self) -> None:
        sums = (self.cross, *self.squares, self.largest)
        cross, left, right, largest = total(*(torch.as_tensor(s) for s in sums))
        self.cross, self.squares = cross.numpy(), (left.numpy(), right.numpy())
        self.largest = int(largest)  # of one process at least

    def costs(self) -> np.ndarray:
        """Return one minus CKA; a layer that never varies is unlike everything."""
        if self.largest < self.least:
            raise DataError(
                f"batches of at most {self.largest} samples",
                where="the layer cost LinearCKA(unbiased=True)",
                expected="at least four samples to compare at a time",
                do="give more samples, or a larger LinearCKA(batch=...)",
            )
        scale = np.sqrt(np.outer(*self.squares))
        return 1.0 - np.divide(self.cross, scale, out=np.zeros_like(scale), where=scale > 0)


# --- Wasserstein distance -------------------------------------------------------------------------


@dataclass(frozen=True)
class Wasserstein:
    """Wasserstein distance between two layers, each a cloud of units of the same mass.

    A unit is the vector of its pre-activations over samples and positions. The distance of two
    units is Euclidean, divided by the root of the number of samples, as in the paper's code. Units
    are compared through streamed moments, which take memory for the product of the widths of each
    pair of layers.

    Attributes:
        solver: Solves the transport problem of each pair of layers.
    """

    solver: Solver = Exact()

    def __call__(self, rows: Sequence[Layer], columns: Sequence[Layer]) -> Meter:
        """Return what compares the layers of two networks."""
        return _Clouds(rows, columns, self.solver)


class _Clouds(Meter):
    """Moments of the units of every layer, and cross moments of layers that can pair."""

    def __init__(self, rows: Sequence[Layer], columns: Sequence[Layer], solver: Solver) -> None:
        self.solver, self.positions = solver, 1
        self.moments = [Moments() for _ in rows], [Moments() for _ in columns]
        a, b = self.moments
        self.shape = len(rows), len(columns)
        self.pairs = {(i, j): PairMoments(a[i], b[j]) for i, j in _of_one_kind(rows, columns)}

    def reduce(self, x: Tensor) -> Tensor:
        """Return values `(units, samples, positions)`."""
        return x.movedim(1, 0).reshape(x.shape[1], x.shape[0], -1)

    def add(self, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
        self.positions = rows[0].shape[2]
        a, b = ([m.add(x) for m, x in zip(*both)] for both in zip(self.moments, (rows, columns)))
        for (i, j), pair in self.pairs.items():
            pair.add_shifted(a[i], b[j])

    def costs(self) -> np.ndarray:
        costs = np.full(self.shape, np.inf)
        for at, pair in self.pairs.items():
            # moments are means over samples and positions; the distance is a mean over samples only
            ground = euclidean([pair]) * np.sqrt(self.positions)
            masses = (np.full(size, 1.0 / size) for size in ground.shape)
            costs[at] = (self.solver(ground, *masses) * ground).sum()
        return costs


# --- any function of two layers' pre-activations --------------------------------------------------


@dataclass(frozen=True)
class OfActivations:
    """A layer cost from a plain function of the pre-activations of two layers.

    Attributes:
        function: From the pre-activations `(samples, units, ...)` of two layers, on the same
            samples, to how unlike the layers are.
        samples: How many of the first samples are collected for it, and held.

    Example:
        >>> spread = OfActivations(lambda x, y: abs(x.std() - y.std()), samples=100)
    """

    function: Callable[[Tensor, Tensor], float]
    samples: int = 200

    def __call__(self, rows: Sequence[Layer], columns: Sequence[Layer]) -> Meter:
        """Return what compares the layers of two networks."""
        return _Collected(rows, columns, self)


class _Collected(Meter):
    """The first samples of every layer."""

    def __init__(
        self, rows: Sequence[Layer], columns: Sequence[Layer], cost: OfActivations
    ) -> None:
        self.function, self.samples = cost.function, cost.samples
        self.pairs, self.shape = _of_one_kind(rows, columns), (len(rows), len(columns))
        self.batches: list[tuple[Sequence[Tensor], Sequence[Tensor]]] = []

    def add(self, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
        self.batches.append((rows, columns))

    def costs(self) -> np.ndarray:
        rows, columns = (
            [torch.cat(parts)[: self.samples] for parts in zip(*side)]
            for side in zip(*self.batches)
        )
        costs = np.full(self.shape, np.inf)
        for i, j in self.pairs:
            costs[i, j] = float(self.function(rows[i], columns[j]))
        return costs


def _of_one_kind(rows: Sequence[Layer], columns: Sequence[Layer]) -> list[tuple[int, int]]:
    """Return the rows and columns whose layers are of one kind; only these can pair."""
    pairs = ((i, j, a, b) for i, a in enumerate(rows) for j, b in enumerate(columns))
    return [(i, j) for i, j, a, b in pairs if a.kind == b.kind]
