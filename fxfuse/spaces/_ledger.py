"""What one labelled run of a network writes down.

Every unit is a whole number, its label. `Facts` is what the later stages ask about; `Ledger` adds
which labels are the same unit, which must stay and which travel together: all that `_solve` needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Flag, auto
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NOTHING, FIXED = 0, 1  # labels of places that hold zero, and of places that must stay
KERNEL = "a kernel position"  # why the units along a kernel stay: not worth a word in reports


class Property(Flag):
    """What is known of an operator beside its rule for labels: columns of the table `OPERATORS`."""

    NONE = 0
    SILENT = auto()  # no step of its own: its values are those of its input, or have no meaning
    CONSTANT = auto()  # makes one value
    MOVES = auto()  # hands values on, each to other places
    RESAMPLES = auto()  # pools or interpolates along trailing axes
    CONTRACTS = auto()  # sums products
    NORMALISES = auto()
    ACROSS_UNITS = auto()  # normalises by statistics of several units together
    JOINS = auto()  # puts tensors side by side
    ELEMENTWISE = auto()
    ADDS = auto()
    MULTIPLIES = auto()
    COMMUTES = auto()  # gives the same whichever operand comes first


class Geometry(NamedTuple):
    """What makes two convolutions the same step; never a width."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool
    grouping: str  # "dense", "grouped" or "depthwise"


@dataclass(frozen=True)
class Step:
    """One operator that a node runs, equal to another where both do the same, whatever the widths.

    Attributes:
        name: What ATen calls it.
        settings: Its hyper-parameters, of a convolution its `Geometry`.
        properties: What is known of it.
        word: What a summary of a layer calls it, empty if it leaves it out.
    """

    name: str
    settings: tuple[Any, ...] = ()
    properties: Property = field(default=Property.NONE, compare=False, repr=False)
    word: str = field(default="", compare=False, repr=False)

    @property
    def geometry(self) -> Geometry | None:
        """The geometry of a convolution."""
        return self.settings if isinstance(self.settings, Geometry) else None


@dataclass(frozen=True)
class TensorAxis:
    """One labelled axis of a parameter, buffer or node output.

    Attributes:
        tensor: Qualified name.
        dim: The axis. With `groups > 1` it is the dense input axis of a grouped convolution.
        labels: `(positions,)` one label per position.
        groups: Number of groups the dense axis is cut into.
    """

    tensor: str
    dim: int
    labels: np.ndarray
    groups: int = 1


@dataclass
class Facts:
    """What a labelled run found that the later stages ask about.

    Attributes:
        features: Per node, the labelled axes of its output.
        shapes: Per node, the shape of its output.
        steps: Per node, the operators it runs, silent ones left out.
        weights: Per node, the parameters it contracts with its input.
        tensors: Per node, every parameter and buffer it touches.
        norms: Per node that normalises by running statistics, the tensors by role and its epsilon.
        unknown: Operators without a rule, as `(node, operator)`.
    """

    features: dict[str, list[TensorAxis]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    steps: dict[str, list[Step]] = field(default_factory=dict)
    weights: dict[str, list[str]] = field(default_factory=dict)
    tensors: dict[str, list[str]] = field(default_factory=dict)
    norms: dict[str, dict[str, str | float]] = field(default_factory=dict)
    unknown: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Ledger(Facts):
    """Everything one labelled run wrote down, in the order in which it happened.

    Beside the facts these are label arrays, which are large and of no use once spaces are found.

    Attributes:
        size: Number of labels given out so far.
        ties: Pairs of label arrays that are the same units.
        frozen: Label arrays that must stay in place, each with the node and the reason.
        groups: `(blocks (b,), members (b, n))`: members of one row travel with their block.
        places: Label arrays that share a tensor; units of one space occur in the same places.
        reads: Labels of parameter axes that a contraction sums over; dense axes of grouped
            convolutions, which carry the labels of what they read, all are such.
        axes: The labelled axes of parameters and buffers.
    """

    size: int = 2
    ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    frozen: list[tuple[np.ndarray, str, str]] = field(default_factory=list)
    groups: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)
    reads: list[np.ndarray] = field(default_factory=list)
    axes: list[TensorAxis] = field(default_factory=list)

    def facts(self) -> Facts:
        """Return the facts alone."""
        return Facts(*(getattr(self, f.name) for f in fields(Facts)))

    def new(self, count: int) -> Tensor:
        """Return `count` labels that no other unit has."""
        self.size += count
        return torch.arange(self.size - count, self.size)

    def tie(self, a: Tensor, b: Tensor) -> Tensor:
        """Say that labels at the same place are the same unit; return the label of each place."""
        a, b = torch.broadcast_tensors(a, b)
        met = (a != b) & (a != NOTHING) & (b != NOTHING)
        if bool(met.any()):
            base = 1 + int(b.max())
            pairs = distinct((a[met] * base + b[met]).numpy())  # as one number: sorts faster
            self.ties.append(np.divmod(pairs, base))
        return torch.where(a == NOTHING, b, a)

    def freeze(self, layer: Tensor, node: str, reason: str) -> None:
        """Say that the units of a layer must stay where they are."""
        self.frozen.append((distinct(layer.numpy()), node, reason))

    def group(self, blocks: Tensor, members: Tensor) -> None:
        """Say that the units of each row of `members` `(b, n)` travel with their block `(b,)`.

        Places without a unit of their own are blocks that stay, each for itself.
        """
        stuck = blocks <= FIXED
        if bool(stuck.any()):
            blocks = torch.where(stuck, self.new(len(blocks)), blocks)
            self.frozen.append((blocks[stuck].numpy(), "", "its block has no unit of its own"))
        self.groups.append((blocks.numpy(), members.numpy()))

    def gather(self, blocks: Tensor, members: Tensor) -> None:
        """Say that each of `members` `(n,)` travels with its entry of `blocks` `(n,)`."""
        order = torch.argsort(blocks, stable=True)
        names, counts = torch.unique(blocks, return_counts=True)
        rows = members[order].split(counts.tolist())
        for count in torch.unique(counts):
            same = [row for row in rows if len(row) == count]
            self.group(names[counts == count], torch.stack(same))

    def place(self, layer: Tensor) -> None:
        """Note the units that share one tensor."""
        self.places.append(layer.flatten().numpy())


def distinct(numbers: np.ndarray) -> np.ndarray:
    """Return the whole numbers that occur, ascending.

    As `np.unique`, which hashes them: at a few thousand of them sorting takes a tenth of the time.
    """
    numbers = np.sort(numbers, axis=None)
    found: np.ndarray = numbers[np.diff(numbers, prepend=numbers[:1] - 1) != 0]
    return found
