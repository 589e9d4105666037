"""Closed-form corrections of the fused network from calibration data.

So far one: its norms get back their running statistics, measured on the fused network itself as it
is corrected layer by layer, and affine parameters that give each unit the mean and spread that the
parents' matched units have.

References:
    Jordan et al. 2023 (REPAIR): averaged units lose variance, by a factor (1 + rho) / 2 for two of
    correlation rho. Difference: statistics of a layer are measured after all earlier layers have
    been corrected on all samples, not batch by batch, so nothing changes where nothing was lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx

from .data import Calibration
from .emit import NormPlan
from .network import Network
from .statistics import Run, batch_size

LARGEST_GAIN = 10.0  # a unit that the average silenced is not blown up beyond this
FRONTIER_BYTES = 1 << 29  # memory for the live values of all samples together


def norm_samples(networks: Sequence[Network]) -> int:
    """Return how many samples fit the frontier: about three live values of the largest kind."""
    return batch_size(networks, FRONTIER_BYTES // 3, 1 << 30, least=16)


def settle_norms(
    network: Network,
    plans: Sequence[NormPlan],
    data: Calibration,
    samples: int,
    match_moments: bool,
) -> None:
    """Set statistics and affine parameters of the norms of a freshly emitted network, in place.

    Args:
        network: The fused network.
        plans: What its norms have to compute.
        data: Calibration inputs.
        samples: How many of the first samples to use, all live at once.
        match_moments: Give each unit the parents' moments; otherwise keep the mixed function.
    """
    by_node = {p.node: p for p in plans}
    waiting = set(by_node)
    if not waiting:
        return
    size = batch_size([network], 1 << 25, 128)
    runs, count = [], 0
    for batch in data.chunks(size):
        batch = tuple(t[: samples - count] for t in batch)
        count += len(batch[0])
        runs.append(Run(network, batch))
        if count >= samples:
            break
    with torch.no_grad():
        for node in network.module.graph.nodes:
            if node.name in by_node:
                plan = by_node[node.name]
                _settle(network, plan, [r.value_of(plan.reads) for r in runs], match_moments)
                waiting.discard(node.name)
            if not waiting:
                return
            for run in runs:
                run.step(node)


def _settle(network: Network, plan: NormPlan, values: list[Tensor], match_moments: bool) -> None:
    mean, variance = _moments(values)
    roles = network.book.norms[plan.node]
    eps = float(roles["eps"])
    gain, shift = plan.scale, plan.scale * mean + plan.shift
    if match_moments and plan.spread is not None:
        spread = np.sqrt(variance)
        moved = spread > 1e-6 * max(spread.max(), 1e-30)
        wanted = np.divide(plan.spread, spread, out=np.abs(plan.scale), where=moved)
        gain = np.copysign(np.minimum(wanted, LARGEST_GAIN * np.abs(plan.scale)), plan.scale)
        shift = plan.mean
    tensors = {**dict(network.module.named_parameters()), **dict(network.module.named_buffers())}
    if "weight" not in roles:  # no affine part: the statistics have to say it
        safe = np.where(np.abs(gain) > 1e-12, gain, 1.0)
        mean, variance = mean - shift / safe, np.maximum(1.0 / safe**2 - eps, 0.0)
    else:
        _fill(tensors[roles["weight"]], gain * np.sqrt(variance + eps))
        _fill(tensors[roles["bias"]], shift)
    _fill(tensors[roles["running_mean"]], mean)
    _fill(tensors[roles["running_var"]], variance)


def _fill(tensor: Tensor, values: np.ndarray) -> None:
    tensor.data.copy_(torch.as_tensor(values))


def _moments(values: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and population variance per channel over all batches and positions."""
    shift = values[0].transpose(0, 1).flatten(1).mean(1)
    count, total, squares = 0, 0.0, 0.0
    for value in values:
        x = value.transpose(0, 1).flatten(1) - shift[:, None]
        count += x.shape[1]
        total = total + x.sum(1).double()
        squares = squares + x.square().sum(1).double()
    variance = (squares / count - (total / count).square()).clamp(min=0)
    return (total / count + shift).cpu().numpy(), variance.cpu().numpy()


def finite(module: fx.GraphModule) -> bool:
    """Tell whether every parameter and buffer is finite."""
    tensors = [*module.parameters(), *module.buffers()]
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())
