"""Rules of operators that work along axes: sums, order, softmax, pooling, norms.

An operator that treats all places along an axis alike leaves the units along it free; one that
tells the places apart fixes them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

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

ORDER = "units along an axis whose order counts"
OVER_ALL = {"argmax", "argmin", "median", "nanmedian"}  # over all axes, if none is given

# --- along an axis ------------------------------------------------------------------------------


def across(
    run: LabelRun, operands: Sequence[tuple[Tensor, str]], out: str, places: str = ""
) -> Labels:
    """Combine tensors whose axes bear letters, as in `einsum`.

    Units along axes of the same letter meet as in `merge`. A letter that the result lacks is summed
    over, or used up in another way in which the order of its places does not count.

    Args:
        run: The run.
        operands: Tensors, each with a letter for each of its axes.
        out: The letters of the result.
        places: Letters of axes whose order counts; units along these are frozen.
    """
    letters = out + "".join(
        dict.fromkeys(c for _, names in operands for c in names if c not in out)
    )
    spread = []
    for tensor, names in operands:
        labels, shape = run.of(tensor), dict(zip(names, run.extents(tensor)))
        mixed = [x for x in labels.layers if any(names[d] in places for d in varying(x))]
        run.freeze(mixed, ORDER)
        layers = []
        for layer in labels.layers:
            if absent(layer, mixed):
                sizes = dict(zip(names, layer.shape))
                order = [names.index(c) for c in letters if c in sizes]
                layers.append(layer.permute(order).reshape([sizes.get(c, 1) for c in letters]))
        shapes = tuple(1 if c in places else shape.get(c, 1) for c in letters)
        spread.append((Labels(tuple(layers), labels.fill, labels.sources), shapes))
    merged = merge(run, spread, len(letters))
    kept = _without(run, merged.layers, set(range(len(out), len(letters))))
    return Labels(tuple(x.reshape(x.shape[: len(out)]) for x in kept), merged.fill, merged.sources)


def _without(run: LabelRun, layers: Sequence[Tensor], dims: set[int]) -> list[Tensor]:
    """Forget the units along some axes; of units along others as well, keep the blocks."""
    kept = []
    for layer in layers:
        axes = set(varying(layer))
        if not axes & dims:
            kept.append(layer)
        elif axes - dims:
            kept.append(rows_over(run, layer, tuple(sorted(axes - dims))))
    return kept


def reduction(run: LabelRun, op: Op) -> Labels:
    """A symmetric sum over units forgets them; over part of their axes, it leaves their blocks."""
    return _reduced(run, op, set(op.dims(op["self"].dim())))


def _reduced(run: LabelRun, op: Op, dims: set[int]) -> Labels:
    tensor, labels = op["self"], run.of(op["self"])
    kept = _without(run, labels.layers, dims)
    if _first(op).dim() != tensor.dim():
        stay = [d for d in range(tensor.dim()) if d not in dims]
        kept = [x.reshape([x.shape[d] for d in stay]) for x in kept]
    return Labels(tuple(kept), labels.fill, labels.sources)


def _first(op: Op) -> Tensor:
    out: Tensor = op.out if isinstance(op.out, Tensor) else op.out[0]
    return out


def _ordered_axes(op: Op) -> set[int]:
    """Return the axes that an operator sorts along: the last, if it names none."""
    rank = op["self"].dim()
    if op["dim"] is not None or op.name in OVER_ALL:
        return set(op.dims(rank))
    return {rank - 1} if rank else set()


def ordered(run: LabelRun, op: Op) -> Labels:
    """Whatever depends on the order along an axis fixes the units along it, if it is read."""
    tensor, labels, dims = op["self"], run.of(op["self"]), _ordered_axes(op)
    mixed = [x for x in labels.layers if set(varying(x)) & dims]
    kept = [x for x in labels.layers if absent(x, mixed)]
    if _first(op).dim() != tensor.dim():
        kept = [x.squeeze(tuple(dims)) for x in kept]
    return Labels(tuple(kept), labels.fill, owed=tuple((x, ORDER) for x in mixed))


def ranked(run: LabelRun, op: Op) -> Labels | list[Labels]:
    """Values in order of size do not depend on the order of units; where they were found does."""
    if op["sorted"] is False:
        return ordered(run, op)
    over_all = op["dim"] is None and op.name in ("max", "min", "aminmax")
    dims = set(range(op["self"].dim())) if over_all else _ordered_axes(op)
    values = _reduced(run, op, dims)
    if isinstance(op.out, Tensor) or op.name == "aminmax":
        return values
    return [values, ordered(run, op)]


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


def beside(run: LabelRun, op: Op) -> Labels:
    """Work along given axes, or along the last two, whose order counts."""
    tensor = op["self"]
    names = "abcdefghijklmnop"[: tensor.dim()]
    given = op["dim"] is not None
    places = [names[d] for d in op.dims(tensor.dim())] if given else names[-2:]
    return across(run, [(t, names[-t.dim() :]) for t in op.tensors], names, "".join(places))


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
