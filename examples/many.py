"""More than two networks: tables 2, 15 and 16 of the CLAFusion paper.

Four and six networks, alternately ResNet-34 (A) and ResNet-18 (B), fused in one shot and fine-tuned
beside the first of them. The networks of seed s are those of seeds s, s + 1 and s + 2 of the
parents; with three seeds, the six networks are the same each time and another comes first.

    python examples/many.py [--pairs resnet-plain] [--scale tiny] [--seeds 0 1 2]
"""

from __future__ import annotations

from typing import Any

from experiment import MANY, Lab, Question, main, row
from results import starts_beside

from fxfuse import presets

POOL = 3  # seeds of parents
PAPER = {  # tables 2, 15 and 16: A and B are the first two of them
    10: {
        "A": (93.31, 93.52),
        "B": (92.92, 93.29),
        "ensemble of 4": (94.17, None),
        "`clafusion` of 4": (31.76, 93.76),
        "ensemble of 6": (94.22, None),
        "`clafusion` of 6": (23.75, 93.78),
    },
    100: {
        "A": (65.93, 66.87),
        "B": (65.33, 66.19),
        "ensemble of 4": (70.27, None),
        "`clafusion` of 4": (8.47, 68.92),
        "ensemble of 6": (70.62, None),
        "`clafusion` of 6": (4.39, 69.40),
    },
    200: {
        "A": (54.84, 55.17),
        "B": (53.29, 53.81),
        "ensemble of 4": (61.28, None),
        "`clafusion` of 4": (4.05, 56.07),
        "ensemble of 6": (62.32, None),
        "`clafusion` of 6": (2.47, 56.47),
    },
}


def rows(lab: Lab) -> list[dict[str, Any]]:
    """Train the parents, fuse four and six of them, and fine-tune."""
    found = [
        row("A", lab.tune("A", lab.first.network)),
        row("B", lab.tune("B", lab.second.network)),
    ]
    seeds = [(lab.seed + i) % POOL if lab.seed < POOL else lab.seed + i for i in range(3)]
    for pairs in (2, 3):
        nets = [lab.parent(which, seed).network for seed in seeds[:pairs] for which in (0, 1)]
        of = f"of {len(nets)}"
        found.append({"name": f"ensemble {of}", "before": lab.ensemble(nets)})
        fused = {
            f"`best` {of}": lab.fuse(presets.best, nets, MANY),
            f'`best` {of}, `weights="auto"`': lab.fuse(presets.best, nets, MANY, weights="auto"),
            f"`clafusion` {of}": lab.fuse(presets.clafusion, nets),
        }
        found += [row(name, lab.tune(name, start)) for name, start in fused.items()]
    return found


QUESTION = Question(
    "many",
    ["resnet-plain"],
    rows,
    "Four and six networks in one",
    starts_beside(PAPER),
)

if __name__ == "__main__":
    main(QUESTION)
