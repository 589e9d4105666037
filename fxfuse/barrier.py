"""Loss and accuracy between two networks: fusions of all weights, from one analysis."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import ArgumentError
from .evaluation import Labelled, Loss, evaluate, rereadable
from .fusion import Method, fuse_along
from .intake import Progress
from .ir import Alignment
from .pictures import draw_barrier
from .tracing import plain_modes


@dataclass(frozen=True)
class Barrier:
    """Loss and accuracy along the weights of two networks.

    Attributes:
        weights: Share of the second network in each fusion, from 0 to 1.
        losses: Mean loss of each fusion.
        accuracies: Accuracy of each fusion in percent.
        names: How the networks are called.
    """

    weights: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    names: tuple[str, str]

    @property
    def height(self) -> float:
        """How far the loss rises above the straight line between its ends, at most.

        References:
            Entezari et al. 2022, definition 2 of the error barrier.
        """
        first, last = self.losses[0], self.losses[-1]
        straight = [(1 - t) * first + t * last for t in self.weights]
        return max(loss - line for loss, line in zip(self.losses, straight))

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write both curves, .svg, .png or .pdf.

        Raises:
            ArgumentError: If the ending is another.
        """
        draw_barrier(self, path)

    def __str__(self) -> str:
        lines = [f"weight of {self.names[1]} (the rest: {self.names[0]})"]
        for t, loss, accuracy in zip(self.weights, self.losses, self.accuracies):
            lines.append(f"  {t:.2f}  loss {loss:.4f}  accuracy {accuracy:.2f} %")
        return "\n".join([*lines, f"barrier of the loss {self.height:.4f}"])


@plain_modes()
def barrier(
    models: Sequence[nn.Module],
    data: Any,
    labelled: Labelled,
    *,
    weights: Sequence[float] | None = None,
    alignment: Alignment | None = None,
    anchor: int | None = None,
    method: Method | None = None,
    loss: Loss = nn.functional.cross_entropy,
    progress: Progress | None = None,
) -> Barrier:
    """Measure loss and accuracy along the weights between two networks.

    The networks are traced, aligned and balanced once; what depends on the weights is done for each
    of them, as `fuse` with these weights would.

    Args:
        models: Two networks; not modified.
        data: Unlabelled calibration inputs, as for `fuse`.
        labelled: What is measured on: a pair of tensors (inputs, labels), or an iterable of such
            batches, such as a `DataLoader`.
        weights: Shares of the second network, increasing; 0, 0.1 ... 1 if not given.
        alignment: Which layers correspond; found once if not given.
        anchor: As for `fuse`.
        method: As for `fuse`.
        loss: Of outputs and labels, their mean over a batch.
        progress: Called with the name of a stage and the share of it that is done.

    Raises:
        ArgumentError: If there are not two models, or the weights are not increasing in 0 to 1.
        DataError: If the labelled data are empty or of another form.

    Example:
        >>> import torch
        >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
        >>> x = torch.randn(60, 4)
        >>> curve = barrier(nets, x, (x, nets[0](x).argmax(1)), weights=[0, 0.5, 1])
        >>> curve.weights, curve.accuracies[0]
        ((0.0, 0.5, 1.0), 100.0)
    """
    shares = tuple(i / 10 for i in range(11)) if weights is None else tuple(map(float, weights))
    _require(models, shares)
    batches = rereadable(labelled)
    pairs, losses, accuracies, names = [(1.0 - t, t) for t in shares], [], [], ("", "")
    choices: Any = {"alignment": alignment, "anchor": anchor, "method": method}
    for fused in fuse_along(models, data, pairs, progress=progress, **choices):
        names = fused.meta["fxfuse"].alignment.names
        correct, mean = evaluate(fused.eval(), batches, loss)
        losses.append(mean)
        accuracies.append(correct)
    return Barrier(shares, tuple(losses), tuple(accuracies), names)


def _require(models: Sequence[nn.Module], shares: tuple[float, ...]) -> None:
    if not isinstance(models, Sequence) or len(models) != 2:
        met = f"{len(models)} models" if isinstance(models, Sequence) else type(models).__name__
        raise ArgumentError(
            met,
            where="the argument `models` of barrier",
            expected="two networks",
            do="pass them as a list: fxfuse.barrier([a, b], data, labelled)",
        )
    inside = all(0 <= t <= 1 for t in shares)
    if len(shares) < 2 or not inside or any(a >= b for a, b in zip(shares, shares[1:])):
        raise ArgumentError(
            f"weights {list(shares)}",
            where="the argument `weights` of barrier",
            expected="two or more increasing shares of the second network, from 0 to 1",
            do="leave them out for 0, 0.1 ... 1",
        )
