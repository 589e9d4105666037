"""Unit labels on tensors, and the ledger of what a labelled run finds out about them.

Every parameter axis starts with one fresh integer label per position. While the real network runs
once, each operator is mirrored on labels (`operators`): data movement runs the very operator on the
label tensors, elementwise operators tie the labels that meet, contractions tie what they sum over.
The ledger of ties, freezes, blocks and places is all that `spaces` needs.

A tensor carries zero or more *layers*: integer tensors of its own rank, of size 1 along every axis
on which the labels do not vary. The label `NOTHING` marks places that hold zero (padding), `FIXED`
marks places whose content must stay where it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

NOTHING, FIXED = 0, 1
KERNEL = "a kernel position"


@dataclass(frozen=True)
class Labels:
    """What is known of the units in one tensor.

    Attributes:
        layers: Label tensors of the tensor's rank, collapsed where they do not vary.
        fill: What lives where no layer speaks: `FIXED` (data) or `NOTHING` (one constant).
        sources: The parameters a tensor was computed from; empty once activations are mixed in.
    """

    layers: tuple[Tensor, ...] = ()
    fill: int = FIXED
    sources: tuple[str, ...] = ()


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
        ops: Per node, descriptors of the operators it ran.
        weights: Per node, the parameters it contracts with its input.
        tensors: Per node, every parameter and buffer it touches.
        norms: Per node that normalises by running statistics, the tensors by role and its epsilon.
        unknown: Operators without a rule, as `(node, operator)`.
    """

    features: dict[str, list[TensorAxis]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ops: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
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


def varying(layer: Tensor) -> tuple[int, ...]:
    """Return the axes along which the labels of a collapsed layer vary."""
    return tuple(d for d, n in enumerate(layer.shape) if n > 1)


def absent(layer: Tensor, layers: Iterable[Tensor]) -> bool:
    """Tell whether a layer is none of some others, by identity."""
    return not any(layer is other for other in layers)


def collapse(layer: Tensor) -> Tensor:
    """Shrink to size 1 every axis along which the labels do not vary."""
    for d in range(layer.dim()):
        if layer.shape[d] > 1 and layer.stride(d) == 0:
            layer = layer.narrow(d, 0, 1)
    for d in range(layer.dim()):
        head = layer.narrow(d, 0, 1) if layer.shape[d] else layer
        if layer.shape[d] > 1 and torch.equal(layer, head.expand_as(layer)):
            layer = head
    return layer


class LabelRun:
    """The labels of every live tensor during one run of a network.

    Args:
        tensors: Parameters and buffers by qualified name; the floating-point ones get labels.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.book = Ledger()
        self.node = ""
        self._labels = WeakTensorKeyDictionary()
        self._names = WeakTensorKeyDictionary()
        self._dense_axes: dict[str, Tensor] = {}
        self._placed: dict[int, Tensor] = {}
        self._sharing: dict[int, list[weakref.ref[Tensor]]] = {}
        self.rows: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
        for name, tensor in tensors:
            if tensor.is_floating_point() and tensor not in self._names:
                self._start(name, tensor)

    def _start(self, name: str, tensor: Tensor) -> None:
        layers = []
        for d, n in enumerate(tensor.shape):
            labels = self.book.new(n)
            self.book.axes.append(TensorAxis(name, d, labels.numpy()))
            layer = labels.view([-1 if e == d else 1 for e in range(tensor.dim())])
            self._place(layer)
            if n > 1:
                layers.append(layer)
        self._names[tensor] = name
        self._labels[tensor] = Labels(tuple(layers), sources=(name,))

    def open(self, tensor: Tensor, dim: int) -> None:
        """Label the units along one axis of an input, which would otherwise have to stay."""
        labels = self.book.new(tensor.shape[dim])
        if len(labels) > 1:
            layer = labels.view([-1 if d == dim else 1 for d in range(tensor.dim())])
            self.put(tensor, Labels((layer,)))

    def _place(self, layer: Tensor) -> None:
        if id(layer) not in self._placed:  # an elementwise operator hands its input's layer on
            self._placed[id(layer)] = layer
            self.book.place(layer)

    def of(self, tensor: Any) -> Labels:
        """Return what is known of a tensor; of an unknown one, that it must stay as it is."""
        return self._labels.get(tensor) or Labels()

    def put(self, tensor: Tensor, labels: Labels) -> None:
        """Note the labels of an operator's output (parameters keep their own)."""
        for layer in labels.layers:
            self._place(layer)
        if tensor not in self._names:
            self._labels[tensor] = labels
            shared = self._sharing.setdefault(tensor.untyped_storage().data_ptr(), [])
            shared[:] = [r for r in shared if r() is not None and r() is not tensor]
            shared.append(weakref.ref(tensor))

    def is_parameter(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a parameter or buffer itself, not computed from one."""
        return tensor in self._names

    def written(self, tensor: Tensor, labels: Labels) -> None:
        """Take note that a tensor was written in place: its views may now hold other units.

        Writing that moves no unit (an activation in place) changes nothing. Otherwise whatever
        shares the memory is fixed, and so is what was written.
        """
        known = self.of(tensor)
        pairs = zip(known.layers, labels.layers)
        alike = len(known.layers) == len(labels.layers) and all(torch.equal(*p) for p in pairs)
        if alike and known.fill == labels.fill:
            return
        for reference in self._sharing.get(tensor.untyped_storage().data_ptr(), ()):
            other = reference()
            if other is not None and other is not tensor:
                reason = "memory that is written through a view"
                self.freeze([*self.of(other).layers, *labels.layers], reason)
                self._labels[other] = Labels()

    def freeze(self, layers: Sequence[Tensor], reason: str) -> None:
        """Freeze the units of some layers, naming the node that runs."""
        for layer in layers:
            self.book.freeze(layer, self.node, reason)

    def freeze_unused(self) -> None:
        """Freeze the tensors that no operator took: values kept from before may hide them."""
        used = {name for names in self.book.tensors.values() for name in names}
        for axis in self.book.axes:
            if axis.tensor not in used:
                self.book.frozen.append((axis.labels, "", "a tensor that no operator takes"))

    def dense_axis(self, weight: Tensor, dim: int, labels: Tensor, groups: int) -> None:
        """Label the input axis of a grouped convolution with the units it reads.

        A grouped weight stores `in / groups` positions; the units differ from group to group, so
        the axis is kept in its dense form, one label per input channel.
        """
        name = self._names.get(weight)
        if name is None:
            self.freeze([labels], "read by a grouped convolution whose weight is computed")
        elif name in self._dense_axes:
            self.book.tie(self._dense_axes[name], labels)
        else:
            self._dense_axes[name] = labels
            self.book.axes[:] = [a for a in self.book.axes if (a.tensor, a.dim) != (name, dim)]
            self.book.axes.append(TensorAxis(name, dim, labels.numpy(), groups))
            self._place(labels)

    def uses(self, tensors: Iterable[Any], contracted: bool = False) -> None:
        """Note the parameters that the running node touches, and whether it sums over them."""
        for tensor in tensors:
            notes = self.book.weights if contracted else self.book.tensors
            for name in self.of(tensor).sources:
                names = notes.setdefault(self.node, [])
                if name not in names:
                    names.append(name)
