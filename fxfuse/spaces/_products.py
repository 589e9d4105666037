"""Rules of operators that sum products: convolutions, matrix products and their kin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._along import across
from ._labels import (
    FIXED,
    KERNEL,
    NOTHING,
    LabelRun,
    Labels,
    absent,
    along_same_axes,
    joint,
    merge,
    operand,
    rows_over,
    varying,
)
from ._rules import Op, on_channels

ADDING = {"addmm", "baddbmm", "_sparse_addmm"}  # matrix products that add to what they are given

# --- contractions -------------------------------------------------------------------------------


def convolution(run: LabelRun, op: Op) -> Labels:
    """Contract the channels; positions in the kernel and in the image stay in place."""
    w, out_dim = op["weight"], 1 if op["transposed"] else 0
    run.uses([w], contracted=True)
    weight = run.of(w).layers
    channels, beside = _channels(run, op)
    run.freeze([layer for layer in weight if max(varying(layer)) > 1], KERNEL)
    if op["groups"] > 1:
        outs = _grouped(run, op, channels)
    else:
        outs = [layer.flatten() for layer in weight if varying(layer) == (out_dim,)]
        ins = [layer for layer in weight if varying(layer) == (1 - out_dim,)]
        ins = [joint(run, ins).flatten()] if ins else []
        _tie_inputs(run, [c.flatten() for c in channels], ins)
    rank = op.out.dim()
    layers = (*(o.view([1, -1, *[1] * (rank - 2)]) for o in outs), *beside)
    operands = [(Labels(layers), tuple(op.out.shape))]
    if op["bias"] is not None:
        operands.append(on_channels(run, op["bias"], rank))
    return merge(run, operands, rank)


def _grouped(run: LabelRun, op: Op, channels: list[Tensor]) -> list[Tensor]:
    """Make the inputs and outputs of each group travel together; return the units written.

    A weight of one place per group is a row for each unit, and may be computed; a weight with the
    same values for all groups says nothing of the units.
    """
    w, groups, transposed = op["weight"], op["groups"], op["transposed"]
    weight = run.of(w).layers
    each = [layer.flatten() for layer in weight if varying(layer) == (0,)]
    inner = [layer for layer in weight if varying(layer) == (1,)]
    across = [layer for layer in weight if len(varying(layer)) > 1 and min(varying(layer)) < 2]
    one_to_one = w.shape[:2] == (groups, 1)
    if len(channels) == 1 and one_to_one and not each and run.extents(w)[0] == 1:
        return [channels[0].flatten()]
    depthwise = w.shape[1] == 1
    if len(channels) != 1 or len(each) != 1 or across or not (depthwise or run.is_parameter(w)):
        run.freeze([*channels, *weight], "a grouped convolution of what cannot be moved")
        return []
    read = channels[0].flatten()
    if transposed:
        _tie_inputs(run, [read], each)
        dense = run.ledger.new(groups * w.shape[1]) if inner else each[0]
    else:
        dense = read
    if run.is_parameter(w):
        run.dense_axis(w, 1, dense, groups)
    written = dense if transposed else each[0]
    if transposed or not torch.equal(read, written):
        _tie_groups(run, read.view(groups, -1), written.view(groups, -1))
    return [written]


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
    return _plus(run, op, product, op["self"] if op.name in ADDING else None)


def grouped(run: LabelRun, op: Op) -> Labels:
    """A matrix product by one of several matrices for each run of rows, as in a layer of experts.

    Where the runs end is a value, so the matrices stay in order; all share their units.
    """
    a, b = op["self"], op["mat2"]
    run.uses([a, b], contracted=True)
    if a.dim() == 3 and b.dim() == 3:
        return contract(run, a, "bmk", b, "bkn", "bmn")
    if (a.dim(), b.dim()) != (2, 3):
        raise ValueError("runs of columns")
    apart = [layer for layer in run.of(b).layers if 0 in varying(layer)]
    run.freeze(apart, "one of several matrices that are picked by number")
    shared = contract(run, a, "mk", b, "ekn", "emn").layers
    return Labels(tuple(x[0] for x in shared if 0 not in varying(x)))


def matvec(run: LabelRun, op: Op) -> Labels:
    """A matrix times a vector, and what is added to it."""
    matrix = op["self"] if op["mat"] is None else op["mat"]
    run.uses([matrix, op["vec"]], contracted=True)
    product = contract(run, matrix, "mk", op["vec"], "k", "m")
    return _plus(run, op, product, None if op["mat"] is None else op["self"])


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


def of_vectors(run: LabelRun, op: Op) -> Labels:
    """The inner or outer product of two vectors, and what is added to it."""
    if op.name == "addr":
        product = across(run, [(op["vec1"], "m"), (op["vec2"], "n")], "mn")
        return _plus(run, op, product, op["self"])
    a, b = op.tensors
    run.uses([a, b], contracted=True)
    return contract(run, a, "k", b, "k", "")


def bilinear(run: LabelRun, op: Op) -> Labels:
    """A sum over the products of three tensors, each given without the axes that it repeats on."""
    letters = "abcdefghijklmnop"[: op["i1"].dim() + len(op["expand1"])]
    operands = []
    for i in "123":
        names = "".join(c for d, c in enumerate(letters) if d not in op[f"expand{i}"])
        operands.append((op[f"i{i}"], names))
    summed = [letters[d] for d in op["sumdim"]]
    for tensor, names in operands:
        if run.of(tensor).sources:
            read = [x for x in run.of(tensor).layers if any(names[d] in summed for d in varying(x))]
            run.ledger.reads.extend(x.flatten().numpy() for x in read)
    run.uses([t for t, _ in operands], contracted=True)
    return across(run, operands, "".join(c for c in letters if c not in summed))


def distances(run: LabelRun, op: Op) -> Labels:
    """Distances between the rows of two matrices, or between all rows of one."""
    if op["x1"] is None:
        return across(run, [(op["self"], "nk")], "p", "n")
    rank = op.out.dim()
    lead = "abcdefgh"[: rank - 2]
    operands = [
        (x, lead[rank - x.dim() :] + row + "k") for x, row in ((op["x1"], "m"), (op["x2"], "n"))
    ]
    for tensor, _ in operands:
        if run.of(tensor).sources:
            rows = [x for x in run.of(tensor).layers if x.shape[-1] > 1]
            run.ledger.reads.extend(x.flatten().numpy() for x in rows)
    run.uses([t for t, _ in operands], contracted=True)
    return across(run, operands, lead + "mn")


def apart(run: LabelRun, op: Op) -> Labels:
    """One number for how far two tensors are apart."""
    merge(run, [operand(run, t) for t in op.tensors], max(t.dim() for t in op.tensors))
    return Labels()


# --- sums over products, with axes written as letters ---------------------------------------------


def contract(run: LabelRun, a: Tensor, la: str, b: Tensor, lb: str, out: str) -> Labels:
    """Multiply two tensors and sum over the letters that `out` lacks.

    Layers that vary along a summed letter are tied to each other. Where both also vary along a
    batch letter, each place of the batch is a block of the units that are summed there. The other
    layers pass to the output, where they meet as in `merge`.

    Args:
        run: The run.
        a: First operand.
        la: A letter for each of its axes.
        b: Second operand.
        lb: A letter for each of its axes.
        out: Letters of the result.
    """
    summed = [c for c in la if c in lb and c not in out]
    letters = out + "".join(summed)
    summed_a, passing_a = _split(run.of(a).layers, la, letters, summed)
    summed_b, passing_b = _split(run.of(b).layers, lb, letters, summed)
    _note_reads(run, a, b, summed_a, summed_b)
    summed_a, summed_b = _one_each(run, summed_a), _one_each(run, summed_b)
    blocks = []
    for x in summed_a:
        for y in summed_b:
            run.ledger.tie(x, y)
            blocks += _batch_blocks(run, x, y, len(out))
    for layers, other, partners in ((summed_a, b, summed_b), (summed_b, a, summed_a)):
        if not partners and run.of(other).fill == FIXED:
            run.freeze(layers, "summed against values that are not its units")
    operands = []
    for tensor, names, passing in ((a, la, passing_a), (b, lb, passing_b)):
        sizes = dict(zip(names, tensor.shape))
        layers = [x.reshape(x.shape[: len(out)]) for x in passing] + blocks
        operands.append((Labels(tuple(layers)), tuple(sizes.get(c, 1) for c in out)))
    return merge(run, operands, len(out))


def _one_each(run: LabelRun, layers: list[Tensor]) -> list[Tensor]:
    return [joint(run, alike) for alike in along_same_axes(layers).values()]


def _split(
    layers: Sequence[Tensor], names: str, letters: str, summed: list[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """Spread layers over all letters; return those that vary along a summed one, and the others."""
    inner: list[Tensor] = []
    outer: list[Tensor] = []
    for layer in layers:
        sizes = dict(zip(names, layer.shape))
        order = [names.index(c) for c in letters if c in names]
        spread = layer.permute(order).reshape([sizes.get(c, 1) for c in letters])
        (inner if any(sizes[c] > 1 for c in summed) else outer).append(spread)
    return inner, outer


def _note_reads(
    run: LabelRun, a: Tensor, b: Tensor, summed_a: list[Tensor], summed_b: list[Tensor]
) -> None:
    """Note the summed labels of the operand that is a parameter."""
    readers = summed_b if run.of(b).sources else summed_a if run.of(a).sources else []
    run.ledger.reads.extend(x.flatten().numpy() for x in readers)


def _batch_blocks(run: LabelRun, x: Tensor, y: Tensor, rank: int) -> list[Tensor]:
    """Make each place of a batch along which both vary a block of the units summed there."""
    shared = tuple(d for d in varying(x) if d < rank and y.shape[d] > 1)
    if not shared:
        return []
    return [rows_over(run, x, shared).reshape(_shape(x, shared, rank))]


def _shape(layer: Tensor, axes: tuple[int, ...], rank: int) -> list[int]:
    return [layer.shape[d] if d in axes else 1 for d in range(rank)]
