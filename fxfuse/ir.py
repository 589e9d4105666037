"""What the stages hand on to each other: spaces, layers, segments, alignments, couplings.

All are frozen and hold names, numbers and arrays, never modules or nodes. So they can be printed,
compared, copied and written to a file.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_array

from .errors import ArgumentError

if TYPE_CHECKING:
    import networkx as nx


Place = tuple[str, int]  # name of a parameter, buffer or node, and one of its axes
Signature = frozenset[tuple[str, int, bool, int]]  # of each axis: tensor, dim, reads, repeats

OUTPUTS = "outputs"  # takes the place of a space's name for the outputs, whose units are fixed


@dataclass(frozen=True, eq=False)
class Axis:
    """Where the units of a space lie along one tensor axis.

    Attributes:
        tensor: Qualified name of a parameter or buffer, or the name of a node.
        dim: The axis.
        index: `(size, m)` positions of each unit; unit `u` occurs at `index[u, 0..m-1]`.
        reads: Whether a contraction sums over this axis. If so, the unproject map acts on it.
        groups: Above 1 for the input axis of a grouped convolution, or the output axis of a
            transposed one. `index` then counts along the dense axis, of which each row of the
            weight stores `1 / groups`.
    """

    tensor: str
    dim: int
    index: np.ndarray
    reads: bool = False
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Space:
    """A set of units that one symmetry acts on.

    Attributes:
        name: The module of the first tensor that writes its units.
        size: Number of units.
        axes: The axes of parameters and buffers along which the units lie.
        features: The axes of node outputs along which they lie.
        parent: The space whose units are the blocks of these units; None if there is none.
        blocks: `(size,)` the block of each unit: a unit of the parent, or the number of a fixed
            block if there is no parent. None if the units lie in no blocks.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    features: tuple[Axis, ...] = ()
    parent: str | None = None
    blocks: np.ndarray | None = None

    @property
    def signature(self) -> Signature:
        """Where the units lie: the same for the same space in networks of one structure."""
        return frozenset((a.tensor, a.dim, a.reads, a.index.shape[1]) for a in self.axes)

    def __str__(self) -> str:
        inside = f" in blocks of {self.parent}" if self.parent else ""
        return f"{self.name}: {self.size} units on {len(self.axes)} axes{inside}"


@dataclass(frozen=True)
class Frozen:
    """Units that stay in place, and why.

    Attributes:
        tensor: Qualified name of a parameter or buffer.
        dim: One of its axes.
        count: Number of units along it that stay.
        node: The node at which they were fixed; empty if no single node did it.
        reason: Why they stay.
    """

    tensor: str
    dim: int
    count: int
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.tensor}[{self.dim}]: {self.count} units fixed at {self.node}, {self.reason}"


@dataclass(frozen=True)
class Cost:
    """What a network costs to run and to hold, or how much more than another it does.

    Attributes:
        multiply_adds: Of a run, such as of one sample.
        parameters: Their number.
    """

    multiply_adds: float
    parameters: float

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of both."""
        added = self.multiply_adds + other.multiply_adds
        return Cost(added, self.parameters + other.parameters)

    def __truediv__(self, other: Cost) -> Cost:
        """Return the cost relative to another."""
        ratio = self.multiply_adds / max(other.multiply_adds, 1)
        return Cost(ratio, self.parameters / max(other.parameters, 1))

    def within(self, most: Cost) -> bool:
        """Tell whether it is no more than another, but for rounding."""
        pairs = (self.multiply_adds, most.multiply_adds), (self.parameters, most.parameters)
        return all(cost <= limit * (1 + 1e-6) for cost, limit in pairs)

    def __str__(self) -> str:
        return f"{self.multiply_adds:.2f} of the multiply-adds, {self.parameters:.2f} parameters"


@dataclass(frozen=True)
class LayerFit:
    """How well a contraction of the fused network was refitted.

    Attributes:
        node: Its node.
        explained: Share of its target's variance that it explains (R squared), on samples that the
            fit did not see.
        ridge: How strongly the fit was drawn to the weights before it; infinite if these stayed.
        seconds: Wall time that it took, the networks' way to it included.
    """

    node: str
    explained: float
    ridge: float
    seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        return f"{self.node}: {self.explained:.2f} of the target's variance, ridge {self.ridge:g}"


@dataclass(frozen=True)
class Finished:
    """What a descent behind the refit came to.

    Attributes:
        steps: How many steps were taken.
        kept: Behind how many of them the weights were nearest to what was wanted, and kept.
        before: How far the network was from that, on samples held out.
        after: How far it is.
    """

    steps: int
    kept: int
    before: float
    after: float

    def __str__(self) -> str:
        taken = f"finished by {self.steps} steps, {self.kept} of them kept"
        return f"{taken}: {self.before:.3g} from the ensemble before, {self.after:.3g} after"


@dataclass(frozen=True, eq=False)
class Spaces:
    """The unit spaces of one network.

    Attributes:
        spaces: The spaces; a space of blocks comes before the spaces inside its blocks.
        frozen: What must stay in place.
        sizes: Length of each axis of parameters and buffers; of the dense axis, if it is grouped.
    """

    spaces: tuple[Space, ...]
    frozen: tuple[Frozen, ...] = ()
    sizes: dict[Place, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Space]:
        return iter(self.spaces)

    def __len__(self) -> int:
        return len(self.spaces)

    def __getitem__(self, name: str) -> Space:
        return {s.name: s for s in self.spaces}[name]

    @cached_property
    def places(self) -> dict[Place, list[tuple[Space, Axis]]]:
        """The spaces on each axis `(tensor, dim)` of a parameter or buffer."""
        return _by_place((space, axis) for space in self.spaces for axis in space.axes)

    @cached_property
    def feature_places(self) -> dict[Place, list[tuple[Space, Axis]]]:
        """The spaces on each axis `(node, dim)` of a node's output."""
        return _by_place((space, axis) for space in self.spaces for axis in space.features)

    def on(self, tensor: str) -> list[tuple[Space, Axis]]:
        """Return the spaces on all axes of a parameter or buffer, and where they lie."""
        return [pair for place in self._places_of.get(tensor, ()) for pair in self.places[place]]

    @cached_property
    def _places_of(self) -> dict[str, list[Place]]:
        places: dict[str, list[Place]] = {}
        for place in self.places:
            places.setdefault(place[0], []).append(place)
        return places

    @property
    def free_units(self) -> int:
        """Number of units that can change places with another one; blocks do not count."""
        parents = {s.parent for s in self.spaces}
        return sum(_exchangeable(s) for s in self.spaces if s.name not in parents)

    def __str__(self) -> str:
        lines = [f"{len(self.spaces)} spaces, {self.free_units} free units"]
        lines += [f"  {s}" for s in self.spaces]
        lines += [f"  fixed: {f}" for f in self.frozen]
        return "\n".join(lines)


def _by_place(pairs: Iterable[tuple[Space, Axis]]) -> dict[Place, list[tuple[Space, Axis]]]:
    places: dict[Place, list[tuple[Space, Axis]]] = {}
    for space, axis in pairs:
        places.setdefault((axis.tensor, axis.dim), []).append((space, axis))
    return places


def _exchangeable(space: Space) -> int:
    if space.parent is not None or space.blocks is None:
        return space.size if space.size > 1 else 0
    _, counts = np.unique(space.blocks, return_counts=True)
    return int(counts[counts > 1].sum())


@dataclass(frozen=True)
class Layer:
    """An alignable step of a network's chain.

    Attributes:
        name: Qualified name of its module; if it has none of its own, of its first and last part.
        kind: What it is made of, whatever its widths. Layers of different kinds never pair.
        nodes: Its nodes in graph order; the last one is its exit.
        entry: The node whose value it reads.
        merge: The node where the paths of a block meet; of a plain layer, its first node.
        pre_activation: The node that holds its pre-activation; of a block, the value after the add.
        producers: Its nodes that contract a parameter.
        branched: Whether it is a block, a region with parallel paths, instead of one step.
        resolution: Shape of its output without batch and feature axis.
        layout: Rank and feature axis of its output.
        width: Size of the feature axis.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    entry: str
    merge: str
    pre_activation: str
    producers: tuple[str, ...]
    branched: bool
    resolution: tuple[int, ...]
    layout: tuple[int, int]
    width: int

    @property
    def linear(self) -> bool:
        """Whether it is a plain layer without an activation."""
        return not self.branched and self.pre_activation == self.nodes[-1]

    def __str__(self) -> str:
        return f"{self.name} ({'block' if self.branched else 'layer'}, {self.width} units)"


@dataclass(frozen=True)
class Segment:
    """A maximal run of layers on one kind of tensor at one output resolution."""

    layers: tuple[Layer, ...]

    @property
    def resolution(self) -> tuple[int, ...]:
        """Shape of the segment's tensors without batch and feature axis."""
        return self.layers[0].resolution

    @property
    def label(self) -> str:
        """What the segment works on: "features", or "8x8 positions"."""
        size = "x".join(map(str, self.resolution))
        return f"{size} positions" if size else "features"

    def __str__(self) -> str:
        return f"{self.label}: " + ", ".join(layer.name for layer in self.layers)


@dataclass(frozen=True)
class SegmentAlignment:
    """How the layers of K networks fall into the slots of one segment.

    Attributes:
        label: What the segment works on.
        reference: The network with the most layers in the segment: each is a slot.
        slots: For each network, its layer in each slot; None where it has none.
        costs: For each network, the costs `(slots, layers)` that were minimised; None where there
            was nothing to choose.
    """

    label: str
    reference: int
    slots: tuple[tuple[str | None, ...], ...]
    costs: tuple[tuple[tuple[float, ...], ...] | None, ...]

    def cost_of(self, network: int, slot: int) -> float | None:
        """Return the cost of a network's layer in a slot, None if it was not measured."""
        matrix, layer = self.costs[network], self.slots[network][slot]
        if matrix is None or layer is None:
            return None
        column = [x for x in self.slots[network] if x is not None].index(layer)
        return matrix[slot][column]


@dataclass(frozen=True)
class LayerFacts:
    """What pictures and graphs show of a layer.

    Attributes:
        kind: What it is made of (`Layer.kind`).
        width: Number of its units.
        parameters: Number of its parameters.
    """

    kind: str
    width: int
    parameters: int


@dataclass(frozen=True)
class Alignment:
    """The strictly increasing maps between the layers of K networks, segment by segment.

    Attributes:
        segments: One entry for each group of corresponding segments, in network order.
        names: The names of the networks.
        facts: For each network, what pictures show of its layers; may be left out.
    """

    segments: tuple[SegmentAlignment, ...]
    names: tuple[str, ...]
    facts: tuple[dict[str, LayerFacts], ...] = field(default=(), compare=False, repr=False)

    @property
    def pairs(self) -> list[list[tuple[str, str]]]:
        """For two models and each segment, `(layer of the deeper, layer of the shallower)`."""
        if len(self.names) != 2:
            raise ArgumentError(
                f"an alignment of {len(self.names)} models",
                where="Alignment.pairs",
                expected="an alignment of two models",
                do="read the slots of each of its segments instead",
            )
        pairs = []
        for s in self.segments:
            both = zip(s.slots[s.reference], s.slots[1 - s.reference])
            pairs.append([(a, b) for a, b in both if a is not None and b is not None])
        return pairs

    def __str__(self) -> str:
        width = max([len(n) for n in self.names] + [len(x or "") for x in self._layers()]) + 2
        rows = ["".join(n.ljust(width) for n in self.names) + "cost"]
        for s in self.segments:
            rows.append(f"-- {s.label}")
            for i in range(len(s.slots[0])):
                names = [row[i] or "+" * self.takes_part(k) for k, row in enumerate(s.slots)]
                cells = "".join(name.ljust(width) for name in names)
                costs = [s.cost_of(k, i) for k in range(len(self.names)) if k != s.reference]
                shown = " ".join("" if c is None else f"{c:.4f}" for c in costs)
                rows.append((cells + shown).rstrip())
        return "\n".join(rows)

    def takes_part(self, network: int) -> bool:
        """Tell whether any layer of a network is aligned; of one that is only heard, none is."""
        return any(name is not None for s in self.segments for name in s.slots[network])

    def _layers(self) -> Iterator[str | None]:
        for s in self.segments:
            for row in s.slots:
                yield from row

    # The methods below only call the packages that draw and write. These import this module, so it
    # cannot import them before it is asked.

    def _repr_html_(self) -> str:
        """Return the picture, for a notebook."""
        from .report.alignment_picture import inline_svg

        return inline_svg(self)

    def to_networkx(self) -> nx.DiGraph:
        """Return a directed graph of all layers: chains, and aligned pairs with their costs.

        Nodes are named `network index:layer name`, inserted ones `network index:+layer name`. Their
        attributes are `network`, `index`, `segment`, `label`, `slot`, `layer`, `inserted` and, if
        known, `width`, `kind` and `parameters`. The `relation` of an edge is "chain" or "aligned";
        aligned ones have a `cost`.
        """
        from .report.graphs import graph_of

        return graph_of(self)

    def to_dot(self) -> str:
        """Return the graph in the DOT language, segments as clusters."""
        from .report.graphs import dot_of

        return dot_of(self)

    def save_dot(self, path: str | os.PathLike[str]) -> None:
        """Write the graph in the DOT language."""
        from .report.graphs import save_dot

        save_dot(self, path)

    def save_graphml(self, path: str | os.PathLike[str]) -> None:
        """Write the graph as GraphML."""
        from .report.graphs import save_graphml

        save_graphml(self, path)

    def draw(self, path: str | os.PathLike[str], removed: Sequence[Collection[str]] = ()) -> None:
        """Write a picture as .svg, .png or .pdf; see `fxfuse.draw`."""
        from .report.alignment_picture import draw

        draw(self, path, removed)

    def draw_costs(self, path: str | os.PathLike[str]) -> None:
        """Write a heat map of the layer costs of each segment, with the alignment in it.

        Raises:
            ArgumentError: If no costs were measured, or the ending is not .svg, .png or .pdf.
        """
        from .report.plots import draw_costs

        draw_costs(self, path)

    def to_json(self) -> str:
        """Return the alignment as JSON with a line for each slot, to read and edit by hand."""
        from .io.alignment_file import to_json

        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Alignment:
        """Return the alignment that `to_json` wrote, possibly edited by hand.

        Whether the networks have these layers is checked when the alignment is used.

        Raises:
            ArgumentError: If it is not such JSON, or a slot, a layer or a cost is out of place.
        """
        from .io.alignment_file import from_json

        return from_json(text)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the alignment as JSON, in one step.

        Raises:
            WriteError: If the file cannot be written.
        """
        from .io.alignment_file import save_alignment

        save_alignment(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Alignment:
        """Return the alignment in a file.

        Raises:
            ArgumentError: If it cannot be read, or is not an alignment.
        """
        from .io.alignment_file import load_alignment

        return load_alignment(path)


@dataclass(frozen=True, eq=False)
class Coupling:
    """The two maps between a space of one network and the same space of the fused network.

    Attributes:
        project: `(fused units, units)`, acts on what is written. The sum of a row is 1; it is less
            if the network contributes less to this unit, and 0 if it contributes nothing. (After a
            zip, the sums of all networks, times their shares, add up to 1.)
        unproject: `(units, fused units)`, acts on what is read; rows sum to 1, or to 0.
        cost: Mean ground cost per unit of mass, None if nothing was measured.
        gains: `(fused units,)` what the rows of `project` are multiplied by besides, where units
            are of another size than the base network's; None if they are not.
    """

    project: csr_array
    unproject: csr_array
    cost: float | None = None
    gains: np.ndarray | None = None

    @cached_property
    def given(self) -> np.ndarray:
        """`(fused units,)` sums of the rows of `project`: the network's part in each unit."""
        sums = np.asarray(self.project.sum(1)).ravel()
        return sums if self.gains is None else sums / self.gains

    @property
    def confidence(self) -> float:
        """How much of a fused unit its main source gives, averaged; 1 if each has one source."""
        if not self.project.shape[0]:
            return 1.0
        largest, sums = (
            np.asarray(x).ravel() for x in (self.project.max(axis=1).toarray(), self.project.sum(1))
        )
        return float(np.mean(largest / np.where(sums > 0, sums, 1.0)))
