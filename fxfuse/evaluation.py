"""How well classifiers do on labelled data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DataError
from .progress import Tick, counted, silent
from .tracing import device_of

Loss = Callable[[Tensor, Tensor], Tensor]
Labelled = Any  # a pair of tensors (inputs, labels), or an iterable of such batches


def compare(
    models: Mapping[str, nn.Module], data: Any, samples: int, tick: Tick = silent
) -> dict[str, tuple[float, float]]:
    """Return the accuracy in percent and the loss of classifiers, by name; empty without labels.

    Args:
        models: What is compared, in eval mode; outputs `(n, classes)`.
        data: Whatever a fusion is calibrated on.
        samples: How many of the first samples to look at.
        tick: Called with the share of the models that is done.
    """
    batches, seen = [], 0
    for batch in data if isinstance(data, Iterable) and not isinstance(data, Tensor) else ():
        try:
            inputs, labels = _pair(batch)
        except DataError:
            return {}
        batches.append((inputs[: samples - seen], labels[: samples - seen]))
        seen += len(labels)
        if seen >= samples:
            break
    if not seen or not all(_scores(model, *batches[0]) for model in models.values()):
        return {}
    named = counted(models.items(), tick)
    return {name: evaluate(model, batches) for name, model in named}


def _scores(model: nn.Module, inputs: Tensor, labels: Tensor) -> bool:
    """Tell whether a model gives a score to each label."""
    with torch.no_grad():
        found = model(inputs[:2].to(device_of(model)))
    fits = isinstance(found, Tensor) and found.dim() == 2 and labels.dim() == 1
    return fits and 0 <= int(labels.min()) <= int(labels.max()) < found.shape[1]


def evaluate(
    model: nn.Module, labelled: Labelled, loss: Loss = nn.functional.cross_entropy
) -> tuple[float, float]:
    """Return the accuracy in percent and the mean loss of a classifier, in its present mode.

    Args:
        model: Its output is a tensor of scores `(n, classes, ...)`.
        labelled: A pair of tensors (inputs, labels), or an iterable of such batches.
        loss: Of outputs and labels, their mean over a batch.

    Raises:
        DataError: If the labelled data are empty or of another form.
    """
    device, right, total, count, samples = device_of(model), 0, 0.0, 0, 0
    with torch.no_grad():
        for batch in rereadable(labelled):
            inputs, labels = _pair(batch)
            scores, labels = model(inputs.to(device)), labels.to(device)
            right += int((scores.argmax(1) == labels).sum())
            total += float(loss(scores, labels)) * len(labels)
            count, samples = count + labels.numel(), samples + len(labels)
    if not samples:
        raise _unlabelled("no samples")
    return 100.0 * right / count, total / samples


def rereadable(labelled: Labelled) -> Iterable[Any]:
    """Return batches that can be read again and again."""
    if isinstance(labelled, (tuple, list)) and len(labelled) == 2:
        inputs, labels = labelled
        if isinstance(inputs, Tensor) and isinstance(labels, Tensor) and inputs.dim() > 1:
            return list(zip(inputs.split(256), labels.split(256)))
    if not isinstance(labelled, Iterable) or isinstance(labelled, (str, bytes, dict, Tensor)):
        raise _unlabelled(f"labelled data of type {type(labelled).__name__}")
    return list(labelled) if iter(labelled) is labelled else labelled


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    pair = tuple(batch.values()) if isinstance(batch, dict) else batch
    if not isinstance(pair, (tuple, list)) or len(pair) < 2:
        raise _unlabelled(f"a batch of type {type(batch).__name__}")
    inputs, labels = pair[0], pair[1]
    if not isinstance(inputs, Tensor) or not isinstance(labels, Tensor) or not labels.dim():
        kinds = f"{type(inputs).__name__} and {type(labels).__name__}"
        raise _unlabelled(f"a batch of {kinds}")
    if labels.is_floating_point() or len(inputs) != len(labels):
        raise _unlabelled(f"{len(inputs)} inputs with {len(labels)} labels of {labels.dtype}")
    return inputs, labels


def _unlabelled(met: str) -> DataError:
    return DataError(
        met,
        where="the labelled data",
        expected="a pair of tensors (inputs, integer labels), or an iterable of such batches",
        do="pass (x, y), or a DataLoader over pairs",
    )
