"""Is a fused network a better start than its parents? Tables 1, 14 and 12 of the CLAFusion paper.

ResNet-34 (A) and ResNet-18 (B), fused in one shot and fine-tuned, beside A, B, B made as deep as A,
and random weights; the paper's method along four maps of the layers. See experiment.py for options.

    python examples/initialisation.py [--pairs resnet resnet-plain] [--scale tiny]
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from experiment import FEW, MANY, Lab, Question, main, row
from results import starts_beside

import fxfuse
from fxfuse import presets
from fxfuse.alignment import Random, same_index
from fxfuse.alignment.aligners import Monotone

PAPER = {  # tables 1 and 12, means of five seeds
    10: {
        "ensemble of A and B": (93.81, None),
        "A": (93.31, 93.52),
        "B": (92.92, 93.29),
        "`clafusion`": (65.72, 93.67),
        "`clafusion`, same index": (62.43, 93.59),
        "`clafusion`, random maps": (64.04, 93.61),
        "`clafusion`, last layers free": (65.58, 93.60),
        "B, as deep as A": (92.92, 93.24),
        "random": (None, 92.00),
    },
    100: {
        "ensemble of A and B": (68.49, None),
        "A": (65.93, 66.87),
        "B": (65.33, 66.19),
        "`clafusion`": (27.93, 67.59),
        "B, as deep as A": (65.33, 66.48),
        "random": (None, 64.59),
    },
    200: {
        "ensemble of A and B": (58.70, None),
        "A": (54.84, 55.17),
        "B": (53.29, 53.81),
        "`clafusion`": (17.19, 55.46),
        "B, as deep as A": (53.29, 53.94),
        "random": (None, 54.16),
    },
}


def rows(lab: Lab) -> list[dict[str, Any]]:
    """Train the parents, fuse, and fine-tune from every start."""
    a, b = lab.first.network, lab.second.network
    both = [{"name": "ensemble of A and B", "before": lab.ensemble([a, b])}]
    starts = {
        "A": a,
        "B": b,
        "`best`": lab.fuse(presets.best, [a, b], MANY),
        '`best`, `weights="auto"`': lab.fuse(presets.best, [a, b], MANY, weights="auto"),
        "`clafusion`": lab.fuse(presets.clafusion, [a, b]),
        "`clafusion`, same index": _along(lab, same_index),
        "`clafusion`, last layers free": _along(lab, Monotone(last=False)),
        "B, as deep as A": fxfuse.net2deeper(b, a, lab.inputs(FEW).cpu()),
        "random": lab.untrained(0, 100 + lab.seed),
    }
    found = [row(name, lab.tune(name, start)) for name, start in starts.items()]
    return both + found + [_random_maps(lab)]


def _along(lab: Lab, aligner: Any) -> Any:
    method = replace(presets.clafusion, aligner=aligner)
    return lab.fuse(method, [lab.first.network, lab.second.network])


def _random_maps(lab: Lab) -> dict[str, Any]:
    """Return the mean over several random maps; the curve is that of the first."""
    name = "`clafusion`, random maps"
    draws = [Random(seed=lab.scale.maps * lab.seed + i) for i in range(lab.scale.maps)]
    runs = [lab.tune(f"{name} {i}", _along(lab, draw)) for i, draw in enumerate(draws)]
    means = {k: statistics.mean(getattr(run, k) for run in runs) for k in ("before", "after")}
    return row(name, runs[0], **means, maps=len(runs))


QUESTION = Question(
    "initialisation",
    ["resnet", "resnet-plain"],
    rows,
    "What to start from: parents, fused networks, depth-aligned B, random weights",
    starts_beside(PAPER),
)

if __name__ == "__main__":
    main(QUESTION)
