"""How much training closes the gap between starts? A question that the papers do not ask.

The starts of headline.py, each trained on for several times as long by the same schedule stretched:
60 epochs at scale `cpu`.

    python examples/longer.py [--pairs resnet14] [--scale cpu]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiment import Lab, Question, main, row
from headline import starts
from results import Record, cells, found, names_of

SHARES = (1 / 60, 1 / 20, 1 / 10, 1 / 4, 1 / 2, 1)  # of the run, at which accuracies are shown


def rows(lab: Lab) -> list[dict[str, Any]]:
    """Train on from every start, long."""
    both = lab.ensemble([lab.first.network, lab.second.network])
    found = [row(name, lab.tune_long(name, make())) for name, make in starts(lab).items()]
    return [{"name": "ensemble of A and B", "before": both}, *found]


def table(records: Sequence[Record]) -> str:
    """Return accuracies after some of the epochs, for every start."""
    epochs = max(len(row.get("epochs", ())) for row in records[0]["rows"])
    at = sorted({max(1, round(share * epochs)) for share in SHARES})
    lines = [f"| start | before | {' | '.join(f'epoch {n}' for n in at)} |"]
    lines.append("| --- |" + " ---: |" * (len(at) + 1))
    for name in names_of(records):
        curves = [c for c in cells(records, name, "epochs") if c]
        after = [found([curve[n - 1]["test"] for curve in curves]) for n in at]
        before = found(cells(records, name, "before"))
        lines.append(f"| {name} | {before} | {' | '.join(after)} |")
    return "\n".join(lines)


QUESTION = Question(
    "longer", ["resnet14"], rows, "How much training closes the gap between starts", table
)

if __name__ == "__main__":
    main(QUESTION)
