"""Measure classifiers on labelled data: one by one, and along the path between two networks.

A point of the path is the fusion with some weights. One analysis of the networks serves all points.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checked import checked
from .._progress import Progress, counted
from ..calibration.data import read
from ..calibration.distance import scores_of
from ..errors import ArgumentError, DataError, ModelError, line_of
from ..graph.calls import LABELS, Call, Reader, ToCall
from ..graph.inputs import Inputs
from ..graph.state import device_of
from ..graph.trace import without_autocast
from ..graph.wrappers import unwrapped
from ..ir import Alignment
from ..report.plots import draw_barrier
from .fuse import Method, fuse_along

Loss = Callable[[Tensor, Tensor], Tensor]
LABELLED = "the labelled data"
Labelled = Any  # a pair of tensors (inputs, labels), or an iterable of such batches


ENSEMBLE = "ensemble"


class _Mean(nn.Module):
    """The ensemble of networks: the mean of their outputs."""

    def __init__(self, networks: Iterable[nn.Module], output: str | int | None) -> None:
        super().__init__()
        self.networks, self.output = nn.ModuleList(networks), output

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        outputs = [scores_of(network(*args, **kwargs), self.output) for network in self.networks]
        return torch.stack(outputs).mean(0)


@checked()
def compare(
    models: Mapping[str, nn.Module],
    data: Any,
    samples: int | None = None,
    ensemble: Sequence[str] = (),
    output: str | int | None = None,
    inputs: ToCall | None = None,
) -> dict[str, tuple[float, float]]:
    """Return the accuracy in percent and the loss of classifiers, by name; empty without labels.

    Args:
        models: The classifiers, in eval mode; their scores are `(n, classes)`.
        data: Batches of inputs and labels, such as a `DataLoader`.
        samples: How many of the first samples to look at; all if not given.
        ensemble: Names of those models whose mean output is measured too, as "ensemble".
        output: Name or number of the scores among several outputs; `logits` or the first tensor
            if not given.
        inputs: From a batch to args, kwargs of forward, where batches are of another form than
            `fuse` takes; the labels are the last entry of a batch then.

    Raises:
        ArgumentError: If a name of the ensemble has no model.

    Example:
        >>> import torch
        >>> x = torch.randn(60, 4)
        >>> a, b = (nn.Linear(4, 3) for _ in range(2))
        >>> scores = compare({"a": a, "b": b}, [(x, a(x).argmax(1))], ensemble=["a", "b"])
        >>> list(scores), scores["a"][0]
        (['a', 'b', 'ensemble'], 100.0)
    """
    _require_networks(models, ensemble)
    try:
        batches = labelled_part(data, samples, list(models.values()), inputs)
    except DataError:
        return {}
    if not all(_scores(model, *batches[0], output) for model in models.values()):
        return {}
    compared = dict(models)
    if ensemble:
        compared[ENSEMBLE] = _Mean((models[name] for name in ensemble), output)
    every = counted(compared.items())
    return {name: evaluate(model, batches, output=output) for name, model in every}


def labelled_part(
    data: Any,
    samples: int | None = None,
    models: Sequence[nn.Module] = (),
    to_call: ToCall | None = None,
) -> list[tuple[Call, Tensor]]:
    """Return the first samples of labelled data, as calls of the models and their labels.

    Args:
        data: A pair (inputs, labels), or an iterable of such batches.
        samples: How many; all if not given.
        models: Those that take the inputs: how many they need tells where the labels are.
        to_call: From a batch to args, kwargs.

    Raises:
        DataError: If there are none, or they have no labels.
    """
    limit, batches, seen = sys.maxsize if samples is None else samples, [], 0
    reader = Reader(models, to_call)
    for batch in rereadable(data):
        call, labels = _pair(batch, reader)
        form, tensors, _ = call.parted()
        first = form.filled([t[: limit - seen] for t in tensors])
        batches.append((first, labels[: limit - seen]))
        seen += len(labels)
        if seen >= limit:
            break
    if not seen:
        raise _unlabelled("no samples")
    return batches


def _require_networks(models: Mapping[str, nn.Module], ensemble: Sequence[str]) -> None:
    others = [name for name, model in models.items() if not isinstance(model, nn.Module)]
    others += [name for name in ensemble if name not in models]
    if others:
        raise ArgumentError(
            f"names without a network: {others}",
            where="the arguments `models` and `ensemble` of compare",
            expected="a network for each name",
            do="pass them by name: fxfuse.compare({'a': a, 'b': b}, labelled)",
        )


def _scores(model: nn.Module, call: Call, labels: Tensor, output: str | int | None) -> bool:
    """Tell whether a model gives a score to each label."""
    form, tensors, _ = call.parted()
    with torch.no_grad():
        scores = scores_of(_run(model, form.filled([t[:2] for t in tensors])), output)
    fits = isinstance(scores, Tensor) and scores.dim() == 2 and labels.dim() == 1
    return fits and 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]


def evaluate(
    model: nn.Module,
    labelled: Labelled,
    loss: Loss = nn.functional.cross_entropy,
    output: str | int | None = None,
    to_call: ToCall | None = None,
) -> tuple[float, float]:
    """Return the accuracy in percent and the mean loss of a classifier, in its present mode.

    Args:
        model: It gives scores `(n, classes, ...)`.
        labelled: A pair of tensors (inputs, labels), or an iterable of such batches.
        loss: Of scores and labels, their mean over a batch.
        output: Name or number of the scores among several outputs.
        to_call: From a batch to args, kwargs.

    Raises:
        DataError: If the labelled data are empty or of another form.
    """
    reader = Reader([model], to_call)
    device, right, total, count, samples = device_of(model), 0, 0.0, 0, 0
    with torch.no_grad():
        for batch in read(rereadable(labelled), LABELLED):
            call, labels = _pair(batch, reader)
            scores = scores_of(_run(model, call), output)
            labels = labels.to(device)
            _require_scores(scores, labels)
            right += int((scores.argmax(1) == labels).sum())
            total += float(_given(loss, "the loss", scores, labels)) * len(labels)
            count, samples = count + labels.numel(), samples + len(labels)
    if not samples:
        raise _unlabelled("no samples")
    return 100.0 * right / count, total / samples


def _run(model: nn.Module, call: Call) -> Any:
    """Return what a network gives for a call, on its device."""
    inputs = Inputs.of(unwrapped(model), call)
    tensors = inputs.on(device_of(model))
    return _given(lambda *values: inputs.call(model, values), "the network", *tensors)


def rereadable(labelled: Labelled) -> Iterable[Any]:
    """Return batches that can be read again and again."""
    if isinstance(labelled, (tuple, list)) and len(labelled) == 2:
        inputs, labels = labelled
        if isinstance(inputs, Tensor) and isinstance(labels, Tensor) and inputs.dim() > 1:
            return list(zip(inputs.split(256), labels.split(256)))
        if isinstance(inputs, Mapping) and isinstance(labels, Tensor):
            return [labelled]
    if isinstance(labelled, Mapping):
        return [labelled]
    if not isinstance(labelled, Iterable) or isinstance(labelled, (str, bytes, Tensor)):
        raise _unlabelled(f"labelled data of type {type(labelled).__name__}")
    return labelled if isinstance(labelled, Sized) else list(read(labelled, LABELLED))


def _pair(batch: Any, reader: Reader) -> tuple[Call, Tensor]:
    """Return the call of a batch, and the labels beside or behind its inputs.

    Args:
        batch: `(input, labels)`, `((a, b), labels)`, `(a, b, labels)` for a network of two, or a
            mapping, whose labels are called so or come second.
        reader: Of the networks.
    """
    entries = [*batch.values()] if isinstance(batch, Mapping) else batch
    if not isinstance(entries, (tuple, list)) or len(entries) < 2:
        raise _unlabelled(f"a batch of type {type(batch).__name__}")
    call = reader.call(batch, LABELLED)
    many = len(call.args) > 1 and call.args[0] is entries[0] and len(entries) > len(call.args)
    labels = entries[-1 if reader.to_call is not None else len(call.args) if many else 1]
    if isinstance(batch, Mapping):
        labels = next((v for k, v in batch.items() if LABELS in str(k)), labels)
    _, inputs, _ = call.parted()
    if not isinstance(labels, Tensor):
        raise _unlabelled(f"labels of type {type(labels).__name__}")
    if not labels.dim() or labels.is_floating_point() or {len(t) for t in inputs} != {len(labels)}:
        shapes = " and ".join(str(tuple(t.shape)) for t in inputs)
        raise _unlabelled(f"inputs {shapes} with labels {tuple(labels.shape)} of {labels.dtype}")
    return call, labels


def _given(function: Callable[..., Any], name: str, *args: Tensor) -> Any:
    """Return what the caller's network or loss makes of the caller's data."""
    try:
        return function(*args)
    except Exception as error:
        shapes = " and ".join(f"{tuple(t.shape)} of {t.dtype}" for t in args)
        raise DataError(
            f"{name} refuses {shapes}: {type(error).__name__}: {error}",
            where=f"{LABELLED} {line_of(error)}".strip(),
            expected="inputs as the networks take them, and labels as the loss does",
            do="compute the loss of one batch yourself, and mend what fails there",
        ) from error


def _require_scores(scores: Any, labels: Tensor) -> None:
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    apart = isinstance(scores, Tensor) and scores.dim() > 1
    if not apart or (len(scores), *scores.shape[2:]) != tuple(labels.shape):
        raise ModelError(
            f"outputs {shape} for labels {tuple(labels.shape)}",
            where="the network that is compared on the labelled data",
            expected="a tensor of scores (n, classes, ...) for labels (n, ...)",
            do="compare classifiers, and name their scores among several outputs: output='logits'",
        )


def _unlabelled(met: str) -> DataError:
    return DataError(
        met,
        where="the labelled data",
        expected="a pair of tensors (inputs, integer labels), or an iterable of such batches",
        do="pass (x, y), or a DataLoader over pairs",
    )


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
        draw_barrier(self.weights, self.losses, self.accuracies, self.names, path)

    def __str__(self) -> str:
        lines = [f"weight of {self.names[1]} (the rest: {self.names[0]})"]
        for t, loss, accuracy in zip(self.weights, self.losses, self.accuracies):
            lines.append(f"  {t:.2f}  loss {loss:.4f}  accuracy {accuracy:.2f} %")
        return "\n".join([*lines, f"barrier of the loss {self.height:.4f}"])


@checked()
@without_autocast()
def barrier(
    models: Sequence[nn.Module],
    data: Any,
    labelled: Labelled,
    *,
    weights: Sequence[float] | None = None,
    alignment: Alignment | None = None,
    anchor: int | None = None,
    method: Method | str | None = None,
    loss: Loss = nn.functional.cross_entropy,
    inputs: ToCall | None = None,
    output: str | int | None = None,
    progress: Progress | bool | None = None,
) -> Barrier:
    """Measure loss and accuracy along the weights between two networks.

    The networks are traced, aligned and balanced once; what depends on the weights is done for each
    of them, as `fuse` with these weights would.

    Args:
        models: Two networks; not modified.
        data: Unlabelled calibration inputs, as for `fuse`.
        labelled: A pair of tensors (inputs, labels), or an iterable of such batches, such as a
            `DataLoader`.
        weights: Shares of the second network, increasing; 0, 0.1 ... 1 if not given.
        alignment: Which layers correspond; found once if not given.
        anchor: As for `fuse`.
        method: As for `fuse`.
        loss: Of scores and labels, their mean over a batch.
        inputs: As for `fuse`, also of the labelled batches; their labels are the last entry then.
        output: Name or number of the scores among several outputs; `logits` or the first tensor
            if not given.
        progress: True to draw bars, or what is called with the name of a stage and the share of it
            that is done.

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
    choices: Any = {"alignment": alignment, "anchor": anchor, "method": method, "inputs": inputs}
    for fused in fuse_along(models, data, pairs, progress=progress, **choices):
        names = fused.meta["fxfuse"].alignment.names
        correct, mean = evaluate(fused.eval(), batches, loss, output, inputs)
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
