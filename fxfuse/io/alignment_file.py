"""Alignments as JSON, to be read and edited by hand, and checked on the way in.

The `layers` of a segment have an entry for each slot: the layer of each network, in the order of
`networks`, or null where a network has none. The network `reference` has one in every slot. To
change an alignment, move a name to another slot. `costs` may be left out.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from .._checked import checked
from .._files import write_text
from .._schema import parsed, read, unexpected, written
from ..errors import ArgumentError
from ..ir import Alignment, SegmentAlignment

FORMAT, VERSION = "fxfuse alignment", 1

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class _Segment:
    """A segment as the file has it: `layers` by slot, not by network."""

    label: str
    reference: int
    layers: tuple[tuple[str | None, ...], ...]
    costs: tuple[Matrix | None, ...] | None = None


@dataclass(frozen=True)
class _File:
    """What the file holds."""

    format: str
    version: int
    networks: tuple[str, ...]
    segments: tuple[_Segment, ...]


def to_json(alignment: Alignment) -> str:
    """Return an alignment as JSON, one line for each slot, to be read and edited by hand."""
    segments = tuple(
        _Segment(s.label, s.reference, tuple(zip(*s.slots)), s.costs) for s in alignment.segments
    )
    return _text(written(_File(FORMAT, VERSION, alignment.names, segments))) + "\n"


@checked()
def from_json(text: str) -> Alignment:
    """Return the alignment that `to_json` wrote, whether edited by hand or not.

    Whether the networks have these layers is checked where it is used.

    Raises:
        ArgumentError: If it is not such JSON, or a slot, a layer or a cost is out of place.
    """
    file = _read_file(parsed(text, "the alignment"))
    _require_consistent(file)
    segments = []
    for segment in file.segments:
        slots = tuple(zip(*segment.layers))
        costs = segment.costs or (None,) * len(slots)
        segments.append(SegmentAlignment(segment.label, segment.reference, slots, costs))
    return Alignment(tuple(segments), file.networks)


@checked()
def save_alignment(alignment: Alignment, path: str | os.PathLike[str]) -> None:
    """Write an alignment as JSON, in one step.

    Raises:
        WriteError: If the file cannot be written.
    """
    write_text(path, to_json(alignment))


@checked()
def load_alignment(path: str | os.PathLike[str]) -> Alignment:
    """Return the alignment of a file.

    Raises:
        ArgumentError: If it cannot be read, or is not an alignment.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"an alignment that cannot be read: {error}",
            where=str(path),
            expected="a file that `Alignment.save` wrote",
            do="check the path",
        ) from error
    try:
        return from_json(text)
    except ArgumentError as error:
        where = f"{path}: {error.where}"
        raise ArgumentError(error.met, where=where, expected=error.expected, do=error.do) from error


def _text(value: Any, indent: int = 0) -> str:
    """Return a value as JSON: objects and lists of lists over several lines, other lists in one."""
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(key)}: {_text(part, indent + 2)}" for key, part in value.items()]
        opening, closing = "{}"
    elif isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        lines = [_text(part, indent + 2) for part in value]
        opening, closing = "[]"
    else:
        return json.dumps(value, ensure_ascii=False)
    inner, outer = "\n" + " " * (indent + 2), "\n" + " " * indent
    return opening + inner + f",{inner}".join(lines) + outer + closing


# --- checks ---------------------------------------------------------------------------------------


def _read_file(value: Any) -> _File:
    """Return the contents, if they are of this format and version."""
    header = value if isinstance(value, dict) else {}
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise ArgumentError(
            f"JSON of format {header.get('format')!r}, version {header.get('version')!r}",
            where="the alignment",
            expected=f"format '{FORMAT}', version {VERSION}",
            do="write it with `to_json` of an alignment, by this version of fxfuse",
        )
    return cast(_File, read(_File, value, "the alignment"))


def _require_consistent(file: _File) -> None:
    """Refuse slots, layers and costs that do not belong together."""
    count = len(file.networks)
    if not count or not file.segments:
        raise unexpected([], "the alignment", "at least one network and one segment")
    used: list[set[str]] = [set() for _ in file.networks]
    for i, segment in enumerate(file.segments):
        where = f"the alignment.segments[{i}]"
        if not 0 <= segment.reference < count:
            raise unexpected(segment.reference, f"{where}.reference", f"0 to {count - 1}")
        if not segment.layers:
            raise unexpected([], f"{where}.layers", "at least one slot")
        for j, slot in enumerate(segment.layers):
            _require_slot(slot, segment.reference, file.networks, used, f"{where}.layers[{j}]")
        _require_costs(segment, count, where)


def _require_slot(
    slot: tuple[str | None, ...],
    reference: int,
    networks: tuple[str, ...],
    used: list[set[str]],
    where: str,
) -> None:
    """Refuse a slot with the layers of other networks, or with layers that others `used`."""
    if len(slot) != len(networks):
        raise unexpected(list(slot), where, f"a layer or null for each of {', '.join(networks)}")
    if slot[reference] is None:
        expected = f"a layer of {networks[reference]}, which has one in every slot"
        raise unexpected(list(slot), where, expected)
    for name, names in zip(slot, used):
        if name in names:
            raise unexpected(name, where, "each layer of a network once; this one came before")
        if name is not None:
            names.add(name)


def _require_costs(segment: _Segment, count: int, where: str) -> None:
    """Refuse cost matrices of another shape than `(slots, layers of the network)`."""
    if segment.costs is None:
        return
    if len(segment.costs) != count:
        raise unexpected(written(segment.costs), f"{where}.costs", f"{count} entries")
    for k, matrix in enumerate(segment.costs):
        rows, columns = len(segment.layers), sum(slot[k] is not None for slot in segment.layers)
        if matrix is not None and [len(row) for row in matrix] != [columns] * rows:
            shape = f"{rows} rows of {columns} numbers, or null"
            raise unexpected(written(matrix), f"{where}.costs[{k}]", shape)
