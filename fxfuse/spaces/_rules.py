"""What operators do to unit labels: one rule for each kind of operator.

A rule takes an `Op` (a call with its arguments by name) and the run, and returns the `Labels` of
each output, or those of all outputs. Operators that move data (views, slices, joins, look-ups) run
on the label tensors themselves. An operator that treats all places along an axis alike leaves the
units along it free; one that tells the places apart fixes them. `operators` says which operator has
which rule.
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
    FIXED,
    KERNEL,
    NOTHING,
    LabelRun,
    Labels,
    Operand,
    absent,
    along_same_axes,
    collapse,
    contract,
    extents,
    joint,
    merge,
    operand,
    rows_over,
    varying,
)


@dataclass(frozen=True)
class Op:
    """One call of an ATen operator, with every argument by its name in the schema.

    Attributes:
        func: The operator.
        name: Its name; an in-place operator goes by its plain name.
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
        name = name.rstrip("_") if func._schema.is_mutable else name
        return cls(func, name, {**dict(zip(names, args)), **kwargs}, out, before)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, those in lists included."""
        return [t for t in tree_leaves(self.args) if isinstance(t, Tensor)]

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
    return run.of(op.tensors[0])


def constant(run: LabelRun, op: Op) -> Labels:
    """One value everywhere: no unit differs from another."""
    return Labels(fill=NOTHING)


def opaque(run: LabelRun, op: Op) -> Labels:
    """New values, another at each place; or values without a meaning."""
    return Labels()


def move(run: LabelRun, op: Op) -> Labels | list[Labels]:
    """Run the operator itself on the label tensors of its first argument."""
    key, tensor = next((k, v) for k, v in op.args.items() if isinstance(v, Tensor))
    labels, shape = run.of(tensor), op.before or tuple(tensor.shape)
    several = not isinstance(op.out, Tensor)
    layers: list[list[Tensor]] = [[] for _ in range(len(op.out) if several else 1)]
    for layer in labels.layers:
        moved = _on_labels(op, key, layer, shape)
        for layers_of_output, part in zip(layers, moved if several else [moved]):
            layers_of_output += still_varying(run, [collapse(part)])
    outputs = [Labels(tuple(x), labels.fill, labels.sources) for x in layers]
    return outputs if several else outputs[0]


def still_varying(run: LabelRun, layers: list[Tensor]) -> list[Tensor]:
    """Return the layers that still vary. A unit that was taken out alone is noted as different."""
    for layer in layers:
        if layer.numel() and not varying(layer):
            run.ledger.place(layer)
    return [layer for layer in layers if varying(layer)]


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


def filled(run: LabelRun, op: Op) -> Labels:
    """One value written over units leaves them alike; over anything else it is new data."""
    labels = run.of(op["self"])
    return labels if labels.layers else Labels()


def copied(run: LabelRun, op: Op) -> Labels:
    """A copy into a tensor brings the labels of what is copied."""
    return merge(run, [operand(run, op["src"])], op.out.dim())


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
    """Join label tensors. Where the units lie along another axis, those of all parts are tied."""
    tensors = [t for t in op["tensors"] if t.dim() == op.out.dim()]  # ATen skips empty vectors
    rank, dim = op.out.dim(), (op["dim"] or 0) % op.out.dim()
    labels = [run.of(t) for t in tensors]
    across = [
        (Labels(tuple(x for x in k.layers if x.shape[dim] == 1), k.fill, k.sources), _thin(t, dim))
        for k, t in zip(labels, tensors)
    ]
    kept = merge(run, across, rank)
    along = [[x for x in k.layers if x.shape[dim] > 1] for k in labels]
    if not any(along):
        return kept
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
    return merge(run, parts, rank)


def lookup(run: LabelRun, op: Op) -> Labels:
    """Rows of a parameter picked by number stay in place; those of an activation move."""
    tensor = op["weight"] if op.name == "embedding" else op["self"]
    labels = run.of(tensor)
    indices = tree_map(lambda i: i.cpu() if isinstance(i, Tensor) else i, op["indices"])
    indices = [indices] if op.name == "embedding" else indices
    picked = [d for d, i in enumerate(indices) if i is not None]
    stay = [x for x in labels.layers if labels.sources and set(varying(x)) & set(picked)]
    run.freeze(stay, "rows of a table picked by number")
    rest = [x.expand(tensor.shape) for x in labels.layers if absent(x, stay)]
    moved = [collapse(torch.ops.aten.index.Tensor(x, indices)) for x in rest]
    return Labels(tuple(still_varying(run, moved)), labels.fill, labels.sources)


def gather(run: LabelRun, op: Op) -> Labels:
    """Places along an axis are picked by number, others for each unit along another axis."""
    tensor, index = op["self"], op["index"]
    dim = op["dim"] % tensor.dim()
    if _thin(tensor, dim) != _thin(index, dim):
        return unknown(run, op)
    labels = run.of(tensor)
    mixed = [x for x in labels.layers if dim in varying(x)]
    run.freeze(mixed, "units along an axis whose order counts")
    rest = Labels(tuple(x for x in labels.layers if absent(x, mixed)), labels.fill)
    return merge(run, [(rest, _thin(tensor, dim)), operand(run, index)], op.out.dim())


# --- along an axis ------------------------------------------------------------------------------

OVER_ALL = {"argmax", "argmin", "median", "nanmedian"}  # over all axes, if none is given


def reduction(run: LabelRun, op: Op) -> Labels:
    """A symmetric sum over units forgets them; over part of their axes, it leaves their blocks."""
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
    return Labels(tuple(kept), run.of(tensor).fill, run.of(tensor).sources)


def ordered(run: LabelRun, op: Op) -> Labels:
    """Whatever depends on the order along an axis fixes the units along it."""
    tensor, out = op["self"], op.out if isinstance(op.out, Tensor) else op.out[0]
    if op["dim"] is None and op.name in ("max", "min"):
        return reduction(run, op)
    labels, rank = run.of(tensor), tensor.dim()
    dims = op.dims(rank) if op["dim"] is not None or op.name in OVER_ALL else (rank - 1,)
    mixed = [x for x in labels.layers if set(varying(x)) & set(dims)]
    run.freeze(mixed, "units along an axis whose order counts")
    kept = [x for x in labels.layers if absent(x, mixed)]
    if out.dim() != rank:
        kept = [x.squeeze(dims) for x in kept]
    return Labels(tuple(kept), labels.fill)


def softmax(run: LabelRun, op: Op) -> Labels:
    """Normalising over units treats all of them alike; units of several rows form blocks."""
    tensor = op["self"]
    _make_rows(run, tensor, set(op.dims(tensor.dim())))
    return run.of(tensor)


def _make_rows(run: LabelRun, tensor: Tensor, dims: set[int]) -> None:
    """Keep units that lie along some axes and others in the rows that run along the former."""
    for layer in run.of(tensor).layers:
        rest = set(varying(layer)) - dims
        if rest and rest != set(varying(layer)):
            rows_over(run, layer, tuple(sorted(rest)))


def spatial(run: LabelRun, op: Op) -> Labels:
    """Pooling and resampling work along the trailing axes, where units may not vary."""
    tensor = op.tensors[0]
    labels, rank = run.of(tensor), tensor.dim()
    count = next(int(n) for n in re.findall(r"(\d)d", op.name))
    mixed = [x for x in labels.layers if max(varying(x)) >= rank - count]
    run.freeze(mixed, "units laid out along a pooled axis")
    return Labels(tuple(x for x in labels.layers if absent(x, mixed)), labels.fill)


# --- norms --------------------------------------------------------------------------------------


def batch_norm(run: LabelRun, op: Op) -> list[Labels]:
    """Statistics and affine parameters are tied to the channels, axis 1."""
    rank = op["input"].dim()
    operands = [operand(run, op["input"])]
    roles: dict[str, str | float] = {"eps": op["eps"] if op["eps"] is not None else op["epsilon"]}
    for key in ("weight", "bias", "running_mean", "running_var"):
        if op[key] is not None:
            operands.append(_on_channels(run, op[key], rank))
            roles.update((key, name) for name in run.of(op[key]).sources)
    if "running_mean" in roles and "running_var" in roles:
        run.ledger.norms[run.node] = roles
    return _first_of_several(op, merge(run, operands, rank))


def layer_norm(run: LabelRun, op: Op) -> list[Labels]:
    """All positions that are normalised together are treated alike, then scaled one by one."""
    tensor = op["input"]
    rank = tensor.dim()
    _make_rows(run, tensor, set(range(rank - len(op["normalized_shape"]), rank)))
    affine = [operand(run, t) for t in (op["weight"], op["bias"]) if t is not None]
    return _first_of_several(op, merge(run, [_with_fixed_padding(run, tensor), *affine], rank))


def group_norm(run: LabelRun, op: Op) -> list[Labels]:
    """Channels that are normalised together travel together."""
    tensor, groups = op["input"], op["group"]
    rank = tensor.dim()
    for layer in run.of(tensor).layers:
        if varying(layer) != (1,):
            run.freeze([layer], "units laid out along an axis that GroupNorm averages")
        elif groups > 1 and groups < tensor.shape[1]:
            rows_over(run, layer.view(groups, -1), (0,))
    affine = [_on_channels(run, t, rank) for t in (op["weight"], op["bias"]) if t is not None]
    return _first_of_several(op, merge(run, [_with_fixed_padding(run, tensor), *affine], rank))


def weight_norm(run: LabelRun, op: Op) -> list[Labels]:
    """A weight scaled by its own norm keeps its units, and ties them to the scales."""
    operands = [operand(run, op["v"]), operand(run, op["g"])]
    return _first_of_several(op, merge(run, operands, op["v"].dim()))


def _on_channels(run: LabelRun, vector: Tensor, rank: int) -> Operand:
    """Lay a vector along axis 1 of a tensor of some rank."""
    shape = tuple(vector.numel() if d == 1 else 1 for d in range(rank))
    labels = run.of(vector)
    return Labels(tuple(x.view(shape) for x in labels.layers), labels.fill, labels.sources), shape


def _with_fixed_padding(run: LabelRun, tensor: Tensor) -> Operand:
    """Fix the empty places of a tensor: a norm mixes the other values into them."""
    labels = run.of(tensor)
    layers = tuple(torch.where(x == NOTHING, FIXED, x) for x in labels.layers)
    return Labels(layers, FIXED, labels.sources), tuple(tensor.shape)


def _first_of_several(op: Op, labels: Labels) -> list[Labels]:
    """Label the first output of an operator; the others are statistics."""
    return [labels] + [Labels()] * (len(op.out) - 1)


# --- one value at a time ------------------------------------------------------------------------


def elementwise(run: LabelRun, op: Op) -> Labels:
    """Tie the units that meet at the same place."""
    return merge(run, [(run.of(t), extents(t)) for t in op.tensors], op.out.dim())


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


# --- contractions -------------------------------------------------------------------------------


def convolution(run: LabelRun, op: Op) -> Labels:
    """Contract the channels; positions in the kernel and in the image stay in place."""
    w, transposed, groups = op["weight"], op["transposed"], op["groups"]
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    run.uses([w], contracted=True)
    weight = run.of(w).layers
    if groups > 1 and (transposed or not run.is_parameter(w)):
        reason = "a grouped convolution that is transposed or whose weight is computed"
        return fixed(run, op, reason)
    channels, beside = _channels(run, op)
    run.freeze([layer for layer in weight if max(varying(layer)) > 1], KERNEL)
    outs = [layer.flatten() for layer in weight if varying(layer) == (out_dim,)]
    if groups == 1:
        ins = [layer for layer in weight if varying(layer) == (in_dim,)]
        ins = [joint(run, ins).flatten()] if ins else []
        _tie_inputs(run, [c.flatten() for c in channels], ins)
    elif len(channels) != 1 or not outs:
        run.freeze([*channels, *weight], "a grouped convolution of what cannot be moved")
        outs = []
    else:
        labels = channels[0].flatten()
        run.dense_axis(w, in_dim, labels, groups)
        _tie_groups(run, labels.view(groups, -1), outs[0].view(groups, -1))
    rank = op.out.dim()
    layers = (*(o.view([1, -1, *[1] * (rank - 2)]) for o in outs), *beside)
    operands = [(Labels(layers), tuple(op.out.shape))]
    if op["bias"] is not None:
        operands.append(_on_channels(run, op["bias"], rank))
    return merge(run, operands, rank)


def _channels(run: LabelRun, op: Op) -> tuple[list[Tensor], list[Tensor]]:
    """Return the layers along channels, one for all places, and the layers along places only.

    Places are the axes that the convolution does not mix: the batch, and each axis along which its
    kernel has size 1. As the convolution is the same at each place, the units of all places are
    tied.
    """
    labels, rank = run.of(op["input"]), op["input"].dim()
    settings = zip(range(2, rank), op["weight"].shape[2:], op["stride"], op["padding"])
    places = {0, *(d for d, kernel, step, pad in settings if (kernel, step, pad) == (1, 1, 0))}
    beside = [x for x in labels.layers if set(varying(x)) <= places]
    channels = [x for x in labels.layers if {1} <= set(varying(x)) <= places | {1}]
    others = [x for x in labels.layers if absent(x, [*beside, *channels])]
    run.freeze(others, "units along a convolved axis")
    first = [x[(slice(1), slice(None), *[slice(1)] * (rank - 2))] for x in channels]
    for layer, at_first_place in zip(channels, first):
        run.ledger.tie(layer, at_first_place)
    return [joint(run, alike) for alike in along_same_axes(first).values()], beside


def _tie_inputs(run: LabelRun, units: list[Tensor], ins: list[Tensor]) -> None:
    """Tie the units that a weight reads to the labels of its input axis."""
    for read in ins:
        run.ledger.reads.append(read.numpy())
        for unit in units:
            run.ledger.tie(unit, read)
        if not units:
            run.freeze([read], "reads what cannot be moved")
    if not ins:
        run.freeze(units, "summed against values that are not its units")


def _tie_groups(run: LabelRun, ins: Tensor, outs: Tensor) -> None:
    """Make each group a block of its inputs and outputs; a group of one unit is that unit."""
    fixed = (ins == NOTHING).any(1) | (ins == FIXED).any(1)
    run.freeze([x[fixed] for x in (ins, outs) if fixed.any()], "a group that reads constants")
    ins, outs = ins[~fixed], outs[~fixed]
    blocks = ins[:, 0] if ins.shape[1] == 1 else run.ledger.new(len(ins))
    if ins.shape[1] > 1:
        run.ledger.group(blocks, ins)
    if outs.shape[1] == 1:
        run.ledger.tie(blocks, outs[:, 0])
    else:
        run.ledger.group(blocks, outs)


def matmul(run: LabelRun, op: Op) -> Labels:
    """A matrix product, with a batch or without, and what is added to it."""
    a = op["mat1"] if op["mat1"] is not None else op["batch1"]
    a, b = (op["self"], op["mat2"]) if a is None else (a, op["mat2"])
    b = op["batch2"] if b is None else b
    run.uses([a, b], contracted=True)
    batch = "b" if a.dim() == 3 else ""
    product = contract(run, a, batch + "mk", b, batch + "kn", batch + "mn")
    return _plus(run, op, product, op["self"] if op.name in ("addmm", "baddbmm") else None)


def matvec(run: LabelRun, op: Op) -> Labels:
    """A matrix times a vector."""
    run.uses([op["self"], op["vec"]], contracted=True)
    return contract(run, op["self"], "mk", op["vec"], "k", "m")


def linear(run: LabelRun, op: Op) -> Labels:
    """`x W^T + b` over the last axis, if ATen keeps it in one piece."""
    x, w = op["input"], op["weight"]
    run.uses([w], contracted=True)
    lead = "abcdefgh"[: x.dim() - 1]
    return _plus(run, op, contract(run, x, lead + "k", w, "nk", lead + "n"), op["bias"])


def _plus(run: LabelRun, op: Op, product: Labels, added: Tensor | None) -> Labels:
    """Add a tensor to the product that an operator computes."""
    if added is None:
        return product
    return merge(run, [(product, tuple(op.out.shape)), operand(run, added)], op.out.dim())
