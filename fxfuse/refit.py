"""Closed-form corrections of the fused network from calibration data.

So far one, moment matching: norms get back their running statistics, measured on the fused network
itself as it is corrected layer by layer, with affine parameters that give each unit the mean and
spread of the parents' matched units; contractions without a norm get the same through their rows.

References:
    Jordan et al. 2023 (REPAIR): averaged units lose variance, by a factor (1 + rho) / 2 for two of
    correlation rho. Difference: statistics of a layer are measured after all earlier layers have
    been corrected on all samples, not batch by batch, so nothing changes where nothing was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, fx

from .data import Calibration
from .emit import NormPlan, WeightPlan
from .measuring import measuring_batch
from .moments import Moments
from .network import Network
from .statistics import Run, batch_size

BATCH_BYTES, BATCH_SAMPLES = 1 << 24, 128
LARGEST_GAIN = 10.0  # a unit that the average silenced is not blown up beyond this
FRONTIER_BYTES = 1 << 29  # memory for the live values of all samples together


def frontier_samples(networks: Sequence[Network]) -> int:
    """Return how many samples fit the frontier of about three large values, in whole batches."""
    whole = measuring_batch(networks)
    samples = batch_size(networks, FRONTIER_BYTES // 3, 1 << 30, least=16)
    return max(samples // whole, 1) * whole


def settle(
    network: Network,
    plans: Sequence[NormPlan | WeightPlan],
    data: Calibration,
    samples: int,
    match_moments: bool,
    tick: Callable[[float], None] | None = None,
) -> None:
    """Settle the norms, and the moments of other contractions, of a freshly emitted network.

    Args:
        network: The fused network; edited in place.
        plans: What its nodes have to compute.
        data: Calibration inputs.
        samples: How many of the first samples to use, all live at once.
        match_moments: Give each unit the parents' moments; otherwise keep the mixed function.
        tick: Called with the share of the plans that is settled.
    """
    by_node = {p.node: p for p in plans if match_moments or isinstance(p, NormPlan)}
    waiting, runs = set(by_node), _start(network, data, samples)
    with torch.no_grad():
        for node in network.module.graph.nodes:
            if not waiting:
                return
            plan = by_node.get(node.name)
            if isinstance(plan, NormPlan):
                _settle_norm(network, plan, [r.value_of(plan.reads) for r in runs], match_moments)
            values = [run.step(node) for run in runs]
            if isinstance(plan, WeightPlan):
                _settle_weight(network, plan, values)
            waiting.discard(node.name)
            if plan is not None and tick is not None:
                tick(1 - len(waiting) / len(by_node))


def _start(network: Network, data: Calibration, samples: int) -> list[Run]:
    runs, count = [], 0
    for batch in data.chunks(batch_size([network], BATCH_BYTES, BATCH_SAMPLES)):
        if count < samples:
            runs.append(Run(network, tuple(t[: samples - count] for t in batch)))
            count += len(batch[0])
    return runs


def _settle_norm(
    network: Network, plan: NormPlan, values: list[Tensor], match_moments: bool
) -> None:
    found = _moments(values, 1)
    mean, variance, roles = found.mean, found.variance, network.book.norms[plan.node]
    eps = float(roles["eps"])
    gain, shift = plan.scale, plan.scale * mean + plan.shift
    if match_moments:
        wanted = _gain(plan.target.spread, found.spread, np.abs(plan.scale))
        gain, shift = np.copysign(wanted, plan.scale), plan.target.mean
    if "weight" not in roles:  # no affine part: the statistics have to say it
        safe = np.where(np.abs(gain) > 1e-12, gain, 1.0)
        mean, variance = mean - shift / safe, np.maximum(1.0 / safe**2 - eps, 0.0)
    else:
        _fill(network, roles["weight"], gain * np.sqrt(variance + eps))
        _fill(network, roles["bias"], shift)
    _fill(network, roles["running_mean"], mean)
    _fill(network, roles["running_var"], variance)


def _settle_weight(network: Network, plan: WeightPlan, values: list[Tensor]) -> None:
    """Scale a contraction's rows, and move its bias; without a bias, match second moments."""
    found, target = _moments(values, plan.axis), plan.target
    if plan.bias is None:
        power = [np.sqrt(m.mean**2 + m.spread**2) for m in (target, found)]
        gain, shift = _gain(*power, np.ones_like(power[0])), 0.0
    else:
        gain = _gain(target.spread, found.spread, np.ones_like(found.spread))
        shift = target.mean - gain * found.mean
        bias = tensor_of(network, plan.bias)
        _fill(network, plan.bias, gain * bias.detach().double().cpu().numpy() + shift)
    weight = tensor_of(network, plan.weight)
    along = [-1 if d == plan.dim else 1 for d in range(weight.dim())]
    weight.data.mul_(torch.as_tensor(gain).to(weight).view(along))
    for value in values:
        across = [-1 if d == plan.axis else 1 for d in range(value.dim())]
        moved = torch.as_tensor(np.broadcast_to(shift, gain.shape).copy())
        value.mul_(torch.as_tensor(gain).to(value).view(across))
        value.add_(moved.to(value).view(across))


def _gain(wanted: np.ndarray, found: np.ndarray, default: np.ndarray) -> np.ndarray:
    """Return the factor from a found to a wanted spread, bounded, for units that vary at all."""
    moved = found > 1e-6 * max(found.max(initial=0.0), 1e-30)
    gain = np.divide(wanted, found, out=default.astype(float), where=moved)
    return np.minimum(gain, LARGEST_GAIN * np.maximum(default, 1e-12))


def tensor_of(network: Network, name: str) -> Tensor:
    """Return a parameter or buffer by its qualified name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(network.module.get_submodule(owner), leaf)


def _fill(network: Network, name: str, values: np.ndarray) -> None:
    tensor_of(network, name).data.copy_(torch.as_tensor(values))


def _moments(values: list[Tensor], axis: int) -> Moments:
    moments = Moments()
    for value in values:
        moments.add(value.movedim(axis, 0))
    return moments


def finite(module: fx.GraphModule) -> bool:
    """Tell whether every parameter and buffer is finite."""
    tensors = [*module.parameters(), *module.buffers()]
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())
