"""What parents, fused network and ensemble cost: tables 20 and 21 of the CLAFusion paper.

Parameters, seconds for all test images, seconds per epoch of fine-tuning and of distillation;
medians of three, of the device that runs it.

    python examples/cost.py [--pairs resnet-plain vgg resnet-half] [--scale tiny]
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from experiment import Ensemble, Lab, Question, main
from harness import Teacher
from results import Record, cells, names_of
from torch import nn

from fxfuse import presets

REPEATS = 3
PAPER = {  # tables 20 and 21, on CIFAR-10 and its hardware: millions of parameters and seconds
    "resnet-plain": {
        "A": "21 M, 1.78 s",
        "B": "11 M, 1.08 s",
        "fused": "21 M, 1.78 s",
        "ensemble of 2": "32 M, 2.72 s",
        "ensemble of 4": "64 M, 5.30 s",
        "ensemble of 6": "96 M, 7.88 s",
    },
    "vgg": {
        "A": "33 M; epoch 11.14 s",
        "B": "3 M; epoch 7.40 s, distilled 12.22 s",
        "fused": "3 M; epoch 7.48 s, distilled 13.86 s",
    },
    "resnet-half": {
        "A": "21 M; epoch 31.73 s",
        "B": "3 M; epoch 7.50 s, distilled 36.39 s",
        "fused": "5 M; epoch 12.05 s, distilled 41.36 s",
    },
}


def rows(lab: Lab) -> list[dict[str, Any]]:
    """Time every network; weights do not matter for it, so none are trained."""
    torch.manual_seed(lab.seed)
    a, b = (lab.untrained(which, lab.seed).eval() for which in (0, 1))
    fused = lab.fuse(presets.clafusion, [a, b], 16)
    nets = {"A": a, "B": b, "fused": fused}
    ensembles = {f"ensemble of {2 * k}": Ensemble([a, b] * k) for k in (1, 2, 3)}
    found = []
    for name, net in (nets | ensembles).items():
        size = sum(p.numel() for m in _members(net) for p in m.parameters())
        line = {"name": name, "parameters": size, "inference": _inference(lab, net)}
        if name in nets:
            line["tune"] = _epoch(lab, net)
            line["distil"] = None if name == "A" else _epoch(lab, net, Teacher(a, 4, 0.5))
        found.append(line)
    return found


def _members(net: nn.Module) -> Sequence[nn.Module]:
    return list(net.networks) if isinstance(net, Ensemble) else [net]


def _inference(lab: Lab, net: nn.Module) -> float:
    moved = copy.deepcopy(net).to(lab.trainer.accelerator.device)
    return _median(lambda: lab.trainer.accuracy(moved, lab.data.test))


def _epoch(lab: Lab, net: nn.Module, teacher: Teacher | None = None) -> float:
    """Return the seconds of one epoch."""
    recipe = replace(lab.scale.tune[lab.pair.recipe], epochs=REPEATS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = replace(lab.trainer, folder=Path(folder))
        run = trainer.fit("one epoch", net, recipe, lab.seed, teacher)
    return statistics.median(epoch["seconds"] for epoch in run.epochs)


def _median(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def table(records: Sequence[Record]) -> str:
    """Return networks against what they cost."""
    lines = ["| network | parameters | inference, s | epoch, s | epoch distilling, s | paper |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
    for name in names_of(records):
        row = [name, f"{cells(records, name, 'parameters')[0]:,}"]
        for key in ("inference", "tune", "distil"):
            known = [v for v in cells(records, name, key) if v is not None]
            row.append(f"{statistics.mean(known):.3g}" if known else "")
        row.append(PAPER.get(records[0]["pair"], {}).get(name, ""))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


QUESTION = Question(
    "cost",
    ["resnet-plain", "vgg", "resnet-half"],
    rows,
    "What the networks cost",
    table,
)

if __name__ == "__main__":
    main(QUESTION)
