"""Distillation from five starts: tables 5 and 19 of the CLAFusion paper.

The teacher (A) is distilled into students that start from the student (B), from B as deep as A,
from fused networks and from random weights. The share of the distillation loss is chosen for each
start and temperature on training images held out; the accuracy is that on the test images.

    python examples/distillation.py [--pairs vgg] [--scale tiny]
"""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from experiment import Lab, Question, main, row
from harness import Teacher
from results import Record, found
from teacher_student import students
from torch import nn

STARTS = {  # row of the starts -> column of the table
    "B, the student": "B",
    "`best`": "`best`",
    "`clafusion`": "`clafusion`",
    "B, as deep as A": "B, as deep as A",
}
PAPER = {  # tables 5 and 19: best over temperatures, then mean over them
    10: {
        "random B": (89.10, 88.41),
        "B": (90.98, 90.73),
        "`clafusion`": (91.43, 91.16),
        "B, as deep as A": (91.24, 91.09),
        "random fused architecture": (88.84, 88.10),
    },
    100: {
        "random B": (63.99, 62.85),
        "B": (66.20, 65.26),
        "`clafusion`": (66.79, 65.92),
        "B, as deep as A": (66.31, 65.38),
        "random fused architecture": (64.84, 63.73),
    },
}


def rows(lab: Lab) -> list[dict[str, Any]]:
    """Distil into every start at every temperature and share."""
    fresh = students(lab)
    starts: dict[str, nn.Module] = {"random B": lab.untrained(1, 100 + lab.seed)}
    starts |= {column: fresh[name] for name, column in STARTS.items()}
    starts["random fused architecture"] = _random_like(fresh["`best`"], lab.seed)
    found = []
    for name, start in starts.items():
        for temperature in lab.scale.temperatures:
            for share in lab.scale.shares:
                teacher = Teacher(lab.first.network, temperature, share)
                run = lab.distil(f"{name}, T {temperature:g}, {share:g}", start, teacher)
                more = {
                    "temperature": temperature,
                    "share": share,
                    "valid": run.epochs[-1]["valid"],
                }
                found.append(row(name, run, **more))
    return found


def _random_like(network: nn.Module, seed: int) -> nn.Module:
    """Return a copy with weights drawn as those of a fresh network are."""
    drawn = copy.deepcopy(network)
    torch.manual_seed(seed)
    for module in drawn.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
    return drawn


def chosen(record: Record, name: str, temperature: float | None = None) -> dict[str, Any]:
    """Return the run of a start that is best on the images held out, at one temperature or any."""
    runs = [r for r in record["rows"] if r["name"] == name]
    if temperature is not None:
        runs = [r for r in runs if r["temperature"] == temperature]
    return max(runs, key=lambda r: r["valid"])


def table(records: Sequence[Record]) -> str:
    """Return temperatures against starts."""
    names = list(dict.fromkeys(r["name"] for r in records[0]["rows"]))
    temperatures = list(dict.fromkeys(r["temperature"] for r in records[0]["rows"]))
    lines = [f"| temperature | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for t in temperatures:
        picks = {n: [chosen(record, n, t) for record in records] for n in names}
        row = [_cell(picks[n]) for n in names]
        lines.append(f"| {t:g} | {' | '.join(row)} |")
    best = [found([chosen(record, n)["after"] for record in records]) for n in names]
    means = [
        found([statistics.mean(chosen(r, n, t)["after"] for t in temperatures) for r in records])
        for n in names
    ]
    before = [found([chosen(record, n)["before"] for record in records]) for n in names]
    theirs = PAPER.get(records[0]["data"]["classes"], {})
    paper = [[f"{theirs[n][i]:.1f}" if n in theirs else "" for n in names] for i in (0, 1)]
    for label, row in (
        ("any", best),
        ("mean over temperatures", means),
        ("before distillation", before),
        ("paper, any", paper[0]),
        ("paper, mean", paper[1]),
    ):
        lines.append(f"| {label} | {' | '.join(row)} |")
    lines += ["", "In brackets: the share of the distillation loss that was chosen most often."]
    return "\n".join(lines)


def _cell(picks: Sequence[dict[str, Any]]) -> str:
    share = Counter(p["share"] for p in picks).most_common(1)[0][0]
    return f"{found([p['after'] for p in picks])} ({share:g})"


QUESTION = Question("distillation", ["vgg"], rows, "Distilling the teacher from five starts", table)

if __name__ == "__main__":
    main(QUESTION)
