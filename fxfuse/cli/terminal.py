"""What the command line shows: tables where somebody looks, plain text elsewhere, and progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..alignment.inspection import Inspection, described, shortened
from ..ir import Alignment


@contextmanager
def stages(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Show the stages of a long job as bars, with the time each took; nothing off a terminal.

    Yields:
        What to call with a stage's name and the share of it that is done. As long as that is zero,
        the bar pulses: the stage runs, and how far it is is not known.
    """
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        current: dict[str, TaskID] = {}

        def report(stage: str, share: float) -> None:
            if stage not in current:
                _finish(bar, current)
                current[stage] = bar.add_task(stage, total=None)
            if share > 0:
                bar.update(current[stage], total=1.0, completed=share)

        yield report
        _finish(bar, current)


def _finish(bar: Progress, current: dict[str, TaskID]) -> None:
    for task in current.values():
        bar.update(task, total=1.0, completed=1.0)
    current.clear()


def show_inspection(console: Console, found: Inspection) -> None:
    """Print what was found in a network."""
    if not console.is_terminal:
        _plain(console, str(found))
        return
    console.print(found.summary, style="bold", markup=False, highlight=False)
    console.print("chain: " + " > ".join(found.chain), markup=False, highlight=False)
    layers = _table("layers", "layer", "units", "kind", "form")
    for segment in found.segments:
        layers.add_section()
        _row(layers, segment.label, style="dim")
        for x in segment.layers:
            form = "block" if x.branched else "layer"
            _row(layers, x.name, f"{x.width:,}", str(found.kinds[x.kind]), form)
    kinds = _table("kinds of layers", "kind", "made of")
    for kind, i in found.kinds.items():
        _row(kinds, str(i), shortened(kind))
    spaces = _table("spaces", "space", "units", "axes", "in blocks of")
    for s in found.spaces:
        _row(spaces, s.name, f"{s.size:,}", str(len(s.axes)), s.parent or "")
    fixed = _table("fixed", "units", "why")
    for reason, group in found.reasons.items():
        _row(fixed, described(group), reason)
    for table in (layers, kinds, spaces, fixed):
        if table.row_count:
            console.print(table)


def show_alignment(console: Console, alignment: Alignment) -> None:
    """Print which layers correspond."""
    if not console.is_terminal:
        _plain(console, str(alignment))
        return
    table = _table("alignment", *alignment.names, "cost")
    for s in alignment.segments:
        table.add_section()
        _row(table, s.label, style="dim")
        for i in range(len(s.slots[0])):
            costs = [s.cost_of(k, i) for k in range(len(s.slots)) if k != s.reference]
            shown = " ".join("" if c is None else f"{c:.4f}" for c in costs)
            _row(table, *(row[i] or "+" for row in s.slots), shown)
    console.print(table)
    console.print("+ is a layer to be inserted")


def _plain(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _row(table: Table, *cells: str, style: str | None = None) -> None:
    table.add_row(*map(Text, cells), style=style)  # names may have brackets: no markup


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        right = column in ("units", "axes", "cost") and title != "fixed"
        table.add_column(Text(column), justify="right" if right else "left", overflow="fold")
    return table
