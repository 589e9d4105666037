"""What operators do to unit labels: one function for each kind of operator.

A rule takes an `Op` (the call with its arguments by name) and the run, and returns the `Labels` of
each output. Operators that move data (views, slices, joins, padding, look-ups) run on the label
tensors themselves. Operators along an axis let units move where they treat all alike. Norms tie
per-channel tensors to the units they scale. Which operator has which rule stands in `operators`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ._labels import (
    LabelRun,
    Labels,
    absent,
    along_same_axes,
    collapse,
    contract,
    extents,
    joint,
    merge,
    rows_over,
    varying,
)
from ._ledger import FIXED, KERNEL, NOTHING


@dataclass(frozen=True)
class Op:
    """One call of an ATen operator, with every argument by its schema name."""

    func: Any
    name: str
    args: dict[str, Any]
    out: Any
    before: tuple[int, ...] = ()  # shape of the first tensor before the call, which may change it

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
        """Name the arguments of a call; an in-place operator goes by its plain name."""
        names = [a.name for a in func._schema.arguments]
        name = func._overloadpacket.__name__
        name = name.rstrip("_") if func._schema.is_mutable else name
        return cls(func, name, {**dict(zip(names, args)), **kwargs}, out, before)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, those in lists included."""
        return [t for t in tree_leaves(self.args) if isinstance(t, Tensor)]

    def dims(self, rank: int) -> tuple[int, ...]:
        """Return the axes a reduction runs over, all of them when none is given."""
        dim = self.args.get("dim", self.args.get("dims"))
        if dim is None or dim == []:
            return tuple(range(rank))
        return tuple(d % max(rank, 1) for d in ([dim] if isinstance(dim, int) else dim))


def unknown(run: LabelRun, op: Op) -> Labels:
    """Freeze everything that passes through an operator that has no rule."""
    return fixed(run, op, f"no rule for {op.func}")


def fixed(run: LabelRun, op: Op, reason: str) -> Labels:
    """Freeze every unit of every tensor that an operator takes."""
    for tensor in op.tensors:
        run.freeze(run.of(tensor).layers, reason)
    return Labels()


VIEWS = {"view", "_unsafe_view", "_reshape_alias", "reshape"}


def unchanged(run: LabelRun, op: Op) -> Labels:
    """Hand the labels of the first tensor on."""
    return run.of(op.tensors[0])


def constant(run: LabelRun, op: Op) -> Labels:
    """One value everywhere: no unit can be told from another."""
    return Labels(fill=NOTHING)


def opaque(run: LabelRun, op: Op) -> Labels:
    """New values that have a place each, or no meaning."""
    return Labels()


def move(run: LabelRun, op: Op) -> Labels | list[Labels]:
    """Run the operator itself on the label tensors of its first argument."""
    key, tensor = next((k, v) for k, v in op.args.items() if isinstance(v, Tensor))
    known, shape = run.of(tensor), op.before or tuple(tensor.shape)
    many = not isinstance(op.out, Tensor)
    count = len(op.out) if many else 1
    layers: list[list[Tensor]] = [[] for _ in range(count)]
    for layer in known.layers:
        moved = _rerun(op, key, layer, shape)
        for own, part in zip(layers, moved if many else [moved]):
            own.extend(alive(run, [collapse(part)]))
    outputs = [Labels(tuple(own), known.fill, known.sources) for own in layers]
    return outputs if many else outputs[0]


def alive(run: LabelRun, layers: list[Tensor]) -> list[Tensor]:
    """Return the layers that still vary; note that a unit taken out alone is unlike the others."""
    for layer in layers:
        if layer.numel() and not varying(layer):
            run.ledger.place(layer)
    return [layer for layer in layers if varying(layer)]


def _rerun(op: Op, key: str, layer: Tensor, shape: tuple[int, ...]) -> Any:
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
    """Places around each place, laid out along the channels: they hold the same units."""
    known, axis = run.of(op["self"]), op["self"].dim() - 3
    size, layers = op["kernel_size"][0] * op["kernel_size"][1], []
    for layer in known.layers:
        if max(varying(layer)) > axis:
            run.freeze([layer], "units along places that are cut into patches")
        else:
            spread = layer.repeat_interleave(size if layer.shape[axis] > 1 else 1, axis)
            layers.append(spread.squeeze(-1))
    return Labels(tuple(layers), sources=known.sources)


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


def filled(run: LabelRun, op: Op) -> Labels:
    """One value written over units leaves them alike; over anything else it is new data."""
    known = run.of(op["self"])
    return known if known.layers else Labels()


def copied(run: LabelRun, op: Op) -> Labels:
    """A copy into a tensor brings the labels of what is copied."""
    source = op["src"]
    return merge(run, [(run.of(source), tuple(source.shape))], op.out.dim())


def restride(run: LabelRun, op: Op) -> Labels:
    """Accept new strides only where they spell the same row-major order of the same shape."""
    tensor, size = op["self"], tuple(op["size"])
    steps = [st for n, st in zip(size, op["stride"]) if n > 1]
    extents = [n for n in size if n > 1]
    expected = [int(torch.tensor(extents[i + 1 :]).prod()) for i in range(len(extents))]
    if size == tuple(tensor.shape) and steps == expected:
        return run.of(tensor)
    return unknown(run, op)


def cat(run: LabelRun, op: Op) -> Labels:
    """Join label tensors; parts that join along another axis than their units are tied."""
    tensors = [t for t in op["tensors"] if t.dim() == op.out.dim()]  # ATen skips empty vectors
    rank, dim = op.out.dim(), (op["dim"] or 0) % op.out.dim()
    known = [run.of(t) for t in tensors]
    beside = [
        (Labels(tuple(x for x in k.layers if x.shape[dim] == 1), k.fill, k.sources), _thin(t, dim))
        for k, t in zip(known, tensors)
    ]
    kept = merge(run, beside, rank)
    along = [[x for x in k.layers if x.shape[dim] > 1] for k in known]
    if not any(along):
        return kept
    if any(len(layers) > 1 for layers in along):
        run.freeze(
            [x for layers in along for x in layers], "joined along an axis of several spaces"
        )
        return kept
    shapes = [x.shape for layers in along for x in layers]
    common = [max(s[d] for s in shapes) for d in range(rank)]
    parts = []
    for k, t, layers in zip(known, tensors, along):
        shape = [*common[:dim], t.shape[dim], *common[dim + 1 :]]
        parts.append((layers[0] if layers else torch.tensor(k.fill)).expand(shape))
    joined = collapse(torch.cat(parts, dim))
    return Labels((*kept.layers, joined), kept.fill, kept.sources)


def _thin(tensor: Tensor, dim: int) -> tuple[int, ...]:
    return tuple(1 if d == dim else n for d, n in enumerate(tensor.shape))


def stack(run: LabelRun, op: Op) -> Labels:
    """A new axis, then a join."""
    rank = op.out.dim()
    dim = (op["dim"] or 0) % rank
    parts = [
        (Labels(tuple(x.unsqueeze(dim) for x in run.of(t).layers), run.of(t).fill), t.shape)
        for t in op["tensors"]
    ]
    return merge(run, [(k, (*s[:dim], 1, *s[dim:])) for k, s in parts], rank)


def lookup(run: LabelRun, op: Op) -> Labels:
    """Rows picked from a table by number stay where they are; moved activations move."""
    tensor = op["weight"] if op.name == "embedding" else op["self"]
    known = run.of(tensor)
    indices = tree_map(lambda i: i.cpu() if isinstance(i, Tensor) else i, op["indices"])
    indices = [indices] if op.name == "embedding" else indices
    picked = [d for d, i in enumerate(indices) if i is not None]
    stay = [x for x in known.layers if known.sources and set(varying(x)) & set(picked)]
    run.freeze(stay, "rows of a table picked by number")
    going = [x.expand(tensor.shape) for x in known.layers if absent(x, stay)]
    moved = [collapse(torch.ops.aten.index.Tensor(x, indices)) for x in going]
    return Labels(tuple(alive(run, moved)), known.fill, known.sources)


WHOLE = {"argmax", "argmin", "median", "nanmedian"}  # over all axes, if none is given


def reduction(run: LabelRun, op: Op) -> Labels | list[Labels]:
    """A symmetric sum over units forgets them; over part of a layout it leaves their blocks."""
    tensor = op["self"]
    dims, kept = op.dims(tensor.dim()), []
    for layer in run.of(tensor).layers:
        axes = set(varying(layer))
        if not axes & set(dims):
            kept.append(layer)
        elif axes - set(dims):
            kept.append(rows_over(run, layer, tuple(sorted(axes - set(dims)))))
    out = op.out if isinstance(op.out, Tensor) else op.out[0]
    if out.dim() != tensor.dim():
        stay = [d for d in range(tensor.dim()) if d not in dims]
        kept = [x.reshape([x.shape[d] for d in stay]) for x in kept]
    labels = Labels(tuple(kept), run.of(tensor).fill, run.of(tensor).sources)
    return labels if isinstance(op.out, Tensor) else [labels] * len(op.out)


def ordered(run: LabelRun, op: Op) -> Labels | list[Labels]:
    """What goes by the order along an axis, or tells places there, fixes the units along it."""
    tensor, out = op["self"], op.out if isinstance(op.out, Tensor) else op.out[0]
    if op["dim"] is None and op.name in ("max", "min"):
        return reduction(run, op)
    known, rank = run.of(tensor), tensor.dim()
    dims = op.dims(rank) if op["dim"] is not None or op.name in WHOLE else (rank - 1,)
    mixed = [x for x in known.layers if set(varying(x)) & set(dims)]
    run.freeze(mixed, "units along an axis whose order counts")
    kept = [x for x in known.layers if absent(x, mixed)]
    if out.dim() != rank:
        kept = [x.squeeze(dims) for x in kept]
    labels = Labels(tuple(kept), known.fill)
    return labels if isinstance(op.out, Tensor) else [labels] * len(op.out)


def gather(run: LabelRun, op: Op) -> Labels:
    """Places picked along an axis, for each unit along another by numbers of its own."""
    tensor, index = op["self"], op["index"]
    dim = op["dim"] % tensor.dim()
    sizes, picked = (
        tuple(1 if d == dim else n for d, n in enumerate(t.shape)) for t in (tensor, index)
    )
    if sizes != picked:
        return unknown(run, op)
    known = run.of(tensor)
    mixed = [x for x in known.layers if dim in varying(x)]
    run.freeze(mixed, "units along an axis whose order counts")
    rest = Labels(tuple(x for x in known.layers if absent(x, mixed)), known.fill)
    return merge(run, [(rest, sizes), (run.of(index), tuple(index.shape))], op.out.dim())


def softmax(run: LabelRun, op: Op) -> Labels:
    """Normalising over units treats all of them alike; units of several rows form blocks."""
    tensor = op["self"]
    for layer in run.of(tensor).layers:
        rest = set(varying(layer)) - set(op.dims(tensor.dim()))
        if rest and rest != set(varying(layer)):
            rows_over(run, layer, tuple(sorted(rest)))
    return run.of(tensor)


def spatial(run: LabelRun, op: Op) -> Labels | list[Labels]:
    """Pooling and resampling act on the trailing axes, where units may not vary."""
    tensor = op.tensors[0]
    known, rank = run.of(tensor), tensor.dim()
    count = next(int(n) for n in re.findall(r"(\d)d", op.name))
    mixed = [x for x in known.layers if max(varying(x)) >= rank - count]
    run.freeze(mixed, "units laid out along a pooled axis")
    labels = Labels(tuple(x for x in known.layers if absent(x, mixed)), known.fill)
    return labels if isinstance(op.out, Tensor) else [labels] * len(op.out)


def batch_norm(run: LabelRun, op: Op) -> list[Labels]:
    """Per-channel statistics and affine parameters tie to axis 1."""
    rank = op["input"].dim()
    operands = [(run.of(op["input"]), tuple(op["input"].shape))]
    roles: dict[str, str | float] = {"eps": op["eps"] if op["eps"] is not None else op["epsilon"]}
    for key in ("weight", "bias", "running_mean", "running_var"):
        if op[key] is not None:
            operands.append(on_axis(run, op[key], 1, rank))
            roles.update((key, name) for name in run.of(op[key]).sources)
    if "running_mean" in roles and "running_var" in roles:
        run.ledger.norms[run.node] = roles
    return [merge(run, operands, rank)] + [Labels()] * (len(op.out) - 1)


def on_axis(run: LabelRun, vector: Tensor, dim: int, rank: int) -> tuple[Labels, tuple[int, ...]]:
    """Lay a vector along one axis of a tensor of some rank."""
    shape = tuple(vector.numel() if d == dim else 1 for d in range(rank))
    known = run.of(vector)
    return Labels(tuple(x.view(shape) for x in known.layers), known.fill, known.sources), shape


def weight_norm(run: LabelRun, op: Op) -> list[Labels]:
    """A weight scaled by its own norm keeps its units, and ties them to the scales."""
    operands = [(run.of(t), tuple(t.shape)) for t in (op["v"], op["g"])]
    return [merge(run, operands, op["v"].dim()), Labels()]


def layer_norm(run: LabelRun, op: Op) -> list[Labels]:
    """All normalised positions are treated alike, then scaled one by one."""
    tensor = op["input"]
    known = _told_apart(run.of(tensor))
    dims = set(range(tensor.dim() - len(op["normalized_shape"]), tensor.dim()))
    for layer in run.of(tensor).layers:
        rest = set(varying(layer)) - dims
        if rest and rest != set(varying(layer)):
            rows_over(run, layer, tuple(sorted(rest)))
    affine = [t for t in (op["weight"], op["bias"]) if t is not None]
    operands = [(known, tuple(tensor.shape)), *((run.of(t), tuple(t.shape)) for t in affine)]
    return [merge(run, operands, tensor.dim())] + [Labels()] * (len(op.out) - 1)


def _told_apart(labels: Labels) -> Labels:
    """Fix the empty places of a tensor whose other values are about to be mixed into them."""
    layers = tuple(torch.where(x == NOTHING, FIXED, x) for x in labels.layers)
    return Labels(layers, FIXED, labels.sources)


def group_norm(run: LabelRun, op: Op) -> list[Labels]:
    """Channels normalised together travel together."""
    tensor, groups = op["input"], op["group"]
    rank = tensor.dim()
    for layer in run.of(tensor).layers:
        if varying(layer) != (1,):
            run.freeze([layer], "units laid out along an axis that GroupNorm averages")
        elif groups > 1 and groups < tensor.shape[1]:
            rows_over(run, layer.view(groups, -1), (0,))
    affine = [on_axis(run, t, 1, rank) for t in (op["weight"], op["bias"]) if t is not None]
    operands = [(_told_apart(run.of(tensor)), tuple(tensor.shape)), *affine]
    return [merge(run, operands, rank)] + [Labels()] * (len(op.out) - 1)


# --- rules --------------------------------------------------------------------------------------


def pointwise(run: LabelRun, op: Op) -> Labels:
    """Tie the units that meet at the same place."""
    return merge(run, [(run.of(t), extents(t)) for t in op.tensors], op.out.dim())


def glu(run: LabelRun, op: Op) -> Labels:
    """Units of the first half meet their gates in the second."""
    tensor, known = op["self"], run.of(op["self"])
    dim = -1 if op["dim"] is None else op["dim"]
    halves: list[list[Tensor]] = [[], []]
    for layer in known.layers:
        for layers, half in zip(halves, layer.expand(tensor.shape).chunk(2, dim)):
            layers += alive(run, [collapse(half)])
    shape = tuple(op.out.shape)
    sides = [(Labels(tuple(layers), known.fill, known.sources), shape) for layers in halves]
    return merge(run, sides, op.out.dim())


def convolution(run: LabelRun, op: Op) -> Labels:
    """Contract the channels; kernel positions and spatial positions stay in place."""
    x, w, transposed, groups = op["input"], op["weight"], op["transposed"], op["groups"]
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    run.uses([w], contracted=True)
    known, weight = run.of(x), run.of(w).layers
    if groups > 1 and (transposed or not run.is_parameter(w)):
        return fixed(
            run, op, "a grouped convolution that is transposed or whose weight is computed"
        )
    channels, beside = _channels(run, op)
    run.freeze([la for la in weight if max(varying(la)) > 1], KERNEL)
    outs = [la.flatten() for la in weight if varying(la) == (out_dim,)]
    if groups == 1:
        ins = [la for la in weight if varying(la) == (in_dim,)]
        ins = [joint(run, ins).flatten()] if ins else []
        _read(run, [c.flatten() for c in channels], ins, known.fill)
    elif len(channels) != 1 or not outs:
        run.freeze([*channels, *weight], "a grouped convolution of what cannot be moved")
        outs = []
    else:
        labels = channels[0].flatten()
        run.dense_axis(w, in_dim, labels, groups)
        _group_channels(run, labels.view(groups, -1), outs[0].view(groups, -1))
    return _write(run, op, outs, beside)


def _channels(run: LabelRun, op: Op) -> tuple[list[Tensor], list[Tensor]]:
    """Return the layers along channels, one for all places, and those along places.

    Places are the axes that the convolution does not mix: the batch, and where its kernel has size
    1. What is computed alike in each of them ties the units of all places to each other.
    """
    known, rank = run.of(op["input"]), op["input"].dim()
    steps = zip(range(2, rank), op["weight"].shape[2:], op["stride"], op["padding"])
    places = {0, *(d for d, kernel, step, pad in steps if (kernel, step, pad) == (1, 1, 0))}
    beside = [x for x in known.layers if set(varying(x)) <= places]
    channels = [x for x in known.layers if {1} <= set(varying(x)) <= places | {1}]
    others = [x for x in known.layers if absent(x, [*beside, *channels])]
    run.freeze(others, "units along a convolved axis")
    first = [x[(slice(1), slice(None), *[slice(1)] * (rank - 2))] for x in channels]
    for layer, alike in zip(channels, first):
        run.ledger.tie(layer, alike)
    found = along_same_axes(first).values()
    return [joint(run, same) for same in found], beside


def _read(run: LabelRun, units: list[Tensor], ins: list[Tensor], fill: int) -> None:
    for read in ins:
        run.ledger.reads.append(read.numpy())
        for unit in units:
            run.ledger.tie(unit, read)
        if not units:
            run.freeze([read], "reads what cannot be moved")
    if not ins:
        run.freeze(units, "summed against values that are not its units")


def _group_channels(run: LabelRun, ins: Tensor, outs: Tensor) -> None:
    """A group is a block of its inputs and outputs; a group of one unit is that unit."""
    stuck = (ins == NOTHING).any(1) | (ins == FIXED).any(1)
    run.freeze([x[stuck] for x in (ins, outs) if stuck.any()], "a group that reads constants")
    ins, outs = ins[~stuck], outs[~stuck]
    blocks = ins[:, 0] if ins.shape[1] == 1 else run.ledger.new(len(ins))
    if ins.shape[1] > 1:
        run.ledger.group(blocks, ins)
    if outs.shape[1] == 1:
        run.ledger.tie(blocks, outs[:, 0])
    else:
        run.ledger.group(blocks, outs)


def _write(run: LabelRun, op: Op, outs: list[Tensor], beside: list[Tensor]) -> Labels:
    rank = op.out.dim()
    shape = [1, -1, *[1] * (rank - 2)]
    layers = (*(o.view(shape) for o in outs), *beside)
    operands = [(Labels(layers), tuple(op.out.shape))]
    if op["bias"] is not None:
        operands.append(on_axis(run, op["bias"], 1, rank))
    return merge(run, operands, rank)


def matmul(run: LabelRun, op: Op) -> Labels:
    """Matrix products with or without a batch, plus what is added to them."""
    a = op["mat1"] if op["mat1"] is not None else op["batch1"]
    a, b = (op["self"], op["mat2"]) if a is None else (a, op["mat2"])
    b = op["batch2"] if b is None else b
    run.uses([a, b], contracted=True)
    batch = "b" if a.dim() == 3 else ""
    product = contract(run, a, batch + "mk", b, batch + "kn", batch + "mn")
    if op.name in ("addmm", "baddbmm"):
        added = (run.of(op["self"]), tuple(op["self"].shape))
        product = merge(run, [(product, tuple(op.out.shape)), added], op.out.dim())
    return product


def matvec(run: LabelRun, op: Op) -> Labels:
    """Matrix times vector."""
    run.uses([op["self"], op["vec"]], contracted=True)
    return contract(run, op["self"], "mk", op["vec"], "k", "m")


def linear(run: LabelRun, op: Op) -> Labels:
    """`x W^T + b` over the last axis, where ATen keeps it in one piece."""
    x, w = op["input"], op["weight"]
    run.uses([w], contracted=True)
    lead = "abcdefgh"[: x.dim() - 1]
    product = contract(run, x, lead + "k", w, "nk", lead + "n")
    if op["bias"] is None:
        return product
    added = (run.of(op["bias"]), tuple(op["bias"].shape))
    return merge(run, [(product, tuple(op.out.shape)), added], op.out.dim())
