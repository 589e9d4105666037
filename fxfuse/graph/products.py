"""Products with a matrix, `x @ W + b`, written as linear layers and back.

A linear layer keeps its matrix the other way round. Where networks differ in how they write the
same product, all get the one form, in which their weights have the same axes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .state import part_at, replace_tensor

PRODUCTS = (operator.matmul, torch.matmul, torch.mm, "matmul", "mm")
SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
TURNS = (torch.t, "t")
WRITTEN = "written as"  # key of the meta of a linear layer; its value says how it was written


@dataclass(frozen=True, eq=False)
class _Product:
    """A product with a matrix that only it uses.

    Attributes:
        node: The node that multiplies.
        weight: The node of the matrix.
        turned: The node that turns the matrix round for a linear layer, if there is one.
        end: The node that adds a vector to the product; itself if none does.
        bias: The node of the vector.
    """

    node: fx.Node
    weight: fx.Node
    turned: fx.Node | None = None
    end: fx.Node | None = None
    bias: fx.Node | None = None


def count_products(module: fx.GraphModule) -> int:
    """Return how many linear layers a graph writes as products, or with a matrix turned round."""
    return len(_products(module))


def as_linear(module: fx.GraphModule) -> None:
    """Write products as linear layers, in place; a vector that is added is their bias."""
    for found in _products(module):
        _turn(module, found.weight)
        if found.turned is not None:
            found.node.meta[WRITTEN] = "turned"
            found.turned.replace_all_uses_with(found.weight)
            module.graph.erase_node(found.turned)
            continue
        end = found.end or found.node
        with module.graph.inserting_after(end):
            read = found.node.args[1 if found.node.target is torch.addmm else 0]
            new = module.graph.call_function(F.linear, (read, found.weight, found.bias))
        new.meta |= {**end.meta, WRITTEN: "product"}
        end.replace_all_uses_with(new)
        for unread in dict.fromkeys((end, found.node)):
            module.graph.erase_node(unread)
    module.recompile()


def as_written(module: fx.GraphModule) -> None:
    """Undo `as_linear`, in place: matrices lie as their models have them."""
    found = [n for n in module.graph.nodes if WRITTEN in n.meta]
    for node in found:
        written = node.meta.pop(WRITTEN)
        read, weight, *more = node.args
        bias = more[0] if more else node.kwargs.get("bias")
        _turn(module, weight)
        with module.graph.inserting_before(node):
            if written == "turned":
                turned = module.graph.call_method("t", (weight,))
                new = module.graph.call_function(F.linear, (read, turned, bias))
            else:
                new = module.graph.call_function(operator.matmul, (read, weight))
                if bias is not None:
                    new = module.graph.call_function(operator.add, (new, bias))
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    if found:
        module.recompile()


def _turn(module: fx.GraphModule, weight: fx.Node) -> None:
    """Transpose a matrix in place."""
    name = str(weight.target)
    matrix = module.get_parameter(name)
    replace_tensor(module, name, matrix.detach().t().contiguous())


def _products(module: fx.GraphModule) -> list[_Product]:
    found = (_product(module, node) for node in module.graph.nodes)
    return [product for product in found if product is not None]


def _product(module: fx.GraphModule, node: fx.Node) -> _Product | None:
    """Return the product that a node computes, if its matrix is used here alone."""
    args: Any = node.args
    if node.target is F.linear and len(args) > 1 and isinstance(args[1], fx.Node):
        turned = args[1]
        weight: Any = turned.args[0] if turned.target in TURNS and len(turned.users) == 1 else None
        return _Product(node, weight, turned) if _own(module, weight, 2) else None
    if node.target is torch.addmm and len(args) == 3 and not node.kwargs:
        own = _own(module, args[2], 2) and _own(module, args[0], 1)
        return _Product(node, args[2], bias=args[0]) if own else None
    if node.target not in PRODUCTS or len(args) != 2 or not _own(module, args[1], 2):
        return None
    end = next(iter(node.users)) if len(node.users) == 1 else node
    if end.target in SUMS and len(end.args) == 2 and not end.kwargs:
        others: list[Any] = [n for n in end.args if n is not node]
        if len(others) == 1 and _own(module, others[0], 1):
            return _Product(node, args[1], end=end, bias=others[0])
    return _Product(node, args[1])


def _own(module: fx.GraphModule, node: object, rank: int) -> bool:
    """Tell whether a node is a parameter of some rank that one other node reads."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or len(node.users) != 1:
        return False
    part = part_at(module, str(node.target))
    again = [n for n in module.graph.nodes if n.target == node.target]
    return isinstance(part, nn.Parameter) and part.dim() == rank and len(again) == 1
