"""Unit labels on tensors, the rule by which labels meet, and the ledger that keeps them.

Each axis of a parameter starts with a new label at every position. The real network then runs
once, and each operator is repeated on labels (`operators`). A tensor has any number of *layers* of
labels: integer tensors of its own rank, of size 1 along each axis on which the labels do not vary.
The label `NOTHING` marks places that hold zero (padding), `FIXED` those that must stay as they
are.

`merge`: labels that meet at one place of an elementwise operator are one unit. The ledger says
which labels are one unit, which units must stay in place and which travel together: all that
`_solve` needs to find the spaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..ir import Place
from ._values import Values

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
    REPEATS = auto()  # gives one value along every axis along which its inputs have one
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
        written: Labels along values that are made of the inputs. A parameter axis with some of them
            that is read elsewhere, as that of a tied embedding, counts as written.
        updated: The buffers that the network itself writes to as it runs.
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
    written: list[np.ndarray] = field(default_factory=list)
    updated: frozenset[str] = frozenset()

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


@dataclass(frozen=True)
class Labels:
    """The units in one tensor, as far as they are known.

    Attributes:
        layers: Label tensors of the tensor's rank, collapsed where they do not vary.
        fill: What the places without a label hold: `FIXED` (data) or `NOTHING` (one constant).
        sources: The parameters it was computed from; empty once activations are mixed in.
        owed: Units that must stay if the tensor is ever read, with the reason.
        loose: Layers whose units are to be tied if they are read as they are: labels, and for each
            place a number. Units at places of one number are tied. Where parts of the tensor are
            taken out first, fewer are.
    """

    layers: tuple[Tensor, ...] = ()
    fill: int = FIXED
    sources: tuple[str, ...] = ()
    owed: tuple[tuple[Tensor, str], ...] = ()
    loose: tuple[tuple[Tensor, Tensor], ...] = ()


def varying(layer: Tensor) -> tuple[int, ...]:
    """Return the axes along which the labels of a collapsed layer vary."""
    return tuple(d for d, n in enumerate(layer.shape) if n > 1)


def absent(layer: Tensor, layers: Iterable[Tensor]) -> bool:
    """Tell whether a layer is not among some others, by identity."""
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
        tensors: Parameters and buffers whose units may move, by qualified name; numbers and
            truth values get labels, counts do not.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.ledger = Ledger()
        self.node = ""
        self._labels = WeakTensorKeyDictionary()
        self._names = WeakTensorKeyDictionary()
        self._even = WeakTensorKeyDictionary()
        self._dense_axes: dict[str, Tensor] = {}
        self._placed: dict[int, Tensor] = {}
        self._reached: dict[int, Tensor] = {}
        self.values = Values(self._freeze_tensors)
        self.rows: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
        for name, tensor in tensors:
            if (
                tensor.is_floating_point() or tensor.dtype == torch.bool
            ) and tensor not in self._names:
                self._start(name, tensor)

    def _start(self, name: str, tensor: Tensor) -> None:
        layers = []
        for d, n in enumerate(tensor.shape):
            labels = self.ledger.new(n)
            self.ledger.axes[name, d] = labels.numpy()
            layer = labels.view([-1 if e == d else 1 for e in range(tensor.dim())])
            self._place(layer)
            if n > 1:
                layers.append(layer)
        self._names[tensor] = name
        self._labels[tensor] = Labels(tuple(layers), sources=(name,))

    def open(self, tensor: Tensor, dim: int) -> None:
        """Label the units along one axis of an input, which would otherwise have to stay."""
        labels = self.ledger.new(tensor.shape[dim])
        if len(labels) > 1:
            layer = labels.view([-1 if d == dim else 1 for d in range(tensor.dim())])
            self.put(tensor, Labels((layer,)))

    def _place(self, layer: Tensor) -> None:
        if id(layer) not in self._placed:  # an elementwise operator hands its input's layer on
            self._placed[id(layer)] = layer
            self.ledger.place(layer)

    def of(self, tensor: Any) -> Labels:
        """Return the labels of a tensor that is read; one without labels must stay as it is."""
        labels = self.held(tensor)
        if labels.owed or labels.loose:
            for layer, reason in labels.owed:
                self.freeze([layer], reason)
            settled = [self._settled(*pair) for pair in labels.loose]
            layers = (*labels.layers, *(x for x in settled if varying(x)))
            labels = Labels(layers, labels.fill, labels.sources)
            self.put(tensor, labels)
        return labels

    def held(self, tensor: Any) -> Labels:
        """Return the labels of a tensor as long as it is not read."""
        return self._labels.get(tensor) or Labels()

    def _settled(self, layer: Tensor, lanes: Tensor) -> Tensor:
        """Tie the units of a loose layer at the places of one number."""
        self.reach_layers([layer])
        layer, lanes = torch.broadcast_tensors(layer, lanes)
        numbers, lane = torch.unique(lanes, return_inverse=True)
        first = torch.zeros(len(numbers), dtype=layer.dtype)
        first.scatter_reduce_(0, lane.flatten(), layer.flatten(), "amax")
        self.ledger.tie(layer, first[lane])
        return collapse(first[lane])

    def put(self, tensor: Tensor, labels: Labels) -> None:
        """Give the output of an operator its labels; parameters keep their own."""
        for layer in labels.layers:
            self._place(layer)
        if tensor not in self._names:
            self._labels[tensor] = labels

    def extents(self, tensor: Tensor) -> tuple[int, ...]:
        """Return a tensor's shape, with size 1 along the axes that only repeat one value.

        These are known by how it was made, and of a constant by its values.
        """
        if tensor.layout is not torch.strided:
            return tuple(tensor.shape)  # of a sparse tensor, which repeats nothing in memory
        even = self._even.get(tensor, ())
        shape = list(tensor.shape)
        for d, (n, step) in enumerate(zip(tensor.shape, tensor.stride())):
            if n > 1 and (not step or d in even):
                shape[d] = 1
            elif n > 1 and not self.values.varies(tensor) and self.held(tensor) == Labels():
                head = tensor.narrow(d, 0, 1)
                shape[d] = 1 if torch.equal(tensor, head.expand_as(tensor)) else n
        return tuple(shape)

    def repeats(self, tensor: Tensor, operands: Iterable[Tensor]) -> None:
        """Note that a tensor repeats one value along the axes along which its operands do."""
        rank = tensor.dim()
        lead = [(1,) * (rank - t.dim()) + self.extents(t) for t in operands]
        self._even[tensor] = {d for d in range(rank) if all(n[d] == 1 for n in lead)}

    def is_parameter(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a parameter or buffer itself, not computed from one."""
        return tensor in self._names

    def written(self, tensor: Tensor, labels: Labels) -> None:
        """Account for a tensor that was written in place: its views may now hold other units.

        If it holds the same units as before (an activation in place), nothing changes. Otherwise
        whatever shares the memory has the new units where they were written. It is fixed if these
        cannot be told, and so is what was written.
        """
        before = self.of(tensor)
        pairs = zip(before.layers, labels.layers)
        same = len(before.layers) == len(labels.layers) and all(torch.equal(*p) for p in pairs)
        if same and before.fill == labels.fill:
            return
        others, reason = self.values.sharing(tensor), "memory that is written through a view"
        for each in (tensor, *others):
            self._even.pop(each, None)
        for other in others:
            partly = self._partly_written(other, tensor, labels)
            if partly is None:
                self.freeze([*self.of(other).layers, *labels.layers], reason)
            self.put(other, partly or Labels())
        if tensor in self._names:
            reason = "a tensor of the state that is written to"
            self.freeze([*before.layers, *labels.layers], reason)

    def _partly_written(self, tensor: Tensor, part: Tensor, labels: Labels) -> Labels | None:
        """Return the labels of a tensor once others were written to a part of its memory.

        None if they cannot be told: of state, and where several spaces lie along a tensor.
        """
        pairs = ((tensor, self.held(tensor)), (part, labels))
        if any(
            t in self._names
            or len(held.layers) > 1
            or held.owed
            or held.loose
            or t.dtype != tensor.dtype
            or not all(step for n, step in zip(t.shape, t.stride()) if n > 1)
            for t, held in pairs
        ):
            return None
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        memory = torch.full((size,), FIXED)
        for t, held in pairs:
            layer = held.layers[0].expand(t.shape) if held.layers else torch.tensor(held.fill)
            memory.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(layer)
        layer = memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        layer = collapse(torch.where((layer == NOTHING) & (tensor.cpu() != 0), FIXED, layer))
        if varying(layer):
            return Labels((layer,))
        return Labels(fill=NOTHING if bool((layer == NOTHING).all()) else FIXED)

    def freeze(self, layers: Sequence[Tensor], reason: str) -> None:
        """Freeze the units of some layers on behalf of the running node."""
        for layer in layers:
            self.ledger.freeze(layer, self.node, reason)

    def reach(self, tensors: Iterable[Tensor]) -> None:
        """Note the units that an operator works with, and does not only hand on."""
        for tensor in tensors:
            self.reach_layers(self.of(tensor).layers)

    def reach_layers(self, layers: Iterable[Tensor]) -> None:
        """Note the units of some layers as those that an operator works with."""
        self._reached.update((id(layer), layer) for layer in layers)

    def _freeze_tensors(self, tensors: Iterable[Tensor], reason: str) -> None:
        for tensor in tensors:
            self.freeze(self.of(tensor).layers, reason)

    def freeze_unused(self) -> None:
        """Freeze what no operator took: values computed earlier, or longer inputs, depend on it."""
        used = {name for names in self.ledger.tensors.values() for name in names}
        reached = np.zeros(self.ledger.size, dtype=bool)
        for layer in self._reached.values():
            reached[layer.numpy()] = True
        for (tensor, _), labels in self.ledger.axes.items():
            if tensor not in used:
                self.ledger.frozen.append((labels, "", "a tensor that no operator takes"))
            elif not reached[labels].all():
                reason = "places of a table that this example does not reach"
                self.ledger.frozen.append((labels[~reached[labels]], "", reason))

    def dense_axis(self, weight: Tensor, dim: int, labels: Tensor, groups: int) -> None:
        """Label the axis of a grouped convolution's weight on which groups take turns.

        It stores `in / groups` positions (`out / groups` if transposed), but each group has other
        units there. The axis therefore gets its dense form, with one label for each channel.
        """
        name = self._names[weight]
        if name in self._dense_axes:
            self.ledger.tie(self._dense_axes[name], labels)
        else:
            self._dense_axes[name] = labels
            del self.ledger.axes[name, dim]  # the dense axis goes to the end
            self.ledger.axes[name, dim] = labels.numpy()
            self.ledger.grouped[name, dim] = groups
            self._place(labels)

    def uses(self, tensors: Iterable[Any], contracted: bool = False) -> None:
        """Note the parameters that the running node touches, or those that it contracts."""
        by_node = self.ledger.weights if contracted else self.ledger.tensors
        for tensor in tensors:
            for name in self.held(tensor).sources:
                names = by_node.setdefault(self.node, [])
                if name not in names:
                    names.append(name)


Operand = tuple[Labels, tuple[int, ...]]  # labels of a tensor, and its shape


def operand(run: LabelRun, tensor: Tensor) -> Operand:
    """Return what is to be merged of a tensor."""
    return run.of(tensor), tuple(tensor.shape)


def merge(run: LabelRun, operands: Sequence[Operand], rank: int) -> Labels:
    """Combine tensors place by place, broadcasting from the right.

    Layers that vary along the same axes are tied. If a layer varies along more axes than another
    operand's, its units become members of blocks, the units of the other. Where another operand
    varies along an axis without labels, units stay in their rows along it; a layer with no other
    axis is frozen, and not handed on.

    Args:
        run: The run.
        operands: Labels and shape of each tensor.
        rank: Rank of the result.
    """
    operands = [_align(labels, shape, rank) for labels, shape in operands]
    operands, apart = _join_if_met(run, operands)
    by_axes: dict[tuple[int, ...], dict[int, Tensor]] = {}
    for i, (labels, _) in enumerate(operands):
        for layer in labels.layers:
            by_axes.setdefault(varying(layer), {})[i] = layer
    result = []
    for axes, holders in by_axes.items():
        layer = _tie_all(run, list(holders.values()))
        others = [o for i, o in enumerate(operands) if i not in holders and o[0].fill == FIXED]
        if all([_meet(run, layer, o) for o in others]):
            refined = any(set(varying(x)) > set(axes) for o in others for x in o[0].layers)
            result += [] if refined else [layer]  # a finer layer knows its blocks
    fill = NOTHING if all(o[0].fill == NOTHING for o in operands) else FIXED
    sources = [o[0].sources for o in operands]
    return Labels((*result, *apart), fill, sum(sources, ()) if all(sources) else ())


def _meet(run: LabelRun, layer: Tensor, other: Operand) -> bool:
    """Let a layer meet an operand without one along the same axes; tell whether it is handed on."""
    labels, shape = other
    axes = set(varying(layer))
    unlabelled = {d for d in axes if shape[d] > 1}
    for x in labels.layers:
        if set(varying(x)) < axes:
            run.ledger.group(x.flatten(), _rows(layer, varying(x)))
        if set(varying(x)) < axes or set(varying(x)) > axes:
            unlabelled -= set(varying(x))
    reason = "meets values that vary along its axis without being its units"
    return _hold(run, layer, unlabelled, reason)


def _hold(run: LabelRun, layer: Tensor, axes: set[int], reason: str) -> bool:
    """Keep the units of a layer in their rows along some axes; tell whether any may still move."""
    if axes == set(varying(layer)):
        run.freeze([layer], reason)
    elif axes:
        run.freeze([rows_over(run, layer, tuple(sorted(axes)))], reason)
    return axes != set(varying(layer))


def _join_if_met(run: LabelRun, operands: list[Operand]) -> tuple[list[Operand], list[Tensor]]:
    """Join the layers along one axis of an operand if another meets them; else set them apart."""
    joined, apart = [], []
    for i, (labels, shape) in enumerate(operands):
        layers = []
        for axes, alike in along_same_axes(labels.layers).items():
            others = [o for j, o in enumerate(operands) if j != i and o[0].fill == FIXED]
            if len(alike) == 1:
                layers += alike
            elif any(o[1][d] > 1 for o in others for d in axes):
                layers += [joint(run, alike)]
            else:
                apart += alike
        joined.append((Labels(tuple(layers), labels.fill, labels.sources), shape))
    return joined, apart


def along_same_axes(layers: Sequence[Tensor]) -> dict[tuple[int, ...], list[Tensor]]:
    """Sort layers by the axes along which they vary."""
    by_axes: dict[tuple[int, ...], list[Tensor]] = {}
    for layer in layers:
        by_axes.setdefault(varying(layer), []).append(layer)
    return by_axes


def joint(run: LabelRun, layers: Sequence[Tensor]) -> Tensor:
    """Join several layers along the same axes into one, as flattening two axes makes them.

    Each combination of labels is a new unit, and each old label is a block of such units.
    """
    if len(layers) == 1:
        return layers[0]
    layers = torch.broadcast_tensors(*layers)
    places = torch.stack([x.flatten() for x in layers])
    combinations, which = torch.unique(places, dim=1, return_inverse=True)
    units = run.ledger.new(combinations.shape[1])
    units[(combinations == NOTHING).any(0)] = NOTHING
    for labels in combinations:
        run.ledger.group_each(labels, units)
    return units[which].view(layers[0].shape)


def _align(labels: Labels, shape: tuple[int, ...], rank: int) -> Operand:
    lead = (1,) * (rank - len(shape))
    layers = tuple(x.view(lead + tuple(x.shape)) for x in labels.layers)
    return Labels(layers, labels.fill, labels.sources), lead + tuple(shape)


def _tie_all(run: LabelRun, layers: list[Tensor]) -> Tensor:
    first = layers[0]
    for other in layers[1:]:
        tied = run.ledger.tie(first, other)
        first = first if torch.equal(tied, first) else tied
    return first


def _rows(layer: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the labels as `(places along axes, labels at each place)`."""
    rest = [d for d in range(layer.dim()) if d not in axes]
    return layer.permute(*axes, *rest).reshape(int(np.prod([layer.shape[d] for d in axes])), -1)


def rows_over(run: LabelRun, layer: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Make a block of the units at each place along `axes`; return the layer of block labels.

    Places with the same units (windows that repeat heads) are the same block; one unit among zeros
    is its own.
    """
    if (id(layer), axes) in run.rows:
        return run.rows[id(layer), axes][1]
    rows = _rows(layer, axes)
    unique, inverse = np.unique(rows.numpy(), axis=0, return_inverse=True)
    units = torch.from_numpy(unique)
    alone = ((units == NOTHING) | (units == units.amax(1, keepdim=True))).all(1)
    blocks = torch.where(alone, units.amax(1), run.ledger.new(len(unique)))
    run.ledger.group(blocks[~alone], units[~alone])
    shape = [n if d in axes else 1 for d, n in enumerate(layer.shape)]
    labels = blocks[torch.from_numpy(inverse.reshape(-1))].view(shape)
    run.rows[id(layer), axes] = layer, labels
    return labels
