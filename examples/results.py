"""Tables and plots of the records under results/: what was measured, beside the paper's figures.

    python examples/results.py [FOLDER]

A record is one JSON of one seed. Every table says how many seeds its means are of; a cell gives the
mean and the population standard deviation.
"""

from __future__ import annotations

import importlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fxfuse._files import write_atomically, write_text
from fxfuse.errors import DataError

Record = dict[str, Any]
Table = Callable[[Sequence[Record]], str]
Picture = Callable[[Sequence[Record], Path], None]
QUESTIONS = [
    *("headline", "why", "longer", "initialisation", "wider", "many", "transfer"),
    *("teacher_student", "distillation", "cost"),
]

#: Pairs that the paper does not have.
OWN_PAIRS = ("cifar",)

#: Rows to accuracies before and after fine-tuning, by number of classes, as the paper gives them.
Paper = Mapping[int, Mapping[str, tuple[float | None, float | None]]]


def found(values: Sequence[float | None]) -> str:
    """Return mean and deviation of what was measured, in words.

    Example:
        >>> found([1.0, 2.0]), found([3.0]), found([])
        ('1.5 ± 0.5', '3.0', '')
    """
    known = [v for v in values if v is not None]
    if not known:
        return ""
    spread = f" ± {statistics.pstdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


def names_of(records: Sequence[Record]) -> list[str]:
    """Return the rows of records, in the order in which they first appear."""
    return list(dict.fromkeys(row["name"] for record in records for row in record["rows"]))


def cells(records: Sequence[Record], name: str, key: str) -> list[Any]:
    """Return one figure of every row of a name."""
    return [r.get(key) for record in records for r in record["rows"] if r["name"] == name]


def starts(records: Sequence[Record], paper: Paper) -> str:
    """Return the table of starts: accuracy before and after training, and the paper's if any."""
    beside = bool(paper) and records[0]["pair"] not in OWN_PAIRS
    theirs = paper.get(records[0]["data"]["classes"], {})
    head = ["start", "parameters", "before", "after"] + ["paper, before", "paper, after"] * beside
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name in names_of(records):
        size = next((c for c in cells(records, name, "parameters") if c), None)
        row = [name, f"{size:,}" if size else ""]
        row += [found(cells(records, name, key)) for key in ("before", "after")]
        if beside:
            row += ["" if f is None else f"{f:.1f}" for f in theirs.get(name, (None, None))]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def starts_beside(paper: Paper) -> Table:
    """Return the table of starts beside some figures."""
    return partial(starts, paper=paper)


def stated(records: Sequence[Record]) -> str:
    """Return what the figures rest on, in words."""
    one = records[0]
    data, train = one["data"], one["recipes"]["train"]
    epochs = max(len(row.get("epochs", ())) for row in one["rows"])
    files = " and ".join(one.get("parents", ()))
    parents = f"from {files}" if files else f"trained for {train['epochs']} epochs"
    starts = f"every start for {epochs} epoch{'s' * (epochs > 1)}"
    trained = f"; parents {parents}, {starts}" * bool(epochs)
    machine = one["hardware"]
    versions = ", ".join(f"{k} {v}" for k, v in one["versions"].items())
    seconds = sum(record["processor_seconds"] for record in records)
    return (
        f"Pair `{one['pair']}` at scale `{one['scale']}`, "
        f"seeds {', '.join(str(r['seed']) for r in records)}: {'accuracy in % on ' * bool(epochs)}"
        f"{data['test']:,} test images of {data['source']} at {data['size']}x{data['size']}, "
        f"{data['train']:,} training images{trained}. "
        f"{machine['processor']}, accelerator {machine['accelerator']}, {versions}; "
        f"{seconds / 60:.1f} minutes of processor time, less what earlier records had trained."
    )


def groups(folder: Path, question: str) -> dict[str, list[Record]]:
    """Return the records of a question by pair, scale and data, in the order of their seeds."""
    grouped: dict[str, list[Record]] = {}
    for path in sorted(folder.glob(f"{question}-*.json")):
        record = _read(path)
        grouped.setdefault(f"{question}-{record['pair']}-{record['scale']}", []).append(record)
    for records in grouped.values():
        records.sort(key=lambda record: record["seed"])
        # Figures on other images, from other parents or recipes do not belong into one mean.
        records[:] = [r for r in records if _basis(r) == _basis(records[0])]
    return grouped


def _basis(record: Record) -> tuple[Any, ...]:
    return record["data"]["sha256"], record.get("parents", []), record.get("recipes")


def _read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text())
        _ = [record[key] for key in ("pair", "scale", "seed", "rows", "data")]
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"a file that is no record: {error}",
            where=str(path),
            expected="what a script of the experiments wrote",
            do="remove it; the script writes it again",
        ) from error


def plain(name: str) -> str:
    """Return the name of a row as it stands in a picture."""
    return name.replace("`", "")


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw accuracy against epochs from each start, means over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    if any(len(cells([records[0]], name, "name")) > 1 for name in names_of(records)):
        axes.set_title("mean of all settings of each start", fontsize="medium")
    dashes = itertools.cycle(["--", ":", "-."])
    for name in names_of(records):
        rows = [r for record in records for r in record["rows"] if r["name"] == name]
        curves = [[r["before"], *(e["test"] for e in r["epochs"])] for r in rows if r.get("epochs")]
        if curves:
            means = [statistics.mean(at) for at in zip(*curves)]
            axes.plot(range(len(means)), means, marker="o", markersize=3, label=plain(name))
        elif rows and rows[0].get("before") is not None:
            level = statistics.mean(r["before"] for r in rows)
            axes.axhline(level, linestyle=next(dashes), color="grey", label=plain(name))
    axes.set(xlabel="epochs after the start", ylabel="test accuracy in %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
    pyplot.close(figure)


def render(
    folder: Path,
    question: str,
    title: str,
    table: Table,
    picture: Picture = draw,
) -> list[Path]:
    """Write a table, and where runs have epochs a picture, for every group of records."""
    written = []
    for name, records in groups(folder, question).items():
        curves = any(row.get("epochs") for record in records for row in record["rows"])
        lines = [f"# {title}", stated(records), table(records)]
        if curves:
            picture(records, folder / f"{name}.png")
            lines.append(f"![{title}]({name}.png)")
            written.append(folder / f"{name}.png")
        write_text(folder / f"{name}.md", "\n\n".join(lines) + "\n")
        written.append(folder / f"{name}.md")
    return written


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"
    for name in QUESTIONS:
        asked = importlib.import_module(name).QUESTION
        for path in render(folder, asked.name, asked.title, asked.table, asked.picture):
            print(path)


if __name__ == "__main__":
    main()
