"""Copy a model together with its hooks, so that they run while the copy is captured.

What a hook computes is then part of the graph. A list that a hook writes to is copied, too, so that
the caller's stays as it is.
"""

from __future__ import annotations

import copy
from types import CellType, FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import TraceError

ModelT = TypeVar("ModelT", bound=nn.Module)


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a call of a module runs more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def copied(model: ModelT) -> ModelT:
    """Copy a model, but not its parameters; its hooks see the copy and write to copies.

    Lazy parameters are copied, since a hook gives them their shape when they first run.
    `copy.deepcopy` leaves functions as they are, with the variables that they have from outside.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if not is_lazy(p)}
    attributes = [value for part in model.modules() for value in vars(part).values()]
    computed = [t for t in attributes if isinstance(t, Tensor) and not t.is_leaf]
    memo |= {id(t): t.detach().clone() for t in computed}  # weights that hooks compute
    result = copy.deepcopy(model, memo)
    for part in result.modules():
        for table in (part._forward_hooks, part._forward_pre_hooks):
            for key, hook in table.items():
                if isinstance(hook, FunctionType):  # methods and objects are copied by now
                    table[key] = _on_copies(hook, memo)
    return result


def _on_copies(value: Any, memo: dict[int, Any]) -> Any:
    """Return a function whose variables from outside are copies; any other value copied."""
    if not isinstance(value, FunctionType):
        return copy.deepcopy(value, memo)
    if value.__closure__ is None:
        return value
    if id(value) not in memo:
        cells = tuple(CellType() for _ in value.__closure__)
        made = FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
        )
        made.__kwdefaults__ = value.__kwdefaults__
        memo[id(value)] = made
        for cell, own in zip(value.__closure__, cells):
            try:
                own.cell_contents = _on_copies(cell.cell_contents, memo)
            except ValueError:  # a variable that has no value yet
                continue
    return memo[id(value)]


def refuse_hooks(model: nn.Module, name: str) -> None:
    """Refuse hooks that no graph shows: around the whole model, and around all modules there are.

    Raises:
        TraceError: If there are any.
    """
    every = nn.modules.module
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        raise TraceError(
            "a forward hook of all modules",
            where="torch.nn.modules.module.register_module_forward_hook or _pre_hook",
            expected="modules that compute nothing outside their forward",
            do="call handle.remove() on what registering it returned",
        )
    if has_hooks(model):
        raise TraceError(
            "a forward hook of the whole model",
            where=name,
            expected="hooks of its parts at most, which run while the model is captured",
            do="call handle.remove() on what registering it returned, or clear "
            "model._forward_hooks and model._forward_pre_hooks",
        )
