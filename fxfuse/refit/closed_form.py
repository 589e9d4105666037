"""Moments of averaged units from the networks alone, without a run of the fused network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .._progress import tell
from ..calibration.data import Calibration
from ..calibration.moments import Moments
from ..calibration.run import walk, working_batch
from ..coupling.mixing import Couplings
from ..spaces.network import Network
from ._targets import Targets
from .emit import NormPlan, WeightPlan
from .moments import MatchMoments, Outcome, settle_norm, settle_weight


@dataclass(frozen=True)
class ClosedFormMoments(MatchMoments):
    """As `MatchMoments`, but what averaging takes from a unit is computed, not measured.

    The mean of matched units of spreads `s_k` and correlations `r_kl` has the variance
    `sum_kl w_k w_l r_kl s_k s_l`. It is that of the networks' own units: what the layers before it
    lost, a unit does not show.

    References:
        Jordan et al. 2023 (REPAIR), closed form. Difference: correlations are those of the
        pre-activations that are averaged; the released code takes those behind the activation.
    """

    def __call__(
        self,
        fused: Network,
        couplings: Couplings,
        plans: Sequence[NormPlan | WeightPlan],
        data: Calibration,
        samples: int,
    ) -> Outcome:
        """Settle the plans; see `Refit`."""
        targets, by_node = Targets(couplings), {plan.node: plan for plan in plans}
        moments = {name: Moments() for name in by_node}
        networks, seen = targets.problem.networks, 0

        def visit(node: fx.Node, values: list[Any]) -> None:
            if node.name in moments:
                moments[node.name].add(_mean(targets, by_node[node.name], values))

        size = working_batch(networks)
        with torch.no_grad():
            for batch in data.chunks(size):
                count = data.samples_in(batch)
                first = batch if count <= samples - seen else [t[: samples - seen] for t in batch]
                walk(networks, tuple(first), visit, targets.bypasses)
                seen += count
                tell(min(seen / samples, 1.0))
                if seen >= samples:
                    break
            for name, plan in by_node.items():
                if isinstance(plan, NormPlan):
                    settle_norm(fused, plan, _before(plan, moments[name]))
                else:
                    settle_weight(fused, plan, moments[name])
        return Outcome()


def _mean(targets: Targets, plan: NormPlan | WeightPlan, values: Sequence[Tensor | None]) -> Tensor:
    """Return the mean of the networks' matched units `(units, ...)` at the node of a plan."""
    if isinstance(plan, WeightPlan):
        name, axis = plan.weight, plan.axis
    else:
        name, axis = str(targets.problem.structure.norms[plan.node]["running_mean"]), 1
    return targets.mix(plan.node, name, axis, values).movedim(axis, 0)


def _before(plan: NormPlan, outputs: Moments) -> Moments:
    """Return the moments of what a norm reads, from those of what it gives as it was mixed."""
    scale = np.where(plan.scale != 0, plan.scale, 1.0)
    return Moments.of((outputs.mean - plan.shift) / scale, outputs.spread / np.abs(scale))
