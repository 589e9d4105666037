"""Rules for operators that move data: they run on the label tensors themselves.

Views, slices, joins, padding, look-ups and copies need no knowledge of layouts: whatever the
operator does to numbers it does to labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .calls import Op, unknown
from .contraction import merge
from .labels import NOTHING, LabelRun, Labels, absent, collapse, varying

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
            run.book.place(layer)
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
            run.book.tie(units, units[:, :1])
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
