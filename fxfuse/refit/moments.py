"""How a fused network is corrected on the data (`Refit`), and the simplest way: moment matching.

Norms get back their running statistics, measured on the fused network itself as it is corrected
layer by layer, with affine parameters that give each unit the mean and spread of the parents'
matched units. Contractions without a norm get the same through their weight and bias.

References:
    Jordan et al. 2023 (REPAIR): averaged units lose variance, by a factor (1 + rho) / 2 for two of
    correlation rho. Difference: statistics of a layer are measured after all earlier layers have
    been corrected on all samples, not batch by batch, so nothing changes where nothing was lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from .._progress import tell
from ..calibration.data import Calibration
from ..calibration.moments import Moments
from ..calibration.norms import write_norm
from ..calibration.run import Run, batch_size, working_batch
from ..coupling.measure import Keeper
from ..coupling.mixing import Couplings
from ..coupling.problem import Problem
from ..graph.state import fill, tensor_at
from ..ir import LayerFit
from ..spaces.network import Network
from .emit import NormPlan, WeightPlan, outputs_to_settle, scale_units

LARGEST_GAIN = 10.0  # a unit that the average silenced is not blown up beyond this
ROUNDING = 1e-5  # share of its root mean square by which what is constant varies in float32
FRONTIER_BYTES = 1 << 29  # memory for the live values of all samples, about three large ones


@dataclass(frozen=True, eq=False)
class Outcome:
    """How near a refit came to the parents.

    Attributes:
        layers: What was refitted, in order.
        divergence: Mean Kullback-Leibler divergence (nats) of the fused network's class
            probabilities from those of the parents' mean logits, on the calibration data, where
            outputs are 2-D.
        mixed: Whether what writes the outputs was left as it was mixed, for the rest was refitted.
    """

    layers: tuple[LayerFit, ...] = ()
    divergence: float | None = None
    mixed: bool = False


class Refit(Protocol):
    """How a freshly emitted network is corrected on the data; inherit from it for the defaults.

    Attributes:
        fits: Whether weights are fitted to the samples, so that others have to judge the result.
    """

    fits: ClassVar[bool] = False

    @property
    def of_outputs(self) -> Refit | None:
        """The same, for what writes the outputs alone; None if nothing is fitted there."""
        return None

    def settles(self, problem: Problem) -> dict[str, int]:
        """Return the nodes whose moments it asks of the networks, with their feature axis."""

    def keeps(self, problem: Problem, data: Calibration, samples: int) -> Keeper | None:
        """Return what keeps values of the networks for it, while they are measured."""
        return None

    def using(self, kept: Any) -> Refit:
        """Return the same, with values that were kept."""
        return self

    def samples(self, networks: Sequence[Network]) -> int:
        """Return how many samples may be live at once, in whole measuring batches."""

    def __call__(
        self,
        fused: Network,
        couplings: Couplings,
        plans: Sequence[NormPlan | WeightPlan],
        data: Calibration,
        samples: int,
    ) -> Outcome:
        """Correct the network in place.

        Args:
            fused: The fused network.
            couplings: The maps of the networks it is made of.
            plans: What its nodes have to compute.
            data: Calibration inputs.
            samples: How many of the first samples to use, all live at once.
        """


class _Settle(Refit):
    """Settle the plans of a fused network from its first node to its last, on all samples."""

    def samples(self, networks: Sequence[Network]) -> int:
        """Return how many samples may be live at once, in whole measuring batches."""
        whole = working_batch(networks)
        fitting = batch_size(networks, FRONTIER_BYTES // 3, 1 << 30, least=16)
        return max(fitting // whole, 1) * whole

    def __call__(
        self,
        fused: Network,
        couplings: Couplings,
        plans: Sequence[NormPlan | WeightPlan],
        data: Calibration,
        samples: int,
    ) -> Outcome:
        """Settle the norms, and the contractions whose moments were asked for; see `Refit`."""
        data, by_node = data.first(samples), {plan.node: plan for plan in plans}
        runs, settled = [Run(fused, batch) for batch in data.own(working_batch([fused]))], 0
        with torch.no_grad(), data.summed():
            for node in fused.module.graph.nodes:
                if settled == len(by_node):
                    break
                plan = by_node.get(node.name)
                if isinstance(plan, NormPlan):
                    inputs = [run.value_of(plan.reads) for run in runs]
                    settle_norm(fused, plan, moments_of(runs, inputs, 1))
                values = [run.step(node) for run in runs]
                if isinstance(plan, WeightPlan):
                    change = settle_weight(fused, plan, moments_of(runs, values, plan.axis))
                    for value in values:
                        gain, shift = (torch.as_tensor(c).to(value) for c in change)
                        value.movedim(plan.axis, -1).mul_(gain).add_(shift)
                if plan is not None:
                    settled += 1
                    tell(settled / len(by_node))
        return Outcome()


@dataclass(frozen=True)
class AsMixed(_Settle):
    """Keep the function as it was mixed; norms only get the statistics of what they read."""

    def settles(self, problem: Problem) -> dict[str, int]:
        """Ask for no moments."""
        return {}


@dataclass(frozen=True)
class ResetNorms(_Settle):
    """Measure the running statistics of norms anew, as most methods do after merging.

    Each norm's output then has the mean and spread that the parents' matched norms have, as with
    mixed affine parameters. Where there is no norm, nothing changes.

    References:
        Jordan et al. 2023 (REPAIR): where there are batch norms, the reset is the repair.
    """

    def settles(self, problem: Problem) -> dict[str, int]:
        """Ask for the moments of what norms write."""
        return dict.fromkeys(problem.structure.norms, 1)


@dataclass(frozen=True)
class MatchMoments(_Settle):
    """Give each unit of the fused network the mean and spread that the parents' units ask of it."""

    def settles(self, problem: Problem) -> dict[str, int]:
        """Ask for the moments of all that can be settled."""
        return outputs_to_settle(problem.structure)


def left_at_mean(
    fused: Network,
    couplings: Couplings,
    plans: Sequence[NormPlan | WeightPlan],
    data: Calibration,
    samples: int,
) -> Outcome:
    """Keep the mean of siblings, which generalises better than a fit to what they give together."""
    keep = AsMixed()
    norms = [replace(plan, target=None) for plan in plans if isinstance(plan, NormPlan)]
    live = min(samples, keep.samples(couplings.problem.networks))
    return keep(fused, couplings, norms, data, live)


def settle_norm(network: Network, plan: NormPlan, inputs: Moments) -> None:
    """Let a norm that reads values of some moments compute what its plan says.

    Its output gets the moments that the plan asks for; without any, the function stays as mixed.
    """
    scale, mean = plan.scale, plan.scale * inputs.mean + plan.shift
    if plan.target is not None:
        gain = gain_of(plan.target.spread, inputs.spread, np.abs(plan.scale), inputs.rms)
        scale, mean = np.copysign(gain, plan.scale), plan.target.mean
    roles = network.norms[plan.node]
    write_norm(network.module, roles, scale, mean, inputs.mean, inputs.variance)


def settle_weight(
    network: Network, plan: WeightPlan, outputs: Moments
) -> tuple[np.ndarray, np.ndarray]:
    """Scale what a contraction writes, and move its bias; without a bias, match root mean squares.

    Returns:
        What to multiply the units of its values by, and what to add then.
    """
    target, one = plan.target, np.ones_like(outputs.spread)
    if plan.bias is None:
        gain = gain_of(target.rms, outputs.rms, one)
        shift = np.zeros_like(gain)
    else:
        gain = gain_of(target.spread, outputs.spread, one, outputs.rms)
        shift = target.mean - gain * outputs.mean
        bias = tensor_at(network.module, plan.bias)
        fill(network.module, plan.bias, gain * bias.detach().double().cpu().numpy() + shift)
    scale_units(tensor_at(network.module, plan.weight), gain, plan.dim)
    return gain, shift


def gain_of(
    wanted: np.ndarray, spread: np.ndarray, default: np.ndarray, values: np.ndarray | float = 0.0
) -> np.ndarray:
    """Return the factor from each unit's spread to the wanted one, bounded.

    Units that hardly vary get the default.

    Args:
        wanted: The wanted spreads.
        spread: The spreads as they are.
        default: The factors of units that hardly vary.
        values: The root mean squares beside which a spread may be nothing but rounding.
    """
    varies = spread > np.maximum(1e-6 * max(spread.max(initial=0.0), 1e-30), ROUNDING * values)
    gain = np.divide(wanted, spread, out=default.astype(float), where=varies)
    bounded: np.ndarray = np.minimum(gain, LARGEST_GAIN * np.maximum(default, 1e-12))
    return bounded


def moments_of(runs: Sequence[Run], values: Sequence[Tensor], axis: int) -> Moments:
    """Return the moments of the units along an axis of the value of each run, of all processes."""
    moments = Moments()
    for run, value in zip(runs, values):
        moments.add(run.counted.of_units(value, axis))
    return moments.summed()
