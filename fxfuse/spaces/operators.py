"""The table of ATen operators: one row holds everything the library knows of an operator.

A row has the rule for unit labels (`_rules`, `_along`, `_products`), the properties that later
stages ask for (`Network.adds`, `Network.is_norm` ...), and which settings make two calls the same
step. No other module names an operator. One that ATen tags as pointwise needs no row; any other
operator without a row freezes what it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import _along as along
from . import _indexing as indexing
from . import _products as products
from . import _rules as rules
from ._labels import FIXED, NOTHING, Geometry, LabelRun, Labels, Property, Step
from ._rules import Op

Rule = Callable[[LabelRun, Op], "Labels | list[Labels]"]
Settings = Callable[[Op], tuple[Any, ...]]

REST = ("rest",)  # of a reduction over all axes but the first two, however it is laid out


def none(op: Op) -> tuple[Any, ...]:
    """No settings: they scale with widths, or the shapes of the values tell them."""
    return ()


def axes(op: Op) -> tuple[Any, ...]:
    """The axes along which the operator works."""
    return op.dims(op.tensors[0].dim())


def reduced(op: Op) -> tuple[Any, ...]:
    """The axes that a reduction runs over; `REST` if they are all but the first two."""
    rank, dims = op.tensors[0].dim(), axes(op)
    return REST if rank > 2 and sorted(dims) == [*range(2, rank)] else dims


def numbers(op: Op) -> tuple[Any, ...]:
    """All numbers among the arguments, those included that a call leaves to their defaults."""
    values = {a.name: op.args.get(a.name, a.default_value) for a in op.func._schema.arguments}
    if values.get("stride") == []:
        values["stride"] = values["kernel_size"]  # that of a pooling
    if isinstance(values.get("dim"), int) and op.tensors[0].dim():
        values["dim"] %= op.tensors[0].dim()
    return tuple(float(v) for v in tree_leaves(values) if isinstance(v, (bool, int, float)))


def geometry(op: Op) -> Geometry:
    """The geometry of a convolution."""
    groups, weight = op["groups"], op["weight"]
    dense_in = weight.shape[0] if op["transposed"] else weight.shape[1] * groups
    stride, padding, dilation, output_padding = (
        tuple(op[k]) for k in ("stride", "padding", "dilation", "output_padding")
    )
    return Geometry(
        tuple(weight.shape[2:]),
        stride,
        padding,
        dilation,
        output_padding,
        op["transposed"],
        "dense" if groups == 1 else "depthwise" if groups == dense_in else "grouped",
    )


@dataclass(frozen=True)
class Operator:
    """A row of the table.

    Attributes:
        rule: What the operator does to unit labels.
        properties: What else is known of it.
        settings: The hyper-parameters of a call; calls that differ in them are different steps.
    """

    rule: Rule
    properties: Property = Property.NONE
    settings: Settings = none


def _rows(names: str, *columns: Any) -> dict[str, Operator]:
    return dict.fromkeys(names.split(), Operator(*columns))


P = Property
OTHER_ELEMENTWISE = Operator(rules.elementwise, P.ELEMENTWISE, numbers)
UNKNOWN = Operator(rules.unknown, P.NONE, numbers)

OPERATORS: dict[str, Operator] = {
    # --- values go elsewhere
    **_rows("view _unsafe_view _reshape_alias reshape t", rules.move, P.MOVES | P.SILENT),
    **_rows("squeeze unsqueeze", rules.move, P.MOVES | P.SILENT),
    **_rows("permute transpose movedim expand select slice split", rules.move, P.MOVES),
    **_rows("split_with_sizes chunk unbind flip roll", rules.move, P.MOVES),
    **_rows("repeat", rules.move, P.MOVES | P.REPEATS),
    **_rows("unsafe_split unsafe_split_with_sizes unsafe_chunk rot90", rules.move, P.MOVES),
    **_rows("narrow index_select constant_pad_nd unfold flatten tile", rules.move, P.MOVES),
    **_rows(
        "pixel_shuffle pixel_unshuffle channel_shuffle diagonal diag_embed", rules.move, P.MOVES
    ),
    **_rows("native_channel_shuffle", rules.move, P.MOVES),
    **_rows("as_strided", rules.restride),
    **_rows("im2col", rules.patches),
    **_rows("col2im", rules.folded),
    **_rows("view_as_complex", rules.as_complex, P.MOVES),
    **_rows("view_as_real", rules.as_real, P.MOVES),
    **_rows("index embedding", rules.lookup),
    **_rows("gather", rules.gather, P.NONE, numbers),
    **_rows(
        "index_add index_copy index_fill index_reduce", indexing.written_along, P.NONE, numbers
    ),
    **_rows("scatter scatter_add scatter_reduce", indexing.written_along, P.NONE, numbers),
    **_rows("select_scatter slice_scatter", indexing.part_written, P.NONE, numbers),
    **_rows("index_put", indexing.index_put, P.NONE, numbers),
    **_rows("_embedding_bag _embedding_bag_forward_only", indexing.embedding_bag, P.NONE, numbers),
    **_rows("grid_sampler_2d grid_sampler_3d", indexing.grid_sampler, P.RESAMPLES, numbers),
    **_rows("cudnn_grid_sampler", indexing.grid_sampler, P.RESAMPLES, numbers),
    **_rows("max_unpool2d max_unpool3d", indexing.unpool, P.RESAMPLES, numbers),
    **_rows("bucketize", indexing.buckets, P.NONE, numbers),
    **_rows("cat", rules.cat, P.JOINS, axes),
    **_rows("stack", rules.stack, P.JOINS, axes),
    # --- values stay as they are, or have no units
    **_rows(
        "clone detach alias contiguous lift_fresh _to_copy _conj",
        rules.unchanged,
        P.SILENT | P.REPEATS,
    ),
    **_rows("dropout native_dropout feature_dropout embedding_renorm", rules.unchanged),
    **_rows("copy", rules.copied),
    **_rows("zero fill", rules.filled),
    **_rows("zeros ones full zeros_like ones_like full_like", rules.constant, P.CONSTANT),
    **_rows("new_zeros new_ones new_full scalar_tensor", rules.constant, P.CONSTANT),
    **_rows("empty empty_like new_empty arange linspace", rules.opaque, P.SILENT),
    # --- one value at a time
    **_rows("add", rules.elementwise, P.ELEMENTWISE | P.ADDS | P.COMMUTES),
    **_rows("mul", rules.elementwise, P.ELEMENTWISE | P.MULTIPLIES | P.COMMUTES),
    **_rows("sub rsub div", rules.elementwise, P.ELEMENTWISE),
    **_rows("maximum minimum", rules.elementwise, P.ELEMENTWISE | P.COMMUTES, numbers),
    **_rows(  # what older versions of torch do not tag as pointwise
        "relu leaky_relu elu celu gelu silu mish hardtanh hardswish hardsigmoid softplus"
        " softshrink threshold _prelu_kernel clamp",
        rules.elementwise,
        P.ELEMENTWISE,
        numbers,
    ),
    **_rows(  # what torch does not tag as pointwise
        "complex polar copysign floor_divide masked_fill log_sigmoid_forward",
        rules.elementwise,
        P.ELEMENTWISE,
        numbers,
    ),
    **_rows("rrelu_with_noise", rules.unchanged, P.ELEMENTWISE, numbers),
    **_rows("mse_loss smooth_l1_loss huber_loss soft_margin_loss", rules.loss, P.NONE, numbers),
    **_rows("binary_cross_entropy binary_cross_entropy_with_logits", rules.loss, P.NONE, numbers),
    **_rows("glu", rules.glu, P.NONE, numbers),
    # --- along an axis
    **_rows("mean sum amax amin var std var_mean std_mean norm", along.reduction, P.NONE, reduced),
    **_rows("prod linalg_vector_norm logsumexp nansum any all", along.reduction, P.NONE, reduced),
    **_rows("max min median nanmedian mode aminmax", along.ranked, P.NONE, numbers),
    **_rows("sort topk kthvalue", along.ranked, P.NONE, numbers),
    **_rows("argmax argmin argsort", along.ordered, P.NONE, numbers),
    **_rows("cumsum cumprod logcumsumexp cummax cummin", along.ordered, P.NONE, numbers),
    **_rows("count_nonzero", along.reduction, P.NONE, reduced),
    **_rows("tril triu linalg_cross _fft_r2c _fft_c2r _fft_c2c", along.beside, P.NONE, numbers),
    **_rows("_softmax _log_softmax _safe_softmax", along.softmax, P.NONE, axes),
    # --- pooling and resampling
    **_rows("avg_pool1d avg_pool2d avg_pool3d", along.spatial, P.RESAMPLES, numbers),
    **_rows("max_pool2d mkldnn_max_pool2d", along.spatial, P.RESAMPLES, numbers),
    **_rows("max_pool2d_with_indices max_pool3d_with_indices", along.spatial, P.RESAMPLES, numbers),
    **_rows("adaptive_avg_pool1d _adaptive_avg_pool2d", along.spatial, P.RESAMPLES, numbers),
    **_rows("_adaptive_avg_pool3d adaptive_max_pool2d", along.spatial, P.RESAMPLES, numbers),
    **_rows("adaptive_max_pool3d", along.spatial, P.RESAMPLES, numbers),
    **_rows("upsample_nearest1d upsample_nearest2d upsample_nearest3d", along.spatial, P.RESAMPLES),
    **_rows("_upsample_nearest_exact1d _upsample_nearest_exact2d", along.spatial, P.RESAMPLES),
    **_rows("_upsample_nearest_exact3d upsample_linear1d", along.spatial, P.RESAMPLES),
    **_rows("upsample_bilinear2d upsample_trilinear3d", along.spatial, P.RESAMPLES),
    **_rows("_upsample_bilinear2d_aa upsample_bicubic2d", along.spatial, P.RESAMPLES),
    **_rows("_upsample_bicubic2d_aa", along.spatial, P.RESAMPLES),
    **_rows("reflection_pad1d reflection_pad2d reflection_pad3d", along.spatial, P.RESAMPLES),
    **_rows("replication_pad1d replication_pad2d replication_pad3d", along.spatial, P.RESAMPLES),
    # --- norms
    **_rows("native_batch_norm cudnn_batch_norm", along.batch_norm, P.NORMALISES),
    **_rows("_native_batch_norm_legit", along.batch_norm, P.NORMALISES),
    **_rows("_native_batch_norm_legit_no_training", along.batch_norm, P.NORMALISES),
    **_rows("_batch_norm_with_update _batch_norm_no_update", along.batch_norm, P.NORMALISES),
    **_rows("native_layer_norm", along.layer_norm, P.NORMALISES | P.ACROSS_UNITS),
    **_rows("native_group_norm", along.group_norm, P.NORMALISES | P.ACROSS_UNITS),
    **_rows("_weight_norm_interface", along.weight_norm),
    # --- contractions
    **_rows("mm addmm bmm baddbmm _sparse_addmm", products.matmul, P.CONTRACTS),
    **_rows("_grouped_mm", products.grouped, P.CONTRACTS),
    **_rows("mv addmv", products.matvec, P.CONTRACTS),
    **_rows("dot vdot", products.of_vectors, P.CONTRACTS),
    **_rows("addr", products.of_vectors),
    **_rows("_trilinear", products.bilinear, P.CONTRACTS),
    **_rows("_cdist_forward _euclidean_dist _pdist_forward", products.distances, P.NONE, numbers),
    **_rows("dist", products.apart, P.NONE, numbers),
    **_rows("linear", products.linear, P.CONTRACTS),
    **_rows("convolution", products.convolution, P.CONTRACTS, geometry),
}


def operator_of(op: Op) -> Operator:
    """Return the row of a call; operators of other libraries have none, whatever they are called.

    Their tags are no evidence either: anybody may write them.
    """
    if op.func.namespace != "aten":
        return UNKNOWN
    if op.name in OPERATORS:
        return OPERATORS[op.name]
    if torch.Tag.pointwise in op.func.tags and isinstance(op.out, Tensor):
        return OTHER_ELEMENTWISE
    return UNKNOWN


def adds(func: Any) -> bool:
    """Tell whether an operator only adds."""
    return P.ADDS in _properties(func)


def contracts(func: Any) -> bool:
    """Tell whether an operator sums products."""
    return P.CONTRACTS in _properties(func)


def _properties(func: Any) -> Property:
    """Return what is known of an operator, whatever it is called with."""
    name = Op.of(func, (), {}, None).name
    return OPERATORS.get(name, UNKNOWN).properties if func.namespace == "aten" else P.NONE


def mirror(
    run: LabelRun,
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Any,
    before: tuple[int, ...] = (),
) -> None:
    """Carry labels through one operator call and note it as a step of the running node."""
    op = Op.of(func, args, kwargs, out, before)
    run.values.meet(op.tensors)
    outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    if not outputs and not op.written:
        run.values.leave(op.tensors)
        return
    run.uses(op.tensors)
    operator = operator_of(op)
    if P.SILENT not in operator.properties:
        run.ledger.steps.setdefault(run.node, []).append(_step(op, operator))
    if run.values.loose and not operator.properties & (P.ELEMENTWISE | P.CONSTANT):
        rules.fixed(run, op, "computed with a number that depends on values")
    if not operator.properties & (P.SILENT | P.MOVES | P.JOINS):
        run.reach(op.tensors)
    try:
        labelled = _labelled(run, op, operator, outputs)
    except Exception:
        operator = UNKNOWN
        labels = rules.fixed(run, op, f"the rule for {op.func} does not cover this call")
        labelled = [(tensor, labels) for tensor in outputs]
    _note(run, op, operator, labelled)


def _labelled(
    run: LabelRun, op: Op, operator: Operator, outputs: Sequence[Tensor]
) -> list[tuple[Tensor, Labels]]:
    """Return the outputs of an operator with their labels, which must fit their shapes."""
    result = operator.rule(run, op)
    results = result if isinstance(result, list) else [result] * len(outputs)
    labelled = [(t, _still_nothing(t, labels)) for t, labels in zip(outputs, results, strict=True)]
    for tensor, labels in labelled:
        for layer in labels.layers:
            if layer.dim() != tensor.dim() or layer.expand(tensor.shape).shape != tensor.shape:
                raise ValueError(f"labels of shape {tuple(layer.shape)}")
    return labelled


def _note(
    run: LabelRun, op: Op, operator: Operator, outputs: Sequence[tuple[Tensor, Labels]]
) -> None:
    """Note the labels of what an operator returned, and of what it wrote to beside that."""
    varies = run.values.loose or torch.Tag.nondeterministic_seeded in op.func.tags
    if operator.rule not in (rules.constant, rules.opaque):
        varies = varies or any(run.values.varies(t) for t in op.tensors)
    if operator.rule is rules.unknown:
        outputs = [*outputs, *((t, Labels()) for t in op.written)]
    for tensor, labels in outputs:
        if any(tensor is t for t in op.written):
            run.written(tensor, labels)
        run.values.make(tensor, varies)
        run.put(tensor, labels)
        if P.ELEMENTWISE in operator.properties or P.REPEATS in operator.properties:
            run.repeats(tensor, op.tensors)


def _step(op: Op, operator: Operator) -> Step:
    settings = operator.settings(op)
    word = _word(op, operator, settings)
    if P.RESAMPLES in operator.properties and _pools_to_one(op):
        name = "mean" if "avg" in op.name else "amax"
        return Step(name, REST, operator.properties, word)
    return Step(op.name, settings, operator.properties, word)


def _pools_to_one(op: Op) -> bool:
    """Tell whether a pooling leaves one value of each channel, and so is a plain reduction."""
    out = next(t for t in tree_leaves(op.out) if isinstance(t, Tensor))
    pads = any(tree_leaves(op["padding"] or ()))
    return "pool" in op.name and not pads and out.dim() > 2 and set(out.shape[2:]) == {1}


def _word(op: Op, operator: Operator, settings: tuple[Any, ...]) -> str:
    """Return what a summary of a layer calls a step; nothing for what only moves values."""
    if isinstance(settings, Geometry):
        kind = "" if settings.grouping == "dense" else f" {settings.grouping}"
        return "conv" + "x".join(map(str, settings.kernel)) + kind
    if P.CONTRACTS in operator.properties:
        return "linear"
    if P.NORMALISES in operator.properties:
        return operator.rule.__name__  # ATen's names differ from device to device
    return "" if operator.properties & (P.MOVES | P.CONSTANT) else op.name


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
    return replace(labels, layers=tuple(layers), fill=fill)
