"""RegMean: the weight that comes nearest to each network's own layer on its own inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.data import Calibration
from ..calibration.least_squares import STRETCH, products
from ..calibration.norms import fold_norms, foldable_norms
from ..calibration.rows import rows_as_weight, weight_as_rows
from ..coupling.mixing import Couplings
from ..errors import ArgumentError
from ..graph.state import tensor_at
from ..spaces.network import Network
from ._readings import readings
from .emit import NormPlan, WeightPlan
from .moments import Outcome, ResetNorms
from .sweep import LeastSquares

WIDEST = 1 << 13  # inputs of a unit, of which the products take half a gigabyte
DEAD = 1e-6  # ridge towards the mean, relative to the mean square of the inputs, for dead ones


@dataclass(frozen=True)
class RegMean(ResetNorms):
    """Mean of the weights in which each network counts as much as its inputs make it count.

    Each contraction gets the weight `W` of least `sum_k w_k |X_k W - X_k W_k|^2`, a closed form:
    `W = (sum_k w_k G_k)^-1 sum_k w_k G_k W_k` with `G_k = X_k' X_k`. Biases are averaged, norms
    measured anew. Contractions of more than 8,192 inputs, and weights that are used several times,
    keep the mean.

    Attributes:
        apart: What the entries of `G_k` off its diagonal are multiplied by, so that correlations of
            inputs that are due to chance count less.

    References:
        Jin et al. 2023, Dataless knowledge fusion by merging weights of language models, equation
        2, with its factor 0.9. Differences: all networks read the same calibration data; their
        units are matched before; convolutions are fitted on patches, with norms folded into them.
    """

    apart: float = 0.9

    def __post_init__(self) -> None:
        """Refuse a factor out of range."""
        if not 0 <= self.apart <= 1:
            raise ArgumentError(
                f"apart {self.apart}",
                where="RegMean(apart=...)",
                expected="a factor from 0 to 1",
                do="leave it out for 0.9",
            )

    def __call__(
        self,
        fused: Network,
        couplings: Couplings,
        plans: Sequence[NormPlan | WeightPlan],
        data: Calibration,
        samples: int,
    ) -> Outcome:
        """Solve every contraction, then settle the norms; see `Refit`."""
        folded = foldable_norms(couplings.problem.structure)
        states = [fold_norms(n, folded) for n in couplings.problem.networks]
        for reading in readings(fused, couplings, data, samples, LeastSquares().draw):
            producer = reading.producer
            if reading.read.shape[2] > WIDEST:
                continue
            own = couplings.apart(producer.weight, [s[producer.weight] for s in states])
            rows = [torch.as_tensor(w).double() for w in own]
            rows = [
                weight_as_rows(w.T if producer.transposed else w, producer.affine) for w in rows
            ]
            parts = zip(reading.shares, reading.inputs, rows)
            used = [(share, self.gram(x), w.to(x.device)) for share, x, w in parts if x is not None]
            solved = rows_as_weight(regression_mean(used), producer.affine.kernel)
            weight = tensor_at(fused.module, producer.weight)
            weight.data.copy_((solved.T if producer.transposed else solved).to(weight))
        return super().__call__(fused, couplings, plans, data, samples)

    def gram(self, x: Tensor) -> Tensor:
        """Return the mean products `(groups, inputs, inputs)` of inputs, those apart made smaller.

        Args:
            x: Inputs `(groups, positions, inputs)`.
        """
        total = sum(products(part).double() for part in x.split(STRETCH, 1))
        gram = torch.as_tensor(total) / x.shape[1]
        own = torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
        return self.apart * gram + (1 - self.apart) * own


def regression_mean(parts: Sequence[tuple[float, Tensor, Tensor]]) -> Tensor:
    """Return the weight `(groups, inputs, units)` nearest to all, each on its own inputs.

    Args:
        parts: Of each network: its share, the products of its inputs, and its weight.
    """
    total = sum(share for share, _, _ in parts)
    mean = torch.stack([share / total * w for share, _, w in parts]).sum(0)
    gram = torch.stack([share / total * g for share, g, _ in parts]).sum(0)
    right = torch.stack([share / total * (g @ (w - mean)) for share, g, w in parts]).sum(0)
    power = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    ridge = torch.diag_embed((DEAD * power)[:, None].expand(gram.shape[:2]))
    solved: Tensor = mean + torch.linalg.solve(gram + ridge, right)
    return solved
