"""Heterogeneous model transfer: tables 3 and 17 of the CLAFusion paper.

ResNet-18's (B) weights in ResNet-34's (A) layers, alone or fused with A afterwards, along the
longest chain or along the cross-layer alignment; beside them the default of `fuse`.

    python examples/transfer.py [--pairs resnet-plain] [--scale tiny]
"""

from __future__ import annotations

from typing import Any

from experiment import FEW, MANY, Lab, Question, main, row
from results import starts_beside

from fxfuse import presets
from fxfuse.presets import Transfer

METHODS = {
    "HMT": (presets.hmt, FEW),
    "HMT + average": (Transfer(then=presets.average), FEW),
    "HMT + OTFusion": (Transfer(then=presets.otfusion), FEW),
    "HMT + alignment + OTFusion": (Transfer(aligned=True, then=presets.otfusion), FEW),
    "HMT + alignment + `best`": (Transfer(aligned=True, then=presets.best), MANY),
    "`best`": (presets.best, MANY),
}
PAPER = {  # table 3; A from table 1
    10: {
        "A": (93.31, 93.52),
        "HMT": (10.79, 93.10),
        "HMT + average": (37.49, 93.38),
        "HMT + OTFusion": (18.32, 93.66),
        "HMT + alignment + OTFusion": (61.29, 93.86),
    },
    100: {
        "A": (65.93, 66.87),
        "HMT": (2.70, 65.15),
        "HMT + average": (10.79, 66.42),
        "HMT + OTFusion": (5.14, 67.23),
        "HMT + alignment + OTFusion": (12.56, 67.83),
    },
}


def rows(lab: Lab) -> list[dict[str, Any]]:
    """Transfer B into A in every way, and fine-tune."""
    nets = lab.first.network, lab.second.network
    found = [row("A", lab.tune("A", nets[0]))]
    for name, (method, samples) in METHODS.items():
        found.append(row(name, lab.tune(name, lab.fuse(method, nets, samples))))
    return found


QUESTION = Question(
    "transfer",
    ["resnet-plain"],
    rows,
    "One network's weights in another's layers",
    starts_beside(PAPER),
)

if __name__ == "__main__":
    main(QUESTION)
