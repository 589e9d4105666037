"""Closed-form corrections of the fused network from calibration data.

So far one, moment matching: norms get back their running statistics, measured on the fused network
itself as it is corrected layer by layer, with affine parameters that give each unit the mean and
spread of the parents' matched units; contractions without a norm get the same through their rows.

References:
    Jordan et al. 2023 (REPAIR): averaged units lose variance, by a factor (1 + rho) / 2 for two of
    correlation rho. Difference: statistics of a layer are measured after all earlier layers have
    been corrected on all samples, not batch by batch, so nothing changes where nothing was lost.

Give filters in front of norms the size that the networks were trained at.

A norm undoes the scale of the filter before it, so the function does not depend on it, but training
does: the smaller a filter, the further one step of gradient descent turns it. Filters that were
averaged, or solved for, are smaller than the ones they came from.

References:
    van Laarhoven 2017, L2 regularization versus batch and weight normalization: the effective
    learning rate is that over the squared norm of the filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, fx

from .._progress import tell
from ..calibration.data import Calibration
from ..calibration.moments import Moments
from ..calibration.norms import foldable_norms, single_weights, write_norm
from ..calibration.run import Bypass, Run, batch_size, working_batch
from ..coupling.measure import measuring_batch
from ..coupling.mixing import Couplings
from ..coupling.problem import Problem
from ..graph.state import fill, floats_of, tensor_at
from ..ir import LayerFit
from ..spaces.network import Network
from .emit import NormPlan, WeightPlan, outputs_to_settle

LARGEST_GAIN = 10.0  # a unit that the average silenced is not blown up beyond this


FRONTIER_BYTES = 1 << 29  # memory for the live values of all samples together


def frontier_samples(networks: Sequence[Network], budget: int | None = None) -> int:
    """Return how many samples fit the frontier of about three large values, in whole batches."""
    whole, budget = measuring_batch(networks), budget or FRONTIER_BYTES
    samples = batch_size(networks, budget // 3, 1 << 30, least=16)
    return max(samples // whole, 1) * whole


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
    """How a freshly emitted network is corrected on the data; inherit from it for the defaults."""

    @property
    def variants(self) -> tuple[Refit, ...]:
        """What `weights="auto"` tries beside it: other ways to refit that may come nearer."""
        return ()

    def settles(self, problem: Problem) -> dict[str, int]:
        """Return the nodes whose moments it asks of the networks, with their feature axis."""

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


@dataclass(frozen=True)
class MatchMoments(Refit):
    """Give each unit of the fused network the mean and spread that the parents' units ask of it.

    Attributes:
        keep: Keep the function as mixed, and only give norms the statistics to compute it with.
    """

    keep: bool = False

    def settles(self, problem: Problem) -> dict[str, int]:
        """Return the nodes whose moments are wanted."""
        return {} if self.keep else outputs_to_settle(problem.structure)

    def samples(self, networks: Sequence[Network]) -> int:
        """Return how many samples may be live at once."""
        return frontier_samples(networks)

    def __call__(
        self,
        fused: Network,
        couplings: Couplings,
        plans: Sequence[NormPlan | WeightPlan],
        data: Calibration,
        samples: int,
    ) -> Outcome:
        """Settle the norms, and the moments of other contractions; see `Refit`."""
        by_node = {p.node: p for p in plans if not self.keep or isinstance(p, NormPlan)}
        waiting, runs = set(by_node), start(fused, data, samples)
        with torch.no_grad():
            for node in fused.module.graph.nodes if waiting else ():
                plan = by_node.get(node.name)
                if isinstance(plan, NormPlan):
                    found = moments_of([r.value_of(plan.reads) for r in runs], 1)
                    settle_norm(fused, plan, found, self.keep)
                values = [run.step(node) for run in runs]
                if isinstance(plan, WeightPlan):
                    change = settle_weight(fused, plan, moments_of(values, plan.axis))
                    for value in values:
                        _rescale(value, plan.axis, *change)
                waiting.discard(node.name)
                if plan is not None:
                    tell(1 - len(waiting) / len(by_node))
                if not waiting:
                    break
        return Outcome()


def start(
    network: Network,
    data: Calibration,
    samples: int,
    order: Sequence[fx.Node] | None = None,
    bypass: Bypass | None = None,
    beside: Sequence[Network] = (),
) -> list[Run]:
    """Start a run for each batch of the first samples.

    Args:
        network: The network to run.
        data: Calibration inputs.
        samples: How many of the first ones.
        order: As for `statistics.Run`.
        bypass: As for `statistics.Run`.
        beside: Networks that run on batches of the same size.
    """
    runs, count = [], 0
    for batch in data.chunks(working_batch([network, *beside])):
        if count < samples:
            runs.append(Run(network, tuple(t[: samples - count] for t in batch), bypass, order))
            count += len(batch[0])
    return runs


def settle_norm(network: Network, plan: NormPlan, found: Moments, keep: bool) -> None:
    """Let a norm compute what its plan says of values of some moments; or keep the function."""
    gain, shift = plan.scale, plan.scale * found.mean + plan.shift
    if not keep and plan.target is not None:
        wanted = gain_of(plan.target.spread, found.spread, np.abs(plan.scale))
        gain, shift = np.copysign(wanted, plan.scale), plan.target.mean
    roles = network.norms[plan.node]
    write_norm(network.module, roles, gain, shift, found.mean, found.variance)


def settle_weight(
    network: Network, plan: WeightPlan, found: Moments
) -> tuple[np.ndarray, np.ndarray]:
    """Scale a contraction's rows, and move its bias; without a bias, match second moments.

    Returns:
        What to multiply the units of its values by, and what to add then.
    """
    target = plan.target
    if plan.bias is None:
        gain = gain_of(target.rms, found.rms, np.ones_like(found.spread))
        shift = np.zeros_like(gain)
    else:
        gain = gain_of(target.spread, found.spread, np.ones_like(found.spread))
        shift = target.mean - gain * found.mean
        bias = tensor_at(network.module, plan.bias)
        fill(network.module, plan.bias, gain * bias.detach().double().cpu().numpy() + shift)
    weight = tensor_at(network.module, plan.weight)
    along = [-1 if d == plan.dim else 1 for d in range(weight.dim())]
    weight.data.mul_(torch.as_tensor(gain).to(weight).view(along))
    return gain, shift


def _rescale(value: Tensor, axis: int, gain: np.ndarray, shift: np.ndarray) -> None:
    """Scale and move the units along an axis, in place."""
    across = [-1 if d == axis else 1 for d in range(value.dim())]
    value.mul_(torch.as_tensor(gain).to(value).view(across))
    value.add_(torch.as_tensor(shift).to(value).view(across))


def gain_of(wanted: np.ndarray, found: np.ndarray, default: np.ndarray) -> np.ndarray:
    """Return the factor from a found to a wanted spread, bounded, for units that vary at all."""
    moved = found > 1e-6 * max(found.max(initial=0.0), 1e-30)
    gain = np.divide(wanted, found, out=default.astype(float), where=moved)
    bounded: np.ndarray = np.minimum(gain, LARGEST_GAIN * np.maximum(default, 1e-12))
    return bounded


def moments_of(values: Sequence[Tensor], axis: int) -> Moments:
    """Return the moments of the units along an axis of batches of values."""
    moments = Moments()
    for value in values:
        moments.add(value.movedim(axis, 0))
    return moments


def finite(module: fx.GraphModule) -> bool:
    """Tell whether every parameter and buffer is finite."""
    return all(bool(torch.isfinite(t).all()) for t in floats_of(module).values())


def rescale(fused: Network, couplings: Couplings) -> None:
    """Scale each filter in front of a norm to the root mean square size of those it came from.

    The statistics of the norm follow, so that the function stays.

    Args:
        fused: The fused network; edited in place.
        couplings: The maps of the networks it is made of.
    """
    problem = couplings.problem
    base = problem.structure
    able = single_weights(base)
    for norm, node in foldable_norms(base).items():
        weight, dim = able[node]
        tensors = [tensor_at(n.module, weight) for n in problem.networks]
        wanted = couplings.mix(weight, [_squares(t, dim) for t in tensors], along=dim)
        found = _squares(tensor_at(fused.module, weight), dim)
        known = (found > 0) & (wanted > 0)
        factor = np.sqrt(np.divide(wanted, found, out=np.ones_like(found), where=known))
        roles = base.norms[norm]
        statistics = (str(roles[r]) for r in ("running_mean", "running_var"))
        mean, variance = (tensor_at(fused.module, name) for name in statistics)
        eps, spread = float(roles["eps"]), variance.double().cpu().numpy()
        factor = np.maximum(factor, np.sqrt(eps / (spread + eps)))  # no variance below zero
        variance.data.copy_(torch.as_tensor(factor**2 * (spread + eps) - eps))
        mean.data.mul_(torch.as_tensor(factor).to(mean))
        for name in base.tensors[node]:
            tensor, axis = tensor_at(fused.module, name), dim if name == weight else 0
            along = [-1 if d == axis else 1 for d in range(tensor.dim())]
            tensor.data.mul_(torch.as_tensor(factor).to(tensor).view(along))


def _squares(tensor: torch.Tensor, dim: int) -> np.ndarray:
    """Return the squared size `(units,)` of each filter."""
    rows = tensor.detach().double().movedim(dim, 0).flatten(1)
    found: np.ndarray = rows.square().sum(1).cpu().numpy()
    return found
