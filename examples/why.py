"""Why does one start end better than another? What headline.py's runs did along training.

How far each network is from A, in weights and in function, and how often it agrees with each
parent, on images that nothing was trained on; and the loss there on the straight line from a start
to where it ended. Norms get statistics of their own at each point of the line.

    python examples/why.py [--pairs resnet14 resnet14-plain] [--scale cpu]
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from experiment import FEW, Lab, Question, main, row
from headline import PROBED, runs
from results import Record, cells, found, names_of, plain
from torch import Tensor, nn

from fxfuse._files import write_atomically

POINTS = 11
MEASURED = {  # key of a row -> words
    "weights_a": "distance from A's weights",
    "kl_a": "KL from A",
    "agree_a": "agrees with A, %",
    "agree_b": "agrees with B, %",
}


def rows(lab: Lab) -> list[dict[str, Any]]:
    """Return what was measured along training, with the losses on the lines."""
    return [
        row(name, run, line=_line(lab, start, run.network))
        for name, (start, run) in runs(lab).items()
    ]


@torch.no_grad()
def _line(lab: Lab, start: nn.Module, end: nn.Module) -> list[float]:
    """Return the loss at equal steps from one network to another, on images held out."""
    held = lab.data.valid.part(torch.arange(min(PROBED, len(lab.data.valid))))
    inputs, between = lab.data.inputs(held.images), copy.deepcopy(start)
    losses = []
    for step in range(POINTS):
        share = step / (POINTS - 1)
        ends = zip(between.parameters(), start.parameters(), end.parameters())
        for weight, first, last in ends:
            weight.copy_(torch.lerp(first, last, share))
        with_own_statistics(between, lab.inputs(FEW * 5).cpu())
        losses.append(round(float(F.cross_entropy(between(inputs), held.labels)), 4))
    return losses


@torch.no_grad()
def with_own_statistics(network: nn.Module, inputs: Tensor) -> nn.Module:
    """Measure the statistics of a network's norms anew, in place; return it in eval mode."""
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches
            module.train()
    network(inputs)
    return network.eval()


def height(line: Sequence[float]) -> float:
    """Return how far a line's losses rise above the straight line of its ends.

    Example:
        >>> height([1.0, 3.0, 2.0])
        1.5
    """
    share = [i / (len(line) - 1) for i in range(len(line))]
    return max(loss - (1 - t) * line[0] - t * line[-1] for loss, t in zip(line, share))


def table(records: Sequence[Record]) -> str:
    """Return each start before -> after training, and the height of the loss between."""
    head = ["start", *MEASURED.values(), "loss between the two, above", "accuracy after"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name in names_of(records):
        ends = cells(records, name, "start"), [e[-1] for e in cells(records, name, "epochs")]
        cell = [_moved(*ends, key) for key in MEASURED]
        heights = [height(line) for line in cells(records, name, "line")]
        cell += [f"{statistics.mean(heights):.3f}", found(cells(records, name, "after"))]
        lines.append(f"| {name} | {' | '.join(cell)} |")
    return "\n".join(lines)


def _moved(before: Sequence[dict], after: Sequence[dict], key: str) -> str:
    """Return means of one figure, before -> after; nothing where it has none."""
    if any(key not in one for one in (*before, *after)):
        return ""
    digits = 1 if key.startswith("agree") else 2
    means = [statistics.mean(one[key] for one in side) for side in (before, after)]
    return " -> ".join(f"{mean:.{digits}f}" for mean in means)


def picture(records: Sequence[Record], path: Path) -> None:
    """Draw what was measured against epochs, and the losses on the lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    panels = dict(zip(MEASURED, grid.flat))
    markers = itertools.cycle("os^vD*PX<>")
    for name in names_of(records):
        rows = [r for record in records for r in record["rows"] if r["name"] == name]
        marker = {"marker": next(markers), "markersize": 4}
        for key, axes in panels.items():
            curves = [[r["start"].get(key), *(e.get(key) for e in r["epochs"])] for r in rows]
            axes.plot(*_mean_curve(curves), label=plain(name), **marker)
        lines = _mean_curve([r["line"] for r in rows])[1]
        grid.flat[4].plot([i / (POINTS - 1) for i in range(len(lines))], lines, **marker)
    for key, axes in panels.items():
        axes.set(xlabel="epochs after the start", ylabel=MEASURED[key])
        axes.grid(alpha=0.3)
    grid.flat[4].set(xlabel="share of the way from start to end", ylabel="loss", yscale="log")
    grid.flat[4].grid(alpha=0.3)
    grid.flat[5].axis("off")
    grid.flat[5].legend(*grid.flat[1].get_legend_handles_labels(), loc="center")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=100))
    pyplot.close(figure)


def _mean_curve(curves: Sequence[Sequence[float | None]]) -> tuple[list[int], list[float]]:
    """Return steps and means of curves; nothing where any has a hole."""
    if any(value is None for curve in curves for value in curve):
        return [], []
    means = [statistics.mean(at) for at in zip(*curves)]
    return list(range(len(means))), means


QUESTION = Question(
    "why",
    ["resnet14", "resnet14-plain"],
    rows,
    "Where each start goes along training",
    table,
    picture,
)

if __name__ == "__main__":
    main(QUESTION)
