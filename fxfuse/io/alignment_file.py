"""Alignments as JSON: to be read and edited by hand, and checked on the way in.

`layers` of a segment has one entry for each slot, with the layer of each network, in the order of
`networks`, or null where the network has none. The network `reference` has one in every slot. To
change an alignment, move a name to another slot. `costs` may be left out.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from .._files import write_atomically
from .._schema import parsed, read, unexpected, written
from ..errors import ArgumentError
from ..ir import Alignment, SegmentAlignment

FORMAT, VERSION = "fxfuse alignment", 1


Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class _Segment:
    label: str
    reference: int
    layers: tuple[tuple[str | None, ...], ...]
    costs: tuple[Matrix | None, ...] | None = None


@dataclass(frozen=True)
class _File:
    format: str
    version: int
    networks: tuple[str, ...]
    segments: tuple[_Segment, ...]


def to_json(alignment: Alignment) -> str:
    """Return an alignment as JSON, one line for each slot, to be read and edited by hand."""
    rows = (tuple(zip(*s.slots)) for s in alignment.segments)
    segments = tuple(
        _Segment(s.label, s.reference, row, s.costs) for s, row in zip(alignment.segments, rows)
    )
    return _text(written(_File(FORMAT, VERSION, alignment.names, segments))) + "\n"


def from_json(text: str) -> Alignment:
    """Return the alignment that `to_json` wrote, whether edited by hand or not.

    Whether the networks have these layers is checked where it is used.

    Raises:
        ArgumentError: If it is no such JSON, or a slot, a layer or a cost is out of place.
    """
    found = _checked_header(parsed(text, "the alignment"))
    _require_whole(found)
    segments = []
    for s in found.segments:
        slots = tuple(zip(*s.layers))
        costs = s.costs or (None,) * len(slots)
        segments.append(SegmentAlignment(s.label, s.reference, slots, costs))
    return Alignment(tuple(segments), found.networks)


def save_alignment(alignment: Alignment, path: str | os.PathLike[str]) -> None:
    """Write an alignment as JSON, in one step.

    Raises:
        WriteError: If the file cannot be written.
    """
    text = to_json(alignment)
    write_atomically(Path(path), lambda file: _write(file, text))


def load_alignment(path: str | os.PathLike[str]) -> Alignment:
    """Return the alignment of a file.

    Raises:
        ArgumentError: If it cannot be read, or is no alignment.
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


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _text(value: Any, indent: int = 0) -> str:
    """Return JSON in which only what holds lists of lists, or objects, takes several lines."""
    parts = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(value, (dict, list)) or not parts:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and not any(isinstance(part, (dict, list)) for part in parts):
        return json.dumps(value, ensure_ascii=False)
    inner, end = "\n" + " " * (indent + 2), "\n" + " " * indent
    lines = [_text(part, indent + 2) for part in parts]
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {line}" for key, line in zip(value, lines)]
        return "{" + inner + f",{inner}".join(lines) + end + "}"
    return "[" + inner + f",{inner}".join(lines) + end + "]"


# --- what is read ---------------------------------------------------------------------------------


def _checked_header(value: Any) -> _File:
    """Return the contents, once it is known that they are of this format and version."""
    header = value if isinstance(value, dict) else {}
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        found = {key: header.get(key) for key in ("format", "version")}
        raise ArgumentError(
            f"JSON of format {found['format']!r}, version {found['version']!r}",
            where="the alignment",
            expected=f"format '{FORMAT}', version {VERSION}",
            do="write it with `to_json` of an alignment, by this version of fxfuse",
        )
    return cast(_File, read(_File, value, "the alignment"))


def _require_whole(found: _File) -> None:
    """Refuse slots, layers and costs that do not belong together."""
    count = len(found.networks)
    seen: list[set[str]] = [set() for _ in found.networks]
    if not count or not found.segments:
        raise unexpected([], "the alignment", "at least one network and one segment")
    for i, s in enumerate(found.segments):
        where = f"the alignment.segments[{i}]"
        if not 0 <= s.reference < count:
            raise unexpected(s.reference, f"{where}.reference", f"0 to {count - 1}")
        if not s.layers:
            raise unexpected([], f"{where}.layers", "at least one slot")
        for j, row in enumerate(s.layers):
            _require_slot(row, s.reference, found.networks, seen, f"{where}.layers[{j}]")
        _require_costs(s, count, where)


def _require_slot(
    row: tuple[str | None, ...],
    reference: int,
    networks: tuple[str, ...],
    seen: list[set[str]],
    where: str,
) -> None:
    if len(row) != len(networks):
        raise unexpected(list(row), where, f"a layer or null for each of {', '.join(networks)}")
    if row[reference] is None:
        expected = f"a layer of {networks[reference]}, which has one in every slot"
        raise unexpected(list(row), where, expected)
    for name, known in zip(row, seen):
        if name in known:
            raise unexpected(name, where, "each layer of a network once; this one came before")
        if name is not None:
            known.add(name)


def _require_costs(segment: _Segment, count: int, where: str) -> None:
    """Refuse cost matrices of another shape than `(slots, layers of the network)`."""
    if segment.costs is None:
        return
    if len(segment.costs) != count:
        raise unexpected(written(segment.costs), f"{where}.costs", f"{count} entries")
    for k, matrix in enumerate(segment.costs):
        width = sum(row[k] is not None for row in segment.layers)
        shape = f"{len(segment.layers)} rows of {width} numbers, or null"
        if matrix is not None and [len(r) for r in matrix] != [width] * len(segment.layers):
            raise unexpected(written(matrix), f"{where}.costs[{k}]", shape)
