"""Follow the values of a labelled run: which operator made them, and whether they vary.

A value varies if it depends on inputs, on weights or on chance.

Labels follow operators. A value that leaves torch (as numbers, or an array) and comes back was made
out of sight, so what went in must stay. A number that varies may not decide which units are picked:
with other inputs or weights, it would pick other units.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

OUT_OF_SIGHT = "its values leave torch, as numbers or an array"
_EXITS = [  # methods that hand out what a tensor holds without an operator
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.data_ptr,
    torch.Tensor.storage,
    torch.Tensor.untyped_storage,
]


class Values:
    """The values of one run.

    Args:
        freeze: Freezes the units of some tensors, for a reason.

    Attributes:
        loose: Whether the running node works with numbers that vary.
    """

    def __init__(self, freeze: Callable[[Iterable[Tensor], str], None]) -> None:
        self._freeze, self.loose = freeze, False
        self._inputs: Sequence[Tensor] = ()
        self._varies = WeakTensorKeyDictionary()
        self._sharing: dict[int, list[weakref.ref[Tensor]]] = {}

    def enter(self, inputs: Sequence[Tensor], loose: bool) -> None:
        """Begin a node.

        Args:
            inputs: All tensors that it can read.
            loose: Whether numbers among its arguments vary.
        """
        self._inputs, self.loose = inputs, loose

    def varies(self, tensor: Tensor) -> bool:
        """Tell whether a value depends on inputs, on weights or on chance."""
        return bool(self._varies.get(tensor, False))

    def make(self, tensor: Tensor, varies: bool) -> None:
        """Note that a tensor is given, that an operator made it, or that one wrote to it."""
        self._varies[tensor] = varies
        if varies:
            for other in self.sharing(tensor):
                self._varies[other] = True
        shared = self._sharing.setdefault(_memory(tensor), [])
        shared[:] = [r for r in shared if r() is not None and r() is not tensor]
        shared.append(weakref.ref(tensor))

    def sharing(self, tensor: Tensor) -> list[Tensor]:
        """Return the other tensors that lie in the same memory."""
        shared = self._sharing.get(_memory(tensor), ())
        others = [reference() for reference in shared]
        return [other for other in others if other is not None and other is not tensor]

    def meet(self, tensors: Iterable[Tensor]) -> None:
        """Look for tensors that no operator made: what the running node read then stays.

        Whole numbers may be constants of the code, as in `x[:, [0, 2]]`.
        """
        for tensor in tensors:
            if tensor not in self._varies:
                counted = not (tensor.is_floating_point() or tensor.is_complex())
                self.make(tensor, self.loose or not counted)
                if tensor.numel() > 1 and self.varies(tensor):
                    self._freeze(self._inputs, OUT_OF_SIGHT)

    def leave(self, tensors: Sequence[Tensor]) -> None:
        """Freeze the units of tensors whose values leave torch.

        If these vary, so may the numbers that the running node computes, and even which operators
        it runs.
        """
        self._freeze(tensors, OUT_OF_SIGHT)
        if any(self.varies(tensor) for tensor in tensors):
            self.loose = True
            self._freeze(self._inputs, OUT_OF_SIGHT)


def _memory(tensor: Tensor) -> int:
    """Return where the memory of a tensor begins; of a sparse one, a number of its own."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


class Exits(TorchFunctionMode):
    """Watch for values that leave torch without an operator."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch; note what it hands out."""
        if func in _EXITS and isinstance(args[0], Tensor):
            self.values.meet(args[:1])
            self.values.leave(args[:1])
        return func(*args, **(kwargs or {}))
