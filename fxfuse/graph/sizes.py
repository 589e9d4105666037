"""Symbolic sizes: the shapes that a forward sees when it runs on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_map

from .structures import tensors_in


def symbol_of(size: Any) -> Any:
    """Return the expression of a size; None if it is a number."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    return None if expression is None or expression.is_number else expression


def number_of(size: Any) -> Any:
    """Return what a size is in the example."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def integers_in(expression: Any) -> list[int]:
    """Return the whole numbers in an expression of sizes."""
    return [int(part) for part in expression.atoms() if part.is_Integer]


def place_of(expression: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, int] | None:
    """Return the first tensor that has a size, and the axis."""
    for tensor in tensors:
        for axis, n in enumerate(tensor.shape):
            if symbol_of(n) == expression:
                return tensor, axis
    return None


def run_apart(
    call: Callable[..., Any], args: Sequence[Any], kwargs: Any, failure: Exception
) -> Any:
    """Run a function or a module on numbers, and return outputs without data.

    It is run once more for each size that is a symbol, with this size larger, to learn which sizes
    of its outputs it is.

    Raises:
        TypeError: If a size of its outputs is no multiple of one of the inputs'.
        Exception: What it raised without data, if it cannot be run on numbers or makes no tensors.
    """
    tensors = tensors_in((tuple(args), kwargs))
    if not any(isinstance(t, FakeTensor) for t in tensors):
        raise failure
    sizes: dict[Any, Any] = {symbol_of(n): n for t in tensors for n in t.shape if symbol_of(n)}
    fake = next(t.fake_mode for t in tensors if isinstance(t, FakeTensor))

    def run(larger: Any = None) -> Any:
        def real(t: Tensor) -> Tensor:
            shape = [
                number_of(n) + (larger is not None and symbol_of(n) == larger) for n in t.shape
            ]
            kind = torch.randn if t.is_floating_point() else torch.zeros
            return kind(shape, dtype=t.dtype, device=t.device)

        with unset_fake_temporarily(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            given = tree_map(
                lambda v: real(v) if isinstance(v, FakeTensor) else number_of(v), (args, kwargs)
            )
            return call(*given[0], **given[1])

    try:
        out, others = run(), {}
    except Exception:
        raise failure from None
    if not tensors_in(out):
        raise failure
    for symbol, size in sizes.items():
        try:
            others[symbol] = tensors_in(run(symbol))
        except Exception:
            int(size)  # the module takes no other: from now on, it is this number
    empty = []
    for i, tensor in enumerate(tensors_in(out)):
        larger = [(sizes[symbol], results[i].shape) for symbol, results in others.items()]
        with fake:
            shape = [_size_of(n, axis, larger) for axis, n in enumerate(tensor.shape)]
            empty.append(torch.empty(shape, dtype=tensor.dtype, device=tensor.device))
    return tree_map(lambda v: empty.pop(0) if isinstance(v, Tensor) else v, out)


def _size_of(size: int, axis: int, larger: Sequence[tuple[Any, Sequence[int]]]) -> Any:
    """Return a size as a multiple of a symbol, given the shapes when each symbol is 1 larger."""
    grown = [(n, shape[axis] - size) for n, shape in larger if shape[axis] != size]
    if not grown:
        return size
    symbol, times = grown[0]
    if len(grown) > 1 or size != times * number_of(symbol):
        raise TypeError("a module whose outputs have sizes that cannot be told")
    return symbol * times
