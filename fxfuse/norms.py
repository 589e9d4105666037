"""Rules for operators that normalise: per-channel tensors tie, what is averaged is alike."""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import Op
from .contraction import merge, rows_over
from .labels import FIXED, NOTHING, LabelRun, Labels, varying


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
        run.book.norms[run.node] = roles
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
