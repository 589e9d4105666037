"""Every number in the README and on the page of results, from the records of `examples/results/`.

    python docs/figures.py    # writes both from the templates beside this file

The functions look up and round; a template says where a number stands.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = ROOT / "examples/results"


def records(name: str) -> list[dict[str, Any]]:
    """Return the records whose file names start so, in the order of their names."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}*.json"))]
    if not found:
        raise LookupError(f"no record {name}*.json in {RESULTS}")
    return found


def rows_named(name: str, row: str) -> Iterator[dict[str, Any]]:
    """Yield one row of each of some records."""
    for record in records(name):
        rows = [r for r in record["rows"] if r["name"] == row]
        if len(rows) != 1:
            raise LookupError(f"{len(rows)} rows '{row}' in {name}")
        yield rows[0]


def mean(name: str, row: str, key: str = "accuracy", digits: int = 1) -> str:
    """Return the mean of one figure over all records of a name, rounded."""
    values: list[float] = []
    for found in rows_named(name, row):
        values += found[key] if isinstance(found[key], list) else [found[key]]
    return f"{statistics.mean(values):.{digits}f}"


def each(name: str, row: str, key: str = "values", digits: int = 1) -> list[str]:
    """Return every value of a row, of the parents say."""
    (found,) = rows_named(name, row)
    return [f"{value:.{digits}f}" for value in found[key]]


def size(name: str, row: str) -> str:
    """Return the parameters of a network."""
    return f"{next(rows_named(name, row))['parameters']:,}"


def count(name: str) -> int:
    """Return how many records there are: seeds."""
    return len(records(name))


def shown(name: str) -> dict[str, Any]:
    """Return the one record of a name as it is."""
    (record,) = records(name)
    return record


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, figures to the right."""
    rules = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rules, *rows])


def printed(name: str) -> str:
    """Return a table that a command printed, what it is of, and the command."""
    record = shown(f"printed-{name}")
    commands = " and ".join(f"`{command}`" for command in record["commands"])
    about = f"{record['about']} {commands} ({record['state']})."
    return f"{markdown(record['head'], record['rows'])}\n\n{about}"


def measured(name: str) -> str:
    """Return the rows of records of one name, means over seeds or draws, and what they rest on."""
    found = records(name)
    keys = [
        k for k in ("parameters", "multiply_adds", "accuracy", "values") if k in found[0]["rows"][0]
    ]
    heads = {
        "values": "accuracy in %",
        "accuracy": "accuracy in %",
        "multiply_adds": "multiply-adds, millions",
    }
    rows = []
    for row in found[0]["rows"]:
        same = [r for record in found for r in record["rows"] if r["name"] == row["name"]]
        if row["name"] == "parents":
            rows.append(["parents", ", ".join(each(name, "parents"))])
            continue
        rows.append([row["name"], *(cell([r.get(key) for r in same]) for key in keys)])
    versions = ", ".join(f"{k} {v}" for k, v in found[0]["versions"].items())
    kind = found[0].get("kind", "images")
    about = f"{found[0]['test_images']:,} test {kind}, {found[0]['samples']:,} unlabelled ones; "
    about += f"{len(found)} seeds; " if len(found) > 1 else f"{found[0].get('draws', 1)} draws; "
    return f"{markdown(['network', *(heads.get(k, k) for k in keys)], rows)}\n\n{about}{versions}."


def situations(key: str, names: Sequence[str], digits: int = 1) -> str:
    """Return one figure of every preset, a column for each situation of `examples/methods.py`."""
    found = [
        [row for record in records(f"methods-{n}-seed") for row in record["rows"]] for n in names
    ]
    rows = []
    every = dict.fromkeys(r["name"] for column in found for r in column)
    for row in sorted(every, key=lambda name: not name.startswith("parent")):  # these come first
        of_row = [[r[key] for r in column if r["name"] == row and key in r] for column in found]
        if any(of_row):
            rows.append([row, *(f"{statistics.mean(v):.{digits}f}" if v else "" for v in of_row)])
    return markdown(["", *names], rows)


def numbered(name: str, keys: dict[str, str]) -> str:
    """Return figures of the rows of a record for each number of networks, keys with their units."""
    record, columns = shown(name), []
    for key, unit in keys.items():
        columns += [(f"{key} of {n}", f"{unit}, {n} networks") for n in record["counts"]]
    rows = [[r["name"], *(f"{r[key]:.1f}" for key, _ in columns)] for r in record["rows"]]
    return markdown(["", *(head for _, head in columns)], rows)


def tunings(tuning: str) -> str:
    """Return what `examples/siblings.py` found for one kind of tuning, a column a network."""
    found = [r for r in records("siblings-") if r["tuning"] == tuning]
    columns = [{row["name"]: row["values"] for row in record["rows"]} for record in found]
    rows = [[name, *(cell([column[name]]) for column in columns)] for name in columns[0]]
    return markdown([tuning, *(record["network"] for record in found)], rows)


PEER = "Torch-Pruning"
WAYS = {  # of `examples/smaller.py`, and what the page calls them
    "pruned": "dropped",
    "merged": "merged",
    "pruned, refitted": "dropped, refitted",
    "merged, refitted": "merged, refitted",
    PEER: PEER,
}


def smaller() -> str:
    """Return what `examples/smaller.py` found: a row for each importance and share that is left."""
    rows = []
    for record in sorted(records("smaller-"), key=lambda r: -r["to"]):
        found = {(row["scores"], row["way"]): row for row in record["rows"]}
        for scores in dict.fromkeys(key for key, _ in found):
            known = [found.get((scores, way), {}) for way in WAYS]
            cells = [f"{row['accuracy']:.1f}" if row else "" for row in known]
            left = {way: f"{row['left']:.0%}" for way, row in zip(WAYS, known) if row}
            ours = next((share for way, share in left.items() if way != PEER), "")
            named = f"{scores}, {record['to']:.0%}"
            rows.append([named, ours, *cells[:-1], left.get(PEER, ""), cells[-1]])
    shares = ["left", *[WAYS[way] for way in WAYS if way != PEER], "left", PEER]
    return markdown(["scores, allowed", *shares], rows)


def cell(values: Sequence[Any]) -> str:
    """Return the figures of one row, in words.

    Example:
        >>> cell([1234, 1234]), cell([[50.0, 52.0]]), cell([[83.0]]), cell([None])
        ('1,234', '51.0 ± 1.0', '83.0', '')
    """
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    if not flat or flat[0] is None:
        return ""
    if all(isinstance(v, int) for v in flat):
        return f"{flat[0]:,}"
    spread = f" ± {statistics.pstdev(flat):.1f}" if len(flat) > 1 else ""
    return f"{statistics.mean(flat):.1f}{spread}"


def experiments() -> list[tuple[str, str]]:
    """Return title and text of each table that the scripts of the experiments wrote."""
    pages = []
    for path in sorted([*RESULTS.glob("*-cpu.md"), *RESULTS.glob("*-tiny.md")]):
        title, _, text = path.read_text().partition("\n")
        picture = f"(../examples/results/{path.stem}.png)"
        pages.append(
            (title.removeprefix("# "), text.strip().replace(f"({path.stem}.png)", picture))
        )
    return pages


def forward_passes(case: str) -> str:
    """Return how many forward passes of the parents the default took, from `benchmark.py`.

    Args:
        case: The case, images, threads, width and refit, as the script names them.
    """
    runs = {key: run for record in records("speed-") for key, run in record.items()}
    return f"{runs[case]['used'] / runs[case]['forward'][1]:.1f}"


def scaling() -> dict[str, Any]:
    """Return what `scale.py` measured."""
    (record,) = records("scale-")
    return record


PAGES = {
    "README.md.jinja": ROOT / "README.md",
    "results.md.jinja": HERE / "results.md",
    "methods/compared.md.jinja": HERE / "methods/compared.md",
    "methods/intra_fusion.md.jinja": HERE / "methods/intra_fusion.md",
}


def rendered(template: str) -> str:
    """Return a page from its template."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    known = [mean, each, size, count, shown, printed, measured, experiments, situations]
    known += [forward_passes, scaling, tunings, smaller, numbered]
    environment.globals |= {function.__name__: function for function in known}
    return environment.get_template(template).render()


def main() -> None:
    """Write the pages."""
    for template, path in PAGES.items():
        path.write_text(rendered(template))


if __name__ == "__main__":
    main()
