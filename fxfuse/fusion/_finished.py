"""Train a fused network for a few steps more, to the mean of its networks' outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..calibration.run import working_batch
from ..calibration.shares import Batch
from ..errors import ArgumentError
from ..graph.state import device_of
from ..graph.trace import outputs_of
from ..ir import Finished
from ..refit.finish import Finish
from ..spaces.network import Network
from ._guard import Split
from .selection import distances


def finished(
    fused: Network,
    networks: Sequence[Network],
    shares: Sequence[float],
    split: Split,
    finish: Finish,
) -> Finished:
    """Train a fused network on, in place.

    Args:
        fused: The fused network.
        networks: Those that it was made of.
        shares: Of each of them in the outputs that are wanted.
        split: Has the samples to train on, and those to judge by.
        finish: For how long.
    """
    ensemble = [(w, n) for w, n in zip(shares, networks) if w]
    size = working_batch([fused, *networks])

    def wanted(batch: Batch) -> list[Tensor]:
        every = zip(*(_outputs(network, batch) for _, network in ensemble))
        return [torch.stack([w * t for (w, _), t in zip(ensemble, each)]).sum(0) for each in every]

    def far() -> float:
        (distance,) = distances(ensemble, [fused], split.judge.own(size))
        with split.judge.summed():
            return distance.summed().shown

    return finish(fused.module, wanted, far, split.fit)


def _outputs(network: Network, batch: Batch) -> list[Tensor]:
    given = tuple(t.to(device_of(network.module)) for t in batch)
    outputs = outputs_of(network.module, given, network.name)
    return [t for t in outputs if t.is_floating_point()]


def require_outputs(finish: Finish | None, other: object) -> None:
    """Refuse a finish where networks have no mean outputs, or another method fuses them."""
    if finish is not None and other is not None:
        raise ArgumentError(
            f"a finish with {other}",
            where="the argument `finish`",
            expected="networks of one task, and a fxfuse.Method",
            do="leave `heads` out, take another method, or leave `finish` out and train the result",
        )
