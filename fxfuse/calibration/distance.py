"""How far the outputs of networks are apart, summed over batches.

Class probabilities are compared by their Kullback-Leibler divergence, other outputs by the squared
error relative to what they should be. Nothing here grows with the number of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..graph.trace import device_of, tensors_in
from ..spaces.network import Network
from .data import Calibration
from .run import working_batch


def is_logits(value: Any) -> TypeGuard[Tensor]:
    """Tell whether an output can be logits: `(samples, classes)` of at least two classes."""
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] > 1


def divergence(wanted: Tensor, logits: Tensor) -> float:
    """Return the divergence (nats) of class probabilities from those wanted, summed over samples.

    Args:
        wanted: `(samples, classes)` logits.
        logits: `(samples, classes)` logits.
    """
    p, q = (t.double().log_softmax(1) for t in (wanted, logits))
    return float((p.exp() * (p - q)).sum())


class SquaredError:
    """The squared error of outputs, relative to the squared values wanted, over many batches."""

    def __init__(self) -> None:
        self._error = self._power = 0.0

    def add(self, wanted: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Add the outputs of a batch; whole numbers among them do not count."""
        for a, b in zip(wanted, outputs):
            if a.is_floating_point():
                self._error += float((a.double() - b.double()).square().sum())
                self._power += float(a.double().square().sum())

    @property
    def relative(self) -> float:
        """The error of all batches so far."""
        return self._error / max(self._power, 1e-300)


def relative_error_on(data: Calibration, model: Network, other: Network) -> float:
    """Return the root mean square error of a network's outputs, relative to a model's outputs."""
    error, device = SquaredError(), device_of(model.module)
    modules = [network.module.eval() for network in (model, other)]
    with torch.no_grad():
        for batch in data.chunks(working_batch([model, other])):
            inputs = [t.to(device) for t in batch]
            error.add(*(tensors_in(module(*inputs)) for module in modules))
    return float(error.relative**0.5)
