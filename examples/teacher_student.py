"""Teacher and student: tables 4, 18 and 11 of the CLAFusion paper.

A wide, deep teacher (A) fused into its student (B): the result has the student's widths and the
teacher's depth. For the VGG pair also the ablation of its map: the layers of A that B's first two
meet, counted from 1, where table 11 has six; `[1, 2]` and `[3, 4]` pair layers on different sides
of a max-pool, which would move the pool and so change the student's function: they are refused.

    python examples/teacher_student.py [--pairs vgg resnet-half] [--scale tiny]
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiment import FEW, MANY, PAIRS, Lab, Question, main, row
from results import starts_beside
from torch import nn

import fxfuse
from fxfuse import presets
from fxfuse.depth import Deepen

MAPS = ([1, 4], [2, 3], [2, 4])  # beside [1, 3], which the alignment finds
PAPER = {  # tables 18 (means of five seeds) and 11
    10: {
        "ensemble of A and B": (92.68, None),
        "A, the teacher": (92.65, 92.63),
        "B, the student": (89.72, 89.77),
        "`clafusion`": (82.03, 90.64),
        "B, as deep as A": (89.72, 90.52),
        "`clafusion` along [1, 4]": (79.37, 90.37),
        "`clafusion` along [2, 3]": (46.64, 89.32),
        "`clafusion` along [2, 4]": (49.63, 89.03),
    },
    100: {
        "ensemble of A and B": (67.17, None),
        "A, the teacher": (65.93, 66.87),
        "B, the student": (61.53, 62.77),
        "`clafusion`": (28.47, 64.45),
        "B, as deep as A": (61.53, 62.95),
    },
}


def students(lab: Lab) -> dict[str, nn.Module]:
    """Return every start of the student's widths."""
    teacher, student = lab.first.network, lab.second.network
    return {
        "B, the student": student,
        "`best`": lab.fuse(presets.best, [student, teacher], MANY, anchor=0),
        '`best`, `weights="auto"`': lab.fuse(
            presets.best, [student, teacher], MANY, anchor=0, weights="auto"
        ),
        "`clafusion`": lab.fuse(presets.clafusion, [student, teacher]),
        "B, as deep as A": fxfuse.net2deeper(student, teacher, lab.inputs(FEW).cpu()),
    }


def rows(lab: Lab) -> list[dict[str, Any]]:
    """Fuse teacher and student, and fine-tune."""
    nets = [lab.first.network, lab.second.network]
    found = [{"name": "ensemble of A and B", "before": lab.ensemble(nets)}]
    found.append(row("A, the teacher", lab.tune("A, the teacher", nets[0])))
    starts = students(lab)
    if lab.pair is PAIRS["vgg"]:
        starts |= {f"`clafusion` along {m}": _along(lab, m) for m in MAPS}
    return found + [row(name, lab.tune(name, start)) for name, start in starts.items()]


def _along(lab: Lab, layers: list[int]) -> nn.Module:
    """Fuse with B's first two layers on some of A's."""
    teacher, student = lab.first.network, lab.second.network
    data = lab.inputs(FEW).cpu()
    convs = [
        [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)]
        for net in (teacher, student)
    ]
    by_hand = [[(convs[0][layer - 1], convs[1][i])] for i, layer in enumerate(layers)]
    alignment = fxfuse.align([teacher, student], data, pairs=by_hand)
    # Unmatched first layers get an identity in front of a ReLU, as the paper has it: not exact.
    rough = replace(presets.clafusion, balancing=Deepen(approximate=True))
    return rough([teacher, student], data, alignment=alignment)


QUESTION = Question(
    "teacher_student",
    ["vgg", "resnet-half"],
    rows,
    "A teacher in its student's widths",
    starts_beside(PAPER),
)

if __name__ == "__main__":
    main(QUESTION)
