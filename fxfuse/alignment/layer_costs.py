"""Layer costs: how unlike two layers of different networks are.

A layer cost is called with the layers of two networks (`LayerView`). It returns their costs
`(rows, columns)` at once, or a `Meter`, which is shown the layers' pre-activations batch by batch
before it is asked. What meters keep does not grow with the number of samples.

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

from ..calibration.least_squares import products
from ..calibration.moments import Moments, PairMoments, euclidean
from ..errors import DataError
from ..solvers import Exact, Solver


@dataclass(frozen=True, eq=False)
class LayerView:
    """What a layer cost is told of a layer.

    Attributes:
        name: Its qualified name.
        kind: What it is made of; layers of different kinds never pair, whatever their cost.
        width: Number of its units.
        weights: Returns the weights that it contracts, norms folded in, as they are stored.
    """

    name: str
    kind: str
    width: int
    weights: Callable[[], list[np.ndarray]]


class Meter:
    """What measures the layers of two networks; a base class with the usual answers.

    All meters of one layer cost have the same attributes and the same `reduce`.

    Attributes:
        together: Samples of one batch, if its size matters; None if samples count one by one.
        wanted: Number of samples after which it has seen enough, None for all.
    """

    together: int | None = None
    wanted: int | None = None

    def reduce(self, x: Tensor) -> Any:
        """Return what `add` is to get of a layer's pre-activations `(samples, units, ...)`.

        It is called once per layer and batch and shared between all meters of one layer cost.
        """
        return x

    def add(self, rows: Sequence[Any], columns: Sequence[Any]) -> None:
        """Add one batch: what `reduce` returned, of each layer of the two networks."""
        raise NotImplementedError

    def costs(self) -> np.ndarray:
        """Return the costs `(rows, columns)`."""
        raise NotImplementedError


Views = Sequence[LayerView]


LayerCost = Callable[[Views, Views], "Meter | np.ndarray"]


# --- from the layers alone ------------------------------------------------------------------------


def neuron_counts(rows: Views, columns: Views) -> np.ndarray:
    """Squared difference of the numbers of units."""
    a, b = (np.array([x.width for x in layers], dtype=float) for layers in (rows, columns))
    found: np.ndarray = np.subtract.outer(a, b) ** 2
    return found


def weight_distributions(rows: Views, columns: Views, levels: int = 1000) -> np.ndarray:
    """Wasserstein distance between the distributions of the layers' single weights.

    In one dimension it is the mean distance of quantiles, here of `levels` of them. It depends on
    neither the order nor the number of units; norms behind the layers are folded into the weights
    first, so that their scale means something.
    """
    at = (np.arange(levels) + 0.5) / levels
    a, b = ([_quantiles(x, at) for x in layers] for layers in (rows, columns))
    return np.array([[np.abs(x - y).mean() for y in b] for x in a])


def _quantiles(layer: LayerView, at: np.ndarray) -> np.ndarray:
    single = np.sort(np.concatenate([w.ravel() for w in layer.weights()]).astype(np.float32))
    places = np.arange(len(single))
    found: np.ndarray = np.interp(at * len(single) - 0.5, places, single.astype(float))
    return found


# --- linear CKA -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearCKA:
    """One minus linear centred kernel alignment of pre-activations, all positions features.

    Each batch adds its Hilbert-Schmidt inner products; the ratio is taken at the end.

    Attributes:
        unbiased: Estimate these products without bias (HSIC_1), so that they do not depend on the
            size of batches; otherwise one batch gives the biased estimate of the paper's code.
        batch: Samples compared at a time; less where memory is short.
        samples: How many of the first samples are looked at, in whole batches.
    """

    unbiased: bool = False
    batch: int = 256
    samples: int = 256

    def __call__(self, rows: Views, columns: Views) -> Meter:
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

    Rows of its off-diagonal sum to zero (U-centring, Szekely and Rizzo 2014); fewer than four
    samples have no such estimate and count for nothing.
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

    def __init__(self, rows: int, columns: int, cost: LinearCKA) -> None:
        self.cross = np.zeros((rows, columns))
        self.own = np.zeros(rows), np.zeros(columns)
        self.largest, self.least = 0, 4 if cost.unbiased else 1
        self.together = cost.batch
        self.wanted = cost.samples
        self.gram = unbiased_gram if cost.unbiased else gram

    def reduce(self, x: Tensor) -> Tensor:
        """Return the Gram matrix `(n, n)` of samples."""
        return self.gram(x)

    def add(self, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
        left = torch.stack([g.flatten() for g in rows])
        right = torch.stack([g.flatten() for g in columns])
        self.cross += (left @ right.T).cpu().numpy()
        for own, grams in zip(self.own, (left, right)):
            own += grams.square().sum(1).cpu().numpy()
        self.largest = max(self.largest, len(rows[0]))

    def costs(self) -> np.ndarray:
        """Return one minus CKA; a layer that never varies is unlike everything."""
        if self.largest < self.least:
            raise DataError(
                f"batches of at most {self.largest} samples",
                where="the layer cost LinearCKA(unbiased=True)",
                expected="at least four samples to compare at a time",
                do="give more samples, or a larger LinearCKA(batch=...)",
            )
        scale = np.sqrt(np.outer(*self.own))
        return 1.0 - np.divide(self.cross, scale, out=np.zeros_like(scale), where=scale > 0)


# --- Wasserstein distance -------------------------------------------------------------------------


@dataclass(frozen=True)
class Wasserstein:
    """Wasserstein distance between two layers, each a cloud of units of the same mass.

    A unit is the vector of its pre-activations over samples and positions; the distance of two is
    Euclidean, divided by the root of the number of samples, as in the scripts of the paper's code.
    Units are compared through streamed moments: memory for the product of widths, per pair.

    Attributes:
        solver: Solves the transport problem of each pair of layers.
    """

    solver: Solver = Exact()

    def __call__(self, rows: Views, columns: Views) -> Meter:
        """Return what compares the layers of two networks."""
        return _Clouds(rows, columns, self.solver)


class _Clouds(Meter):
    """Moments of the units of every layer, and cross moments of layers that can pair."""

    def __init__(self, rows: Views, columns: Views, solver: Solver) -> None:
        self.solver, self.positions = solver, 1
        self.moments = [Moments() for _ in rows], [Moments() for _ in columns]
        a, b = self.moments
        self.shape, self.pairs = (len(rows), len(columns)), {}
        for i, j in _comparable(rows, columns):
            self.pairs[i, j] = PairMoments(a[i], b[j])

    def reduce(self, x: Tensor) -> Tensor:
        """Return values `(units, samples, positions)`."""
        return x.movedim(1, 0).reshape(x.shape[1], x.shape[0], -1)

    def add(self, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
        self.positions = rows[0].shape[2]
        a, b = ([m.add(x) for m, x in zip(*both)] for both in zip(self.moments, (rows, columns)))
        for (i, j), pair in self.pairs.items():
            pair.add_shifted(a[i], b[j])

    def costs(self) -> np.ndarray:
        found = np.full(self.shape, np.inf)
        for at, pair in self.pairs.items():
            # moments are means over samples and positions, of which only samples are to count
            ground = euclidean([pair]) * np.sqrt(self.positions)
            mass = (np.full(size, 1.0 / size) for size in ground.shape)
            found[at] = (self.solver(ground, *mass) * ground).sum()
        return found


# --- any function of two layers' pre-activations --------------------------------------------------


@dataclass(frozen=True)
class OfActivations:
    """A layer cost from a plain function of the pre-activations of two layers.

    Attributes:
        function: From pre-activations `(samples, units, ...)` of a row's and a column's layer, the
            same samples in both, to how unlike the layers are.
        samples: How many of the first samples are collected, and held, for it.

    Example:
        >>> spread = OfActivations(lambda x, y: abs(x.std() - y.std()), samples=100)
    """

    function: Callable[[Tensor, Tensor], float]
    samples: int = 200

    def __call__(self, rows: Views, columns: Views) -> Meter:
        """Return what compares the layers of two networks."""
        return _Collected(rows, columns, self)


class _Collected(Meter):
    """The first samples of every layer."""

    def __init__(self, rows: Views, columns: Views, cost: OfActivations) -> None:
        self.function, self.wanted = cost.function, cost.samples
        self.pairs, self.shape = _comparable(rows, columns), (len(rows), len(columns))
        self.batches: list[tuple[Sequence[Tensor], Sequence[Tensor]]] = []

    def add(self, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
        self.batches.append((rows, columns))

    def costs(self) -> np.ndarray:
        rows, columns = (
            [torch.cat(parts)[: self.wanted] for parts in zip(*side)] for side in zip(*self.batches)
        )
        found = np.full(self.shape, np.inf)
        for i, j in self.pairs:
            found[i, j] = float(self.function(rows[i], columns[j]))
        return found


def _comparable(rows: Views, columns: Views) -> list[tuple[int, int]]:
    kinds = [[x.kind for x in layers] for layers in (rows, columns)]
    return [(i, j) for i, a in enumerate(kinds[0]) for j, b in enumerate(kinds[1]) if a == b]
