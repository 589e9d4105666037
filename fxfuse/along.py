"""What operators that run along an axis do to unit labels: sums, orders, picks and pooling.

Each is given the units along its own axis and beside it. What treats all alike lets them move, what
goes by their places does not; units along other axes pass.
"""

from __future__ import annotations

import re

from torch import Tensor

from .calls import Op, unknown
from .contraction import merge, rows_over
from .labels import LabelRun, Labels, absent, varying

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
