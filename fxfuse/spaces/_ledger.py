"""What a labelled run of a network writes down: what each node does, and what holds for its units.

Every unit goes by a whole number, its label. The ledger says which labels are one unit, which units
must stay in place and which travel together: all that `_solve` needs to find the spaces.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ir import Place

NOTHING, FIXED = 0, 1  # labels of places that hold zero, and of places that must stay
KERNEL = "a kernel position"  # why the units along a kernel stay: not worth a word in reports


class Property(Flag):
    """What is known of an operator beside its rule for labels: columns of the table `OPERATORS`."""

    NONE = 0
    SILENT = auto()  # is no step: it hands its input on as it is, or its values mean nothing
    CONSTANT = auto()  # makes one value
    MOVES = auto()  # puts the values of its input in other places
    RESAMPLES = auto()  # pools or interpolates along the trailing axes
    CONTRACTS = auto()  # sums products over an axis
    NORMALISES = auto()
    ACROSS_UNITS = auto()  # normalises with statistics of several units together
    JOINS = auto()  # puts tensors side by side
    ELEMENTWISE = auto()
    ADDS = auto()
    MULTIPLIES = auto()
    COMMUTES = auto()  # gives the same for its operands in another order


class Geometry(NamedTuple):
    """The settings of a convolution; no width is among them."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool
    grouping: str  # "dense", "grouped" or "depthwise"


@dataclass(frozen=True)
class Step:
    """One operator that a node runs. Two steps are equal if they differ in nothing but widths.

    Attributes:
        name: ATen's name of the operator.
        settings: Its hyper-parameters; of a convolution, its `Geometry`.
        properties: What is known of the operator.
        word: Its name in the summary of a layer; empty if summaries leave it out.
    """

    name: str
    settings: tuple[Any, ...] = ()
    properties: Property = field(default=Property.NONE, compare=False, repr=False)
    word: str = field(default="", compare=False, repr=False)

    @property
    def geometry(self) -> Geometry | None:
        """The settings of a convolution, None of any other operator."""
        return self.settings if isinstance(self.settings, Geometry) else None


@dataclass
class Ledger:
    """Everything that one labelled run wrote down, in the order in which it happened.

    What the nodes do, by their names:

    Attributes:
        shapes: The shape of its output; empty for an output of several tensors.
        steps: The operators it runs, silent ones left out.
        weights: The parameters that it contracts with its input.
        tensors: Every parameter and buffer that it touches.
        norms: Of a node that normalises with running statistics, its tensors by role, and `eps`.
        outputs: The axes of its output that have labels, each with the labels along it.
        size: Number of labels so far; the first two are `NOTHING` and `FIXED`.
        axes: The labels along each axis of a parameter or buffer.
        grouped: Those axes that are the dense input axis of a grouped convolution, with the number
            of groups.
        ties: Pairs of label arrays that are the same units.
        frozen: Label arrays that must stay in place, each with the node and the reason.
        blocks: `(blocks (b,), members (b, n))`: the members of a row travel with their block.
        places: Label arrays that share a tensor; units of one space occur in the same places.
        reads: Labels of parameter axes that a contraction sums over. The dense input axes of
            grouped convolutions are not among them, although all are such axes.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    steps: dict[str, list[Step]] = field(default_factory=dict)
    weights: dict[str, list[str]] = field(default_factory=dict)
    tensors: dict[str, list[str]] = field(default_factory=dict)
    norms: dict[str, dict[str, str | float]] = field(default_factory=dict)
    outputs: dict[str, list[tuple[int, np.ndarray]]] = field(default_factory=dict)
    size: int = 2
    axes: dict[Place, np.ndarray] = field(default_factory=dict)
    grouped: dict[Place, int] = field(default_factory=dict)
    ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    frozen: list[tuple[np.ndarray, str, str]] = field(default_factory=list)
    blocks: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)
    reads: list[np.ndarray] = field(default_factory=list)

    def new(self, count: int) -> Tensor:
        """Return `count` labels that no other unit has."""
        self.size += count
        return torch.arange(self.size - count, self.size)

    def tie(self, a: Tensor, b: Tensor) -> Tensor:
        """Note that labels at the same place are one unit; return the label of each place."""
        a, b = torch.broadcast_tensors(a, b)
        differ = (a != b) & (a != NOTHING) & (b != NOTHING)
        if bool(differ.any()):
            base = 1 + int(b.max())
            pairs = distinct((a[differ] * base + b[differ]).numpy())  # one number sorts faster
            self.ties.append(np.divmod(pairs, base))
        return torch.where(a == NOTHING, b, a)

    def freeze(self, layer: Tensor, node: str, reason: str) -> None:
        """Note that the units of a layer must stay in place."""
        self.frozen.append((distinct(layer.numpy()), node, reason))

    def group(self, blocks: Tensor, members: Tensor) -> None:
        """Note that the units of each row of `members` `(b, n)` travel with their block `(b,)`.

        A block that is no unit (`NOTHING` or `FIXED`) becomes a block of its own, which stays.
        """
        fixed = blocks <= FIXED
        if bool(fixed.any()):
            blocks = torch.where(fixed, self.new(len(blocks)), blocks)
            self.frozen.append((blocks[fixed].numpy(), "", "its block has no unit of its own"))
        self.blocks.append((blocks.numpy(), members.numpy()))

    def group_each(self, blocks: Tensor, members: Tensor) -> None:
        """Note that each of `members` `(n,)` travels with its entry of `blocks` `(n,)`."""
        order = torch.argsort(blocks, stable=True)
        names, counts = torch.unique(blocks, return_counts=True)
        rows = members[order].split(counts.tolist())
        for count in torch.unique(counts):
            alike = [row for row in rows if len(row) == count]
            self.group(names[counts == count], torch.stack(alike))

    def place(self, layer: Tensor) -> None:
        """Note the units that share one tensor."""
        self.places.append(layer.flatten().numpy())


def distinct(numbers: np.ndarray) -> np.ndarray:
    """Return the whole numbers that occur, ascending.

    As `np.unique`, which hashes them: for a few thousand, sorting takes a tenth of the time.
    """
    numbers = np.sort(numbers, axis=None)
    first: np.ndarray = numbers[np.diff(numbers, prepend=numbers[:1] - 1) != 0]
    return first
