"""What the command line shows: tables and progress on a terminal, plain text elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..alignment.inspection import Inspection, described, shortened
from ..ir import Alignment


@contextmanager
def stages(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Show the stages of a long job as bars with the time each took, on a terminal only.

    Yields:
        What to call with a stage's name and the share of it that is done. A bar pulses until its
        first share above zero, as until then nobody knows how far the stage is.
    """
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        current: dict[str, TaskID] = {}  # the stage that runs, once there is one

        def report(stage: str, share: float) -> None:
            if stage not in current:
                _finish(bars, current)
                current[stage] = bars.add_task(stage, total=None)
            if share > 0:
                bars.update(current[stage], total=1.0, completed=share)

        yield report
        _finish(bars, current)


def _finish(bars: Progress, current: dict[str, TaskID]) -> None:
    for task in current.values():
        bars.update(task, total=1.0, completed=1.0)
    current.clear()


def show_inspection(console: Console, inspection: Inspection) -> None:
    """Print what the analysis finds in a network."""
    if not console.is_terminal:
        _plain(console, str(inspection))
        return
    console.print(inspection.summary, style="bold", markup=False, highlight=False)
    console.print("chain: " + " > ".join(inspection.chain), markup=False, highlight=False)
    layers = _table("layers", "layer", "units", "kind", "form")
    for segment in inspection.segments:
        layers.add_section()
        _row(layers, segment.label, style="dim")
        for layer in segment.layers:
            kind, form = inspection.kinds[layer.kind], "block" if layer.branched else "layer"
            _row(layers, layer.name, f"{layer.width:,}", str(kind), form)
    kinds = _table("kinds of layers", "kind", "made of")
    for name, number in inspection.kinds.items():
        _row(kinds, str(number), shortened(name))
    spaces = _table("spaces", "space", "units", "axes", "in blocks of")
    for space in inspection.spaces:
        axes, parent = str(len(space.axes)), space.parent or ""
        _row(spaces, space.name, f"{space.size:,}", axes, parent)
    fixed = _table("fixed", "units", "why")
    for reason, places in inspection.reasons.items():
        _row(fixed, described(places), reason)
    for table in (layers, kinds, spaces, fixed):
        if table.row_count:
            console.print(table)


def show_alignment(console: Console, alignment: Alignment) -> None:
    """Print which layers correspond."""
    if not console.is_terminal:
        _plain(console, str(alignment))
        return
    table = _table("alignment", *alignment.names, "cost")
    for segment in alignment.segments:
        table.add_section()
        _row(table, segment.label, style="dim")
        others = [k for k in range(len(segment.slots)) if k != segment.reference]
        for i in range(len(segment.slots[0])):
            costs = [segment.cost_of(k, i) for k in others]
            shown = " ".join("" if cost is None else f"{cost:.4f}" for cost in costs)
            _row(table, *(row[i] or "+" for row in segment.slots), shown)
    console.print(table)
    console.print("+ is a layer to be inserted")


def show_scores(console: Console, scores: Mapping[str, tuple[float, float]]) -> None:
    """Print accuracy and loss of each network."""
    width = max(map(len, scores))
    if not console.is_terminal:
        for name, (accuracy, loss) in scores.items():
            _plain(console, f"{name:{width}}  {accuracy:6.2f} %  loss {loss:.4f}")
        return
    table = _table("on the samples it was fused on", "network", "accuracy", "loss")
    for name, (accuracy, loss) in scores.items():
        _row(table, name, f"{accuracy:.2f} %", f"{loss:.4f}")
    console.print(table)


def _plain(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _row(table: Table, *cells: str, style: str | None = None) -> None:
    table.add_row(*map(Text, cells), style=style)  # names may have brackets: no markup


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        right = column in ("units", "axes", "cost", "accuracy", "loss") and title != "fixed"
        table.add_column(Text(column), justify="right" if right else "left", overflow="fold")
    return table
