"""Rules of operators that sum products: convolutions, matrix products and their kin."""

from __future__ import annotations

from torch import Tensor

from ._labels import (
    FIXED,
    KERNEL,
    NOTHING,
    LabelRun,
    Labels,
    absent,
    along_same_axes,
    contract,
    joint,
    merge,
    operand,
    varying,
)
from ._rules import Op, fixed, on_channels

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
        operands.append(on_channels(run, op["bias"], rank))
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
