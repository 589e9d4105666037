"""How far the outputs of networks are apart, summed over batches.

Class probabilities are compared by their Kullback-Leibler divergence, other outputs by the squared
error relative to what they should be. Nothing here grows with the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from .._ranks import total_of
from ..errors import ModelError
from ..graph.structures import tensors_in
from ..spaces.network import OPEN, Network
from .data import Calibration
from .run import Bypass, run_past, working_batch


def is_logits(value: Any) -> TypeGuard[Tensor]:
    """Tell whether an output can be logits: `(samples, classes)` of at least two classes."""
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] > 1


def scores_node(network: Network) -> str | None:
    """Return the contraction whose value is all that a network returns, if that can be logits."""
    output = network.module.graph.output_node()
    node = output.args[0]
    if OPEN in output.meta or not isinstance(node, fx.Node) or node.name not in network.weights:
        return None
    shape = network.shapes.get(node.name, ())
    return node.name if len(shape) == 2 and shape[1] > 1 else None


SCORES = "logits"  # the name that people give to scores among several outputs


def scores_of(value: Any, name: str | int | None = None) -> Any:
    """Return the tensor that a network's outputs are compared by.

    Args:
        value: What the network returned: a tensor, or a structure of several.
        name: Which of them: its name, or its number. If not given, it is the one called `logits`,
            or else the first one that holds real numbers; of a value without any, the value.

    Raises:
        ModelError: If there is none of that name or number.
    """
    if isinstance(value, Tensor):
        return value
    fields = getattr(value, "__dataclass_fields__", ())
    named = {n: getattr(value, n) for n in fields} if fields else value
    if isinstance(named, Mapping):
        wanted = SCORES if name is None else name
        if wanted in named:
            return named[wanted]
    elif isinstance(named, (tuple, list)) and isinstance(name, int) and name < len(named):
        return named[name]
    if name is None:
        return next((t for t in tensors_in(value) if t.is_floating_point()), value)
    kind = f"outputs {[*named]}" if isinstance(named, Mapping) else f"a {type(value).__name__}"
    raise ModelError(
        f"{kind} without {name!r}",
        where="what a network returned",
        expected="the name or number of one of its outputs",
        do="leave the argument `output` out to take the scores, or the first tensor",
    )


def divergence(wanted: Tensor, logits: Tensor) -> float:
    """Return the divergence (nats) of class probabilities from those wanted, summed over samples.

    Args:
        wanted: `(samples, classes)` logits.
        logits: `(samples, classes)` logits.
    """
    p, q = (t.double().log_softmax(1) for t in (wanted, logits))
    possible = p.exp() > 0  # classes that are ruled out do not count
    return float(torch.where(possible, p.exp() * (p - q), 0.0).sum())


class Distance:
    """How far outputs are from those wanted, over many batches.

    Attributes:
        in_nats: Whether class probabilities were compared; else, values were.
        total: The divergence summed over samples (nats), or the squared error.
        scale: The number of samples, or the squared values wanted.
    """

    def __init__(self) -> None:
        self.in_nats, self.total, self.scale = True, 0.0, 0.0

    def add(self, wanted: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Add the outputs of a batch, of the same kind as those before."""
        if len(wanted) == 1 and is_logits(wanted[0]):
            self.total += divergence(wanted[0], outputs[0])
            self.scale += len(wanted[0])
            return
        self.in_nats = False
        for a, b in zip(wanted, outputs):
            self.total += float((a - b).abs().square().sum())
            self.scale += float(a.abs().square().sum())

    def __add__(self, other: Distance) -> Distance:
        """Return the distance over the batches of both."""
        both = Distance()
        both.in_nats = self.in_nats and other.in_nats
        both.total, both.scale = self.total + other.total, self.scale + other.scale
        return both

    def summed(self) -> Distance:
        """Return the distance over the batches of all processes, inside `Calibration.summed`."""
        every = Distance()
        every.in_nats = not total_of(not self.in_nats)
        every.total, every.scale = total_of(self.total), total_of(self.scale)
        return every

    @property
    def mean(self) -> float:
        """The mean divergence of a sample (nats), or the squared error relative to the values."""
        return self.total / max(self.scale, 1e-300)

    @property
    def shown(self) -> float:
        """The mean divergence (nats), or the root mean square error relative to the values."""
        return self.mean if self.in_nats else math.sqrt(self.mean)


def relative_error_on(
    data: Calibration, model: Network, other: Network, bypass: Bypass | None = None
) -> float:
    """Return the root mean square error of a network's outputs, relative to a model's outputs.

    Args:
        data: Calibration inputs.
        model: What gives the outputs that are wanted.
        other: The network.
        bypass: Nodes of this network that are not run.
    """
    error = power = 0.0
    for batch in data.own(working_batch([model, other])):
        for a, b in zip(run_past(model, batch, {}), run_past(other, batch, bypass or {})):
            if a.is_floating_point():  # whole numbers have no mean square
                error += float((a.double() - b.double()).square().sum())
                power += float(a.double().square().sum())
    with data.summed():
        return float((total_of(error) / max(total_of(power), 1e-300)) ** 0.5)
