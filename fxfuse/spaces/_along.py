"""Rules of operators that work along axes: sums, order, softmax, pooling, norms.

An operator that treats all places along an axis alike leaves the units along it free; one that
tells the places apart fixes them.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ._labels import (
    FIXED,
    NOTHING,
    LabelRun,
    Labels,
    Operand,
    absent,
    merge,
    operand,
    rows_over,
    varying,
)
from ._rules import Op, on_channels

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
            operands.append(on_channels(run, op[key], rank))
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
    affine = [on_channels(run, t, rank) for t in (op["weight"], op["bias"]) if t is not None]
    return _first_of_several(op, merge(run, [_with_fixed_padding(run, tensor), *affine], rank))


def weight_norm(run: LabelRun, op: Op) -> list[Labels]:
    """A weight scaled by its own norm keeps its units, and ties them to the scales."""
    operands = [operand(run, op["v"]), operand(run, op["g"])]
    return _first_of_several(op, merge(run, operands, op["v"].dim()))


def _with_fixed_padding(run: LabelRun, tensor: Tensor) -> Operand:
    """Fix the empty places of a tensor: a norm mixes the other values into them."""
    labels = run.of(tensor)
    layers = tuple(torch.where(x == NOTHING, FIXED, x) for x in labels.layers)
    return Labels(layers, FIXED, labels.sources), tuple(tensor.shape)


def _first_of_several(op: Op, labels: Labels) -> list[Labels]:
    """Label the first output of an operator; the others are statistics."""
    return [labels] + [Labels()] * (len(op.out) - 1)
