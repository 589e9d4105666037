"""PLeaS: fit each layer by itself, from the networks' mean input to their mean output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..calibration.data import Calibration
from ..calibration.least_squares import Correction, Regression
from ..calibration.rows import in_groups, rows_as_weight, weight_as_rows
from ..coupling.mixing import Couplings
from ..graph.state import tensor_at
from ..ir import LayerFit
from ..spaces.network import Network
from ._readings import Reading, readings
from .emit import NormPlan, WeightPlan
from .moments import Outcome, ResetNorms
from .sweep import LeastSquares


@dataclass(frozen=True)
class LayerwiseLeastSquares(ResetNorms):
    """Fit every contraction by itself, on the mean of the networks' matched features.

    Inputs are the means of what the networks' layers read, targets the means of what they give, so
    no layer sees what those before it lost; `LeastSquares` fits to what the fused network feeds.
    Biases are fitted, too; norms are measured anew.

    Attributes:
        ridges: As in `LeastSquares`.

    References:
        Nasery et al. 2025 (PLeaS), step 2. Differences: a closed form with a ridge in place of
        steps of gradient descent; weights between units that only different networks have may
        become other than zero.
    """

    fits: ClassVar[bool] = True
    ridges: tuple[float, ...] = LeastSquares.ridges

    def __call__(
        self,
        fused: Network,
        couplings: Couplings,
        plans: Sequence[NormPlan | WeightPlan],
        data: Calibration,
        samples: int,
    ) -> Outcome:
        """Fit every contraction, then settle the norms; see `Refit`."""
        layers = []
        for reading in readings(fused, couplings, data, samples, LeastSquares().draw):
            correction, power = self._fit(fused, reading)
            if power > 0:
                explained = 1 - correction.error / power
                layers.append(LayerFit(reading.producer.node, explained, correction.ridge))
        super().__call__(fused, couplings, plans, data, samples)
        return Outcome(tuple(layers))

    def _fit(self, fused: Network, reading: Reading) -> tuple[Correction, float]:
        """Fit one contraction; return the correction, and the mean square of what was wanted."""
        producer, sample = reading.producer, reading.sample
        x, wanted = reading.mean_input, reading.mean_output
        centre = x.mean(1, keepdim=True) * producer.biased
        aim = wanted.mean(0) * producer.biased
        weight = tensor_at(fused.module, producer.weight)
        stored = weight.detach().T if producer.transposed else weight.detach()
        rows = weight_as_rows(stored, producer.affine).to(x)
        x, wanted = x - centre, wanted - aim
        left = wanted - (x @ rows).transpose(0, 1).flatten(1)
        regression = Regression(x, sum(sample.fit), producer.biased, sample.dual_every)
        groups = in_groups(left, producer.affine.groups)
        correction = regression.correct(groups, self.ridges, least=0.0)
        if correction.weight is not None:
            rows = rows + correction.weight.to(rows)
            moved = rows_as_weight(correction.weight, producer.affine.kernel)
            weight.data.add_((moved.T if producer.transposed else moved).to(weight))
        if producer.bias is not None:
            given = (centre @ rows).transpose(0, 1).flatten()
            bias = tensor_at(fused.module, producer.bias)
            bias.data.copy_((aim - given).to(bias))
        return correction, float(wanted.double().square().sum()) / max(len(wanted), 1)
