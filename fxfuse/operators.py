"""What each ATen operator does to unit labels: the only file with per-operator knowledge.

A rule takes an `Op` (the call with its arguments by name) and the run, and returns the `Labels` of
the output or of each output. Operators tagged pointwise by ATen share one rule and data movement
runs the operator itself on the labels; an operator without a rule freezes what it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .along import gather, ordered, reduction, softmax, spatial
from .calls import Op, fixed, unknown
from .contraction import along_same_axes, contract, extents, joint, merge
from .labels import FIXED, KERNEL, NOTHING, LabelRun, Labels, absent, collapse, varying
from .movement import (
    VIEWS,
    alive,
    cat,
    constant,
    copied,
    filled,
    folded,
    lookup,
    move,
    opaque,
    patches,
    restride,
    stack,
    unchanged,
)
from .norms import batch_norm, group_norm, layer_norm, on_axis, weight_norm

Rule = Callable[[LabelRun, Op], "Labels | list[Labels]"]


def mirror(
    run: LabelRun,
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Any,
    before: tuple[int, ...] = (),
) -> None:
    """Carry labels through one operator call and describe it under the running node."""
    op = Op.of(func, args, kwargs, out, before)
    outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    if not outputs:
        return
    run.uses(op.tensors)
    descriptor = _describe(op)
    if descriptor is not None:
        run.book.ops.setdefault(run.node, []).append(descriptor)
    result = _rule_for(op)(run, op)
    results = result if isinstance(result, list) else [result] * len(outputs)
    for tensor, labels in zip(outputs, results):
        labels = _still_nothing(tensor, labels)
        if func._schema.is_mutable and any(tensor is t for t in op.tensors):
            run.written(tensor, labels)
        run.put(tensor, labels)


def _still_nothing(tensor: Tensor, labels: Labels) -> Labels:
    """Keep `NOTHING` in layers only where the value is zero: constants may differ, zeros do not."""
    fill = labels.fill
    if fill == NOTHING and tensor.numel() and bool((tensor != tensor.flatten()[0]).any()):
        fill = FIXED
    layers = []
    for layer in labels.layers:
        empty = layer == NOTHING
        if bool(empty.any()) and bool((tensor.detach().cpu() * empty).any()):
            layer = torch.where(empty, FIXED, layer)
        layers.append(layer)
    return Labels(tuple(layers), fill, labels.sources)


def _rule_for(op: Op) -> Rule:
    if op.name in RULES:
        return RULES[op.name]
    if torch.Tag.pointwise in op.func.tags and not op.func._schema.name.startswith("aten::copy"):
        return pointwise
    return unknown


# --- describing an operator for comparison between networks -------------------------------------


def _describe(op: Op) -> tuple[Any, ...] | None:
    """Return what makes two calls the same step: name and hyper-parameters, never a width."""
    if op.name in SILENT:
        return None
    rule = _rule_for(op).__name__
    if op.name == "convolution":
        groups, weight = op["groups"], op["weight"]
        dense_in = weight.shape[0] if op["transposed"] else weight.shape[1] * groups
        grouping = "dense" if groups == 1 else "depthwise" if groups == dense_in else "grouped"
        geometry = [tuple(op[k]) for k in ("stride", "padding", "dilation", "output_padding")]
        return (rule, tuple(weight.shape[2:]), *geometry, op["transposed"], grouping)
    if op.name in ARITHMETIC:
        return (rule, op.name)  # its numbers scale with widths, as in attention
    if rule in ("softmax", "reduction", "cat", "stack"):
        return (rule, op.name, op.dims(op.tensors[0].dim()))
    if "pool" in op.name or rule in ("pointwise", "ordered", "gather", "glu"):
        numbers = [v for v in tree_leaves(op.args) if isinstance(v, (bool, int, float))]
        return (rule, op.name, *numbers)
    return (rule, op.name)


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
        run.book.tie(layer, alike)
    found = along_same_axes(first).values()
    return [joint(run, same) for same in found], beside


def _read(run: LabelRun, units: list[Tensor], ins: list[Tensor], fill: int) -> None:
    for read in ins:
        run.book.reads.append(read.numpy())
        for unit in units:
            run.book.tie(unit, read)
        if not units:
            run.freeze([read], "reads what cannot be moved")
    if not ins:
        run.freeze(units, "summed against values that are not its units")


def _group_channels(run: LabelRun, ins: Tensor, outs: Tensor) -> None:
    """A group is a block of its inputs and outputs; a group of one unit is that unit."""
    stuck = (ins == NOTHING).any(1) | (ins == FIXED).any(1)
    run.freeze([x[stuck] for x in (ins, outs) if stuck.any()], "a group that reads constants")
    ins, outs = ins[~stuck], outs[~stuck]
    blocks = ins[:, 0] if ins.shape[1] == 1 else run.book.new(len(ins))
    if ins.shape[1] > 1:
        run.book.group(blocks, ins)
    if outs.shape[1] == 1:
        run.book.tie(blocks, outs[:, 0])
    else:
        run.book.group(blocks, outs)


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


SILENT = {"detach", "alias", "clone", "contiguous", "lift_fresh", "t", "_to_copy"} | VIEWS

ARITHMETIC = {"add", "sub", "rsub", "mul", "div"}
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        [*VIEWS, "permute", "transpose", "t", "expand", "select", "slice", "split", "squeeze"]
        + ["split_with_sizes", "chunk", "unbind", "unsqueeze", "flip", "roll", "repeat", "narrow"]
        + ["index_select", "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle", "unfold"]
        + ["channel_shuffle", "movedim", "flatten", "tile", "native_channel_shuffle"]
        + ["unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "rot90"],
        move,
    ),
    **dict.fromkeys(
        ["clone", "detach", "alias", "contiguous", "lift_fresh", "_to_copy", "dropout"]
        + ["native_dropout", "feature_dropout"],
        unchanged,
    ),
    **dict.fromkeys(
        ["zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones"]
        + ["new_full", "scalar_tensor"],
        constant,
    ),
    **dict.fromkeys(["empty", "empty_like", "new_empty", "arange", "linspace"], opaque),
    **dict.fromkeys(
        ["mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "norm", "prod"]
        + ["linalg_vector_norm", "logsumexp", "nansum", "any", "all"],
        reduction,
    ),
    **dict.fromkeys(
        ["max", "min", "median", "nanmedian", "mode", "argmax", "argmin", "sort", "argsort", "topk"]
        + ["cumsum", "cumprod", "logcumsumexp"],
        ordered,
    ),
    "gather": gather,
    "glu": glu,
    **dict.fromkeys(
        ["max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d"]
        + ["_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "avg_pool1d"]
        + ["adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_bilinear2d", "mkldnn_max_pool2d"]
        + ["upsample_nearest2d", "upsample_bicubic2d", "upsample_trilinear3d", "max_pool2d"]
        + ["_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"]
        + ["upsample_nearest1d", "upsample_linear1d", "upsample_nearest3d", "reflection_pad1d"]
        + ["reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d"]
        + ["replication_pad3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"],
        spatial,
    ),
    **dict.fromkeys(["_softmax", "_log_softmax", "_safe_softmax"], softmax),
    **dict.fromkeys(
        ["native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training"]
        + ["_native_batch_norm_legit", "_batch_norm_with_update", "_batch_norm_no_update"],
        batch_norm,
    ),
    **dict.fromkeys(["mm", "addmm", "bmm", "baddbmm"], matmul),
    "as_strided": restride,
    **dict.fromkeys(  # what older versions of torch do not tag as pointwise
        ["relu", "leaky_relu", "elu", "celu", "gelu", "silu", "mish", "hardtanh", "hardswish"]
        + ["hardsigmoid", "softplus", "softshrink", "threshold", "_prelu_kernel", "clamp", "rsub"],
        pointwise,
    ),
    "_weight_norm_interface": weight_norm,
    "mv": matvec,
    "linear": linear,
    "convolution": convolution,
    "native_layer_norm": layer_norm,
    "native_group_norm": group_norm,
    "cat": cat,
    "stack": stack,
    "copy": copied,
    "zero": filled,
    "fill": filled,
    "index": lookup,
    "im2col": patches,
    "col2im": folded,
    "embedding": lookup,
}
