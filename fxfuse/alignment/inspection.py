"""What the analysis finds in one network: chain, layers, segments, spaces, and what is fixed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import Any

from torch import nn

from .._checked import checked
from .._progress import Clock, Progress
from ..calibration.data import analyse
from ..graph.calls import Example, ToCall
from ..graph.trace import without_autocast
from ..ir import Axis, Frozen, Layer, Segment, Space, Spaces
from .layers import chain_of, partition
from .pairing import shorten

_WIDTH = 80  # characters of a printed line


@dataclass(frozen=True, eq=False)
class Inspection:
    """What the analysis found in a network; print it or write it as JSON.

    Attributes:
        name: The network's class.
        parameters: Number of its parameters.
        chain: The nodes that every path from input to output passes through, in order.
        segments: The layers along the chain, run by run.
        spaces: Its unit spaces, and what is fixed.
    """

    name: str
    parameters: int
    chain: tuple[str, ...]
    segments: tuple[Segment, ...]
    spaces: Spaces

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of all segments, in order."""
        return tuple(layer for segment in self.segments for layer in segment.layers)

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        """Units that stay in place, and why."""
        return self.spaces.frozen

    @property
    def kinds(self) -> dict[str, int]:
        """The kinds of layers, numbered from 1 in order; layers of different kinds never pair."""
        return {kind: i + 1 for i, kind in enumerate(dict.fromkeys(x.kind for x in self.layers))}

    @property
    def reasons(self) -> dict[str, tuple[Frozen, ...]]:
        """What is fixed, by the reason for it."""
        groups: dict[str, list[Frozen]] = {}
        for fixed in self.frozen:
            groups.setdefault(fixed.reason, []).append(fixed)
        return {reason: tuple(group) for reason, group in groups.items()}

    @property
    def summary(self) -> str:
        """The counts, in one line."""
        return (
            f"{self.name}: {self.parameters:,} parameters, {len(self.layers)} layers in "
            f"{len(self.segments)} segments, {self.spaces.free_units:,} free units in "
            f"{len(self.spaces)} spaces"
        )

    def __str__(self) -> str:
        parts = [wrap(self.summary, _WIDTH), self._chain(), self._layers()]
        return "\n\n".join("\n".join(p) for p in [*parts, self._spaces(), self._fixed()] if p)

    def _repr_html_(self) -> str:
        """Return tables, for a notebook."""
        layers = [(x.name, f"{x.width:,}", shortened(x.kind)) for x in self.layers]
        spaces = [(s.name, f"{s.size:,}", str(len(s.axes))) for s in self.spaces]
        fixed = [(described(group), reason) for reason, group in self.reasons.items()]
        shown = _table(("layer", "units", "kind"), layers) if layers else ""
        shown += _table(("space", "units", "axes"), spaces) if spaces else ""
        shown += _table(("fixed", "why"), fixed) if fixed else ""
        return f"<p>{escape(self.summary)}</p>{shown}"

    def _chain(self) -> list[str]:
        return wrap("chain: " + " > ".join(self.chain), _WIDTH, subsequent_indent="  ")

    def _layers(self) -> list[str]:
        rows = [("layer", "units", "kind", "")]
        for segment in self.segments:
            rows.append((f"-- {segment.label}", "", "", ""))
            rows += [
                (x.name, f"{x.width:,}", str(self.kinds[x.kind]), "block" if x.branched else "")
                for x in segment.layers
            ]
        legend = (
            line
            for kind, i in self.kinds.items()
            for line in wrap(f"kind {i}: {shortened(kind)}", _WIDTH, subsequent_indent="  ")
        )
        return [*_columns(rows), *legend]

    def _spaces(self) -> list[str]:
        rows = [("space", "units", "axes", "in blocks of")]
        rows += [(s.name, f"{s.size:,}", str(len(s.axes)), s.parent or "") for s in self.spaces]
        return _columns(rows)

    def _fixed(self) -> list[str]:
        lines = (f"fixed: {described(group)}: {why}" for why, group in self.reasons.items())
        return [part for line in lines for part in wrap(line, _WIDTH, subsequent_indent="  ")]

    def to_json(self) -> str:
        """Return everything as JSON.

        The keys are `name`, `parameters`, `free_units`, `chain` (node names), `segments` (each
        `label`, `resolution`, and `layers` with `name`, `kind`, `block`, `width`, `nodes`),
        `spaces` (each `name`, `size`, `parent`, `axes` and `features` with `tensor`, `dim`,
        `reads`) and `frozen` (each `tensor`, `dim`, `count`, `node`, `reason`).
        """
        facts = {
            "name": self.name,
            "parameters": self.parameters,
            "free_units": self.spaces.free_units,
            "chain": self.chain,
            "segments": [_segment_facts(s) for s in self.segments],
            "spaces": [_space_facts(s) for s in self.spaces],
            "frozen": [
                {
                    "tensor": f.tensor,
                    "dim": f.dim,
                    "count": f.count,
                    "node": f.node,
                    "reason": f.reason,
                }
                for f in self.frozen
            ],
        }
        return json.dumps(facts, indent=2)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in HTML."""
    lines = [[f"<th>{escape(cell)}</th>" for cell in head]]
    lines += [[f"<td>{escape(cell)}</td>" for cell in row] for row in rows]
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    return f"<table>{body}</table>"


@checked()
@without_autocast()
def inspect(
    model: nn.Module,
    example: Example,
    *,
    inputs: ToCall | None = None,
    progress: Progress | bool | None = None,
) -> Inspection:
    """Find the chain, layers, segments and unit spaces of any traceable module.

    Args:
        model: The network; not modified.
        example: One batch as the network takes it: a tensor `(N, ...)`, a tuple of arguments, or a
            mapping from their names.
        inputs: From the example to args, kwargs of forward, where it is no batch as usual.
        progress: True to draw bars, or what is called with the name of a stage and the share of it
            that is done.

    Returns:
        What was found; print it, or read its `layers`, `segments`, `spaces` and `frozen`.

    Raises:
        TraceError: If the module cannot be traced.
        ModelError: If weights are not finite.
        DataError: If it refuses the example.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> inspection = inspect(net, torch.zeros(1, 4))
        >>> inspection.chain
        ('input_1', '_0', '_1', '_2', 'output')
        >>> [layer.name for layer in inspection.layers], inspection.spaces.free_units
        (['0', '2'], 8)
    """
    name, clock = type(model).__name__, Clock(progress)
    with clock.stage("trace and find spaces"):
        network = analyse(model, example, name, inputs)
    size = sum(p.numel() for p in model.parameters())
    return Inspection(name, size, chain_of(network), partition(network), network.spaces)


def shortened(kind: str) -> str:
    """Return a kind; of a very long one, as recurrent layers have, without its middle."""
    return shorten(kind, 240)


def described(group: Sequence[Frozen]) -> str:
    """Return how many units are fixed on which axes, the first three by name."""
    shown = ", ".join(f"{f.count:,} of {f.tensor}[{f.dim}]" for f in group[:3])
    return shown + (f" and {len(group) - 3} more places" if len(group) > 3 else "")


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay rows out in columns; the numbers, in the two middle columns, are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(n) if i in (1, 2) else cell.ljust(n)
            for i, (cell, n) in enumerate(zip(row, widths))
        ]
        lines += wrap("  ".join(cells).rstrip(), _WIDTH, subsequent_indent="    ")
    return lines


def _segment_facts(segment: Segment) -> dict[str, Any]:
    return {
        "label": segment.label,
        "resolution": segment.resolution,
        "layers": [
            {
                "name": x.name,
                "kind": x.kind,
                "block": x.branched,
                "width": x.width,
                "nodes": x.nodes,
            }
            for x in segment.layers
        ],
    }


def _space_facts(space: Space) -> dict[str, Any]:
    return {
        "name": space.name,
        "size": space.size,
        "parent": space.parent,
        "axes": list(_axis_facts(space.axes)),
        "features": list(_axis_facts(space.features)),
    }


def _axis_facts(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    return ({"tensor": a.tensor, "dim": a.dim, "reads": a.reads} for a in axes)
