"""What should a wider network start from? Two trained ones fused with room, or one made wider.

ResNet-34 (A) and ResNet-18 (B), fused into a network that may cost what A costs with all its layers
1.5 times as wide; beside it A in the same widths, its units duplicated (Chen et al., Net2Net: the
same function, with a little noise so that training can tell copies apart).

    python examples/wider.py [--pairs resnet resnet-plain] [--scale tiny]
"""

from __future__ import annotations

from typing import Any

from experiment import FEW, MANY, Lab, Question, main, row
from results import starts_beside
from torch import nn

import fxfuse
from fxfuse import presets

WIDTH, NOISE = 1.5, 0.01


def starts(lab: Lab) -> dict[str, nn.Module]:
    """Return the parents, the two fused, and A in the widths of what is fused with room."""
    a, b = lab.first.network, lab.second.network
    wide = lab.fuse(presets.best, [a, b], MANY, width=WIDTH)
    inputs = lab.inputs(FEW).cpu()
    return {
        "A": a,
        "B": b,
        "`best`": lab.fuse(presets.best, [a, b], MANY),
        f"`best`, `width={WIDTH}`": wide,
        "A, as wide": fxfuse.net2wider(a, inputs, like=wide, noise=NOISE, seed=lab.seed),
    }


def rows(lab: Lab) -> list[dict[str, Any]]:
    """Train the parents, fuse them with room, and fine-tune from every start."""
    both = lab.ensemble([lab.first.network, lab.second.network])
    found = [row(name, lab.tune(name, start)) for name, start in starts(lab).items()]
    return [{"name": "ensemble of A and B", "before": both}, *found]


QUESTION = Question(
    "wider",
    ["resnet", "resnet-plain"],
    rows,
    "What a wider network starts from: two networks fused with room, one made wider",
    starts_beside({}),
)

if __name__ == "__main__":
    main(QUESTION)
