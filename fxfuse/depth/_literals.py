"""Arguments of nodes that are no nodes: sizes and rates, copied from one graph into another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.utils._pytree import tree_flatten, tree_unflatten


def copy_literals(node: fx.Node, into: fx.Node) -> bool:
    """Copy the literal arguments of a node, if both do the same in the same words."""
    if (node.op, len(node.args), [*node.kwargs]) != (into.op, len(into.args), [*into.kwargs]):
        return False
    (leaves, layout), (other_leaves, other_layout) = (
        tree_flatten((n.args, n.kwargs), lambda x: isinstance(x, fx.Node)) for n in (node, into)
    )
    if (node.op != "call_module" and node.target != into.target) or layout != other_layout:
        return False
    mixed = [_literal(a, b) for a, b in zip(leaves, other_leaves)]
    into.args, into.kwargs = tree_unflatten(mixed, other_layout)
    return True


def _literal(argument: Any, other: Any) -> Any:
    """Return an argument if it and the other are literals, the other if not; also in slices."""
    if isinstance(argument, slice) and isinstance(other, slice):
        ends = (argument.start, argument.stop, argument.step), (other.start, other.stop, other.step)
        return slice(*(_literal(a, b) for a, b in zip(*ends)))
    return other if isinstance(argument, fx.Node) or isinstance(other, fx.Node) else argument


def fit_sizes(copied: fx.Node, theirs: Sequence[int], wanted: Sequence[int]) -> None:
    """Replace the sizes in the arguments of a node that reshapes to one shape by another's."""
    leaves, layout = tree_flatten((copied.args, copied.kwargs), lambda x: isinstance(x, fx.Node))
    if copied.op == "call_module" or len(leaves) != len(theirs) + 1 or len(theirs) != len(wanted):
        return
    leaves[1:] = [b if x == a else x for x, a, b in zip(leaves[1:], theirs, wanted)]
    copied.args, copied.kwargs = tree_unflatten(leaves, layout)
