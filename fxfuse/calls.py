"""One call of an ATen operator, and the labels of what no rule understands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from .labels import LabelRun, Labels


@dataclass(frozen=True)
class Op:
    """One call of an ATen operator, with every argument by its schema name."""

    func: Any
    name: str
    args: dict[str, Any]
    out: Any
    before: tuple[int, ...] = ()  # shape of the first tensor before the call, which may change it

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
        """Name the arguments of a call; an in-place operator goes by its plain name."""
        names = [a.name for a in func._schema.arguments]
        name = func._overloadpacket.__name__
        name = name.rstrip("_") if func._schema.is_mutable else name
        return cls(func, name, {**dict(zip(names, args)), **kwargs}, out, before)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, those in lists included."""
        return [t for t in tree_leaves(self.args) if isinstance(t, Tensor)]

    def dims(self, rank: int) -> tuple[int, ...]:
        """Return the axes a reduction runs over, all of them when none is given."""
        dim = self.args.get("dim", self.args.get("dims"))
        if dim is None or dim == []:
            return tuple(range(rank))
        return tuple(d % max(rank, 1) for d in ([dim] if isinstance(dim, int) else dim))


def unknown(run: LabelRun, op: Op) -> Labels:
    """Freeze everything that passes through an operator that has no rule."""
    run.book.unknown.append((run.node, str(op.func)))
    return fixed(run, op, f"no rule for {op.func}")


def fixed(run: LabelRun, op: Op, reason: str) -> Labels:
    """Freeze every unit of every tensor that an operator takes."""
    for tensor in op.tensors:
        run.freeze(run.of(tensor).layers, reason)
    return Labels()
