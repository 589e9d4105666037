"""What operators do to unit labels: one rule for each kind of operator.

A rule takes an `Op` (a call with its arguments by name) and the run, and returns the `Labels` of
each output, or those of all outputs. `operators` says which operator has which rule. Here are
those of operators that move data (views, slices, joins, look-ups), which run on the label tensors
themselves, and of those that take one value at a time. `_along` and `_products` have the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ._labels import (
    NOTHING,
    LabelRun,
    Labels,
    Operand,
    absent,
    along_same_axes,
    collapse,
    merge,
    operand,
    varying,
)


@dataclass(frozen=True)
class Op:
    """One call of an ATen operator, with every argument by its name in the schema.

    Attributes:
        func: The operator.
        name: Its name; an in-place operator of ATen goes by its plain name, one of another library
            by its qualified name.
        args: Its arguments.
        out: What it returned.
        before: The shape of the first tensor before the call, which may change it.
    """

    func: Any
    name: str
    args: dict[str, Any]
    out: Any
    before: tuple[int, ...] = ()

    def __getitem__(self, key: str) -> Any:
        return self.args.get(key)

    @classmethod
    def of(
        cls,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        out: Any,
        before: tuple[int, ...] = (),
    ) -> Op:
        """Name the arguments of a call."""
        names = [a.name for a in func._schema.arguments]
        name = func._overloadpacket.__name__
        if func.namespace != "aten":
            name = func._schema.name
        elif func._schema.is_mutable:
            name = name.rstrip("_")
        return cls(func, name, {**dict(zip(names, args)), **kwargs}, out, before)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, those in lists included."""
        return [t for t in tree_leaves(self.args) if isinstance(t, Tensor)]

    @property
    def written(self) -> list[Tensor]:
        """The tensors among the arguments that the operator writes to, as its schema says."""
        writes = [a.name for a in self.func._schema.arguments if a.is_write]
        return [t for t in tree_leaves([self[name] for name in writes]) if isinstance(t, Tensor)]

    def dims(self, rank: int) -> tuple[int, ...]:
        """Return the axes that a reduction runs over; all of them if none is given."""
        dim = self.args.get("dim", self.args.get("dims"))
        if dim is None or dim == []:
            return tuple(range(rank))
        return tuple(d % max(rank, 1) for d in ([dim] if isinstance(dim, int) else dim))


# --- without a rule -----------------------------------------------------------------------------


def unknown(run: LabelRun, op: Op) -> Labels:
    """Freeze everything that an operator without a rule takes."""
    return fixed(run, op, f"no rule for {op.func}")


def fixed(run: LabelRun, op: Op, reason: str) -> Labels:
    """Freeze every unit of every tensor that an operator takes."""
    for tensor in op.tensors:
        run.freeze(run.of(tensor).layers, reason)
    return Labels()


# --- data that moves or stays -------------------------------------------------------------------

VIEWS = {"view", "_unsafe_view", "_reshape_alias", "reshape"}


def unchanged(run: LabelRun, op: Op) -> Labels:
    """The output holds what the first tensor holds."""
    return run.held(op.tensors[0])


def constant(run: LabelRun, op: Op) -> Labels:
    """One value everywhere: no unit differs from another."""
    return Labels(fill=NOTHING)


def opaque(run: LabelRun, op: Op) -> Labels:
    """New values, another at each place; or values without a meaning."""
    return Labels()


def move(run: LabelRun, op: Op) -> Labels | list[Labels]:
    """Values go to other places, and their units with them: it is run on the labels."""
    key, tensor = next((k, v) for k, v in op.args.items() if isinstance(v, Tensor))
    labels = run.of(tensor) if op.name == "constant_pad_nd" else run.held(tensor)
    if any(run.values.varies(t) for t in op.tensors if t is not tensor):
        labels = _without_picked(run, run.of(tensor), {op["dim"] % tensor.dim()})
    several = not isinstance(op.out, Tensor)

    def moved(layer: Tensor) -> list[Tensor]:
        result = _on_labels(op, key, layer, op.before or tuple(tensor.shape))
        return [collapse(part) for part in (result if several else [result])]

    layers = [moved(layer) for layer in labels.layers]
    for part in zip(*layers):
        freeze_partial(run, part)
    loose = [tuple(zip(*(moved(x) for x in pair))) for pair in labels.loose]
    outputs = [
        Labels(
            tuple(still_varying(run, [x[i] for x in layers])),
            labels.fill,
            labels.sources,
            labels.owed,
            tuple(x[i] for x in loose),
        )
        for i in range(len(op.out) if several else 1)
    ]
    return outputs if several else outputs[0]


def still_varying(run: LabelRun, layers: list[Tensor]) -> list[Tensor]:
    """Return the layers that still vary. A unit that was taken out alone is noted as different."""
    for layer in layers:
        if layer.numel() and not varying(layer):
            run.ledger.place(layer)
    return [layer for layer in layers if varying(layer)]


def freeze_partial(run: LabelRun, layers: Sequence[Tensor]) -> None:
    """Freeze the layers along one axis of which not every combination of units is there.

    A diagonal has the first row's value of the first column only: these two cannot move apart.
    """
    for alike in along_same_axes([x for x in layers if varying(x)]).values():
        if len(alike) > 1:
            places = torch.stack([x.flatten() for x in torch.broadcast_tensors(*alike)])
            counts = [len(units.unique()) for units in places]
            if places.unique(dim=1).shape[1] < math.prod(counts):
                run.freeze(alike, "picked from several axes at once")


def _on_labels(op: Op, key: str, layer: Tensor, shape: tuple[int, ...]) -> Any:
    """Run an operator with a layer of labels in the place of an argument of some shape."""
    if op.name in VIEWS:
        return layer.expand(shape).reshape(op.out.shape)
    args = {**op.args, key: layer.expand(shape)}
    if op.name == "constant_pad_nd":  # a border beside the units is the same for all of them
        args["pad"] = [n if layer.shape[-1 - i // 2] > 1 else 0 for i, n in enumerate(op["pad"])]
        args |= {"value": NOTHING, key: layer}
    args = tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, args)  # labels live there
    keywords = {a.name for a in op.func._schema.arguments if a.kwarg_only}
    positional = [v for k, v in args.items() if k not in keywords]
    return op.func(*positional, **{k: v for k, v in args.items() if k in keywords})


def patches(run: LabelRun, op: Op) -> Labels:
    """Patches around each place, laid out along the channels: the places hold the same units."""
    labels, axis = run.of(op["self"]), op["self"].dim() - 3
    size, layers = op["kernel_size"][0] * op["kernel_size"][1], []
    for layer in labels.layers:
        if max(varying(layer)) > axis:
            run.freeze([layer], "units along places that are cut into patches")
        else:
            spread = layer.repeat_interleave(size if layer.shape[axis] > 1 else 1, axis)
            layers.append(spread.squeeze(-1))
    return Labels(tuple(layers), sources=labels.sources)


def folded(run: LabelRun, op: Op) -> Labels:
    """Patches summed where they overlap: the places of a patch hold the same units."""
    tensor = op["self"]
    axis, layers = tensor.dim() - 2, []
    patch = op["kernel_size"][0] * op["kernel_size"][1]
    for layer in run.of(tensor).layers:
        if varying(layer) == (axis,):
            units = layer.view(-1, patch)
            run.ledger.tie(units, units[:, :1])
            layers.append(units[:, 0].view(*[1] * axis, -1, 1, 1))
        elif set(varying(layer)) < set(range(axis)):
            layers.append(layer.unsqueeze(-1))
        else:
            run.freeze([layer], "units along the places of patches")
    return Labels(tuple(layers))


def as_complex(run: LabelRun, op: Op) -> Labels:
    """Pairs of real numbers become complex ones: both parts are one unit."""
    labels, layers = run.of(op["self"]), []
    for layer in labels.layers:
        if layer.shape[-1] > 1:
            run.ledger.tie(layer[..., :1], layer)
        layers.append(layer[..., 0])
    return Labels(tuple(x for x in layers if varying(x)), labels.fill, labels.sources)


def as_real(run: LabelRun, op: Op) -> Labels:
    """Complex numbers become pairs of real ones, which are one unit."""
    labels = run.of(op["self"])
    return Labels(tuple(x.unsqueeze(-1) for x in labels.layers), labels.fill, labels.sources)


def filled(run: LabelRun, op: Op) -> Labels:
    """One value written over units leaves them alike; over anything else it is new data."""
    labels = run.of(op["self"])
    return labels if labels.layers else Labels()


def copied(run: LabelRun, op: Op) -> Labels:
    """A copy into a tensor brings the labels of what is copied; one of the state keeps its own."""
    tensors = [op["self"], op["src"]] if run.is_parameter(op["self"]) else [op["src"]]
    return merge(run, [operand(run, t) for t in tensors], op.out.dim())


def restride(run: LabelRun, op: Op) -> Labels:
    """New strides are allowed if they mean the same row-major order of the same shape."""
    tensor, size = op["self"], tuple(op["size"])
    strides = [stride for n, stride in zip(size, op["stride"]) if n > 1]
    long = [n for n in size if n > 1]
    row_major = [int(torch.tensor(long[i + 1 :]).prod()) for i in range(len(long))]
    if size == tuple(tensor.shape) and strides == row_major:
        return run.of(tensor)
    return unknown(run, op)


# --- joins and look-ups -------------------------------------------------------------------------


def cat(run: LabelRun, op: Op) -> Labels:
    """Parts stand side by side; where units lie along another axis, those of all are tied."""
    tensors = [t for t in op["tensors"] if t.dim() == op.out.dim()]  # ATen skips empty vectors
    rank, dim = op.out.dim(), (op["dim"] or 0) % op.out.dim()
    labels = [run.of(t) for t in tensors]
    across = [
        (Labels(tuple(x for x in k.layers if x.shape[dim] == 1), k.fill, k.sources), _thin(t, dim))
        for k, t in zip(labels, tensors)
    ]
    along = [[x for x in k.layers if x.shape[dim] > 1] for k in labels]
    if not any(along):
        return _side_by_side(run, across, [t.shape[dim] for t in tensors], dim)
    kept = merge(run, across, rank)
    if any(len(layers) > 1 for layers in along):
        several = [x for layers in along for x in layers]
        run.freeze(several, "joined along an axis of several spaces")
        return kept
    shapes = [x.shape for layers in along for x in layers]
    common = [max(s[d] for s in shapes) for d in range(rank)]
    parts = []
    for k, t, layers in zip(labels, tensors, along):
        shape = [*common[:dim], t.shape[dim], *common[dim + 1 :]]
        parts.append((layers[0] if layers else torch.tensor(k.fill)).expand(shape))
    joined = collapse(torch.cat(parts, dim))
    return Labels((*kept.layers, joined), kept.fill, kept.sources)


def _side_by_side(
    run: LabelRun, parts: Sequence[Operand], sizes: Sequence[int], dim: int
) -> Labels:
    """Join parts along an axis along which their units do not vary.

    The units of all parts are the same, so far as the whole is read at once. Somebody may yet read
    the parts one by one, as the last states of a recurrent network's layers.
    """
    rank = len(parts[0][1])
    axes = {tuple(varying(x) for x in labels.layers) for labels, _ in parts}
    fills = {labels.fill for labels, _ in parts}
    layers = [labels.layers[0] for labels, _ in parts if labels.layers]
    alike = all(torch.equal(x, layers[0]) for x in layers)
    if len(axes) > 1 or len(next(iter(axes))) != 1 or len(fills) > 1 or alike:
        for labels, _ in parts:
            run.reach_layers(labels.layers)
        return merge(run, parts, rank)
    joined = [
        x.expand([n if d == dim else m for d, m in enumerate(x.shape)])
        for x, n in zip(layers, sizes)
    ]
    lanes = torch.arange(layers[0].numel()).view(layers[0].shape)
    sources = [labels.sources for labels, _ in parts]
    known = sum(sources, ()) if all(sources) else ()
    return Labels((), fills.pop(), known, loose=((torch.cat(joined, dim), lanes),))


def _thin(tensor: Tensor, dim: int) -> tuple[int, ...]:
    """Return the shape of a tensor with size 1 along an axis."""
    return tuple(1 if d == dim else n for d, n in enumerate(tensor.shape))


def stack(run: LabelRun, op: Op) -> Labels:
    """A new axis, then a join."""
    rank = op.out.dim()
    dim = (op["dim"] or 0) % rank
    parts = []
    for tensor in op["tensors"]:
        labels = run.of(tensor)
        layers = tuple(x.unsqueeze(dim) for x in labels.layers)
        parts.append((Labels(layers, labels.fill), (*tensor.shape[:dim], 1, *tensor.shape[dim:])))
    return _side_by_side(run, parts, [1] * len(parts), dim)


def lookup(run: LabelRun, op: Op) -> Labels:
    """Rows picked by number move, unless they are a parameter's or the number may be another."""
    tensor = op["weight"] if op.name == "embedding" else op["self"]
    labels = run.of(tensor)
    indices = [op["indices"]] if op.name == "embedding" else op["indices"]
    if labels.sources or any(run.values.varies(i) for i in indices if i is not None):
        labels = _without_picked(run, labels, _picked(indices))
    numbers = [x for i in indices if i is not None for x in run.of(i).layers]
    indices = [None if i is None else i.cpu() for i in indices]
    layers = [x.expand(tensor.shape) for x in labels.layers]
    moved = [collapse(torch.ops.aten.index.Tensor(x, indices)) for x in layers]
    freeze_partial(run, moved)
    labels = Labels(tuple(still_varying(run, moved)), labels.fill, labels.sources)
    if numbers and op.name == "embedding":  # each unit has a number, and then a vector
        row = (*[1] * op["indices"].dim(), tensor.shape[1])
        of_units = Labels(tuple(x.unsqueeze(-1) for x in numbers))
        return merge(run, [(labels, row), (of_units, (*op["indices"].shape, 1))], op.out.dim())
    run.freeze(numbers, "numbers of units, by which places are picked")
    return labels


def _picked(indices: Sequence[Tensor | None]) -> set[int]:
    """Return the axes along which places are picked; truth values pick along as many as they have.

    Args:
        indices: One for each axis or, of truth values, for several; None for an axis as it is.
    """
    axes, dim = set(), 0
    for index in indices:
        truth = index is not None and index.dtype in (torch.bool, torch.uint8)
        width = index.dim() if index is not None and truth else 1
        axes |= set() if index is None else set(range(dim, dim + width))
        dim += width
    return axes


def _without_picked(run: LabelRun, labels: Labels, dims: set[int]) -> Labels:
    """Freeze the units along axes where places are picked by number; return the other layers."""
    stay = [x for x in labels.layers if set(varying(x)) & dims]
    run.freeze(stay, "places picked by number")
    rest = tuple(x for x in labels.layers if absent(x, stay))
    return Labels(rest, labels.fill, labels.sources)


def gather(run: LabelRun, op: Op) -> Labels:
    """Places along an axis are picked by number, others for each unit along another axis."""
    tensor, index = op["self"], op["index"]
    dim = op["dim"] % max(tensor.dim(), 1)
    if _thin(tensor, dim) != _thin(index, dim):
        return unknown(run, op)
    labels = run.of(tensor)
    mixed = [x for x in labels.layers if dim in varying(x)]
    run.freeze(mixed, "units along an axis whose order counts")
    rest = Labels(tuple(x for x in labels.layers if absent(x, mixed)), labels.fill)
    return merge(run, [(rest, _thin(tensor, dim)), operand(run, index)], op.out.dim())


# --- one value at a time ------------------------------------------------------------------------


def elementwise(run: LabelRun, op: Op) -> Labels:
    """Tie the units that meet at the same place."""
    rank = op.out.dim() if isinstance(op.out, Tensor) else op.out[0].dim()
    return merge(run, [(run.of(t), run.extents(t)) for t in op.tensors], rank)


def loss(run: LabelRun, op: Op) -> Labels:
    """One value at a time, then perhaps a sum over all of them."""
    rank = max(t.dim() for t in op.tensors)
    labels = merge(run, [(run.of(t), run.extents(t)) for t in op.tensors], rank)
    return labels if op["reduction"] == 0 else Labels()


def glu(run: LabelRun, op: Op) -> Labels:
    """Units of the first half meet their gates in the second."""
    tensor, labels = op["self"], run.of(op["self"])
    dim = -1 if op["dim"] is None else op["dim"]
    halves: list[list[Tensor]] = [[], []]
    for layer in labels.layers:
        for layers, half in zip(halves, layer.expand(tensor.shape).chunk(2, dim)):
            layers += still_varying(run, [collapse(half)])
    shape = tuple(op.out.shape)
    sides = [(Labels(tuple(layers), labels.fill, labels.sources), shape) for layers in halves]
    return merge(run, sides, op.out.dim())


def on_channels(run: LabelRun, vector: Tensor, rank: int) -> Operand:
    """Lay a vector along axis 1 of a tensor of some rank."""
    shape = tuple(vector.numel() if d == 1 else 1 for d in range(rank))
    labels = run.of(vector)
    return Labels(tuple(x.view(shape) for x in labels.layers), labels.fill, labels.sources), shape
