"""What a saved network may call, and by what name: tensor operators and layers, nothing else.

A saved graph is a program, so a file from a stranger may name only what computes on tensors. All
that opens files, runs code that it is given, or reaches what is behind an object is left out
(`torch.load`, `operator.call`, `Tensor.apply_`, attributes with underscores).
"""

from __future__ import annotations

import builtins
import importlib
import math
import operator
from collections.abc import Callable
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fft, linalg, nn, special
from torch.fx import _symbolic_trace
from torch.nn import functional
from torch.overrides import get_overridable_functions

_SPACES: dict[str, ModuleType] = {
    "torch": torch,
    "torch.nn.functional": functional,
    "torch.linalg": linalg,
    "torch.fft": fft,
    "torch.special": special,
}


_MAKERS = {  # what torch does not list among the functions that take tensors
    *("_assert", "arange", "as_tensor", "bartlett_window", "blackman_window", "broadcast_shapes"),
    *("empty", "eye", "fftfreq", "full", "hamming_window", "hann_window", "hardsigmoid"),
    *("hardswish", "is_tensor", "kaiser_window", "linspace", "logspace", "normal", "ones"),
    *("promote_types", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like"),
    *("randperm", "range", "result_type", "rfftfreq", "scalar_tensor", "sigmoid", "tanh"),
    *("tensor", "tril_indices", "triu_indices", "unique", "upsample", "upsample_bilinear"),
    *("upsample_nearest", "vander", "zeros"),
}


_BUILTINS = ("abs", "bool", "float", "getattr", "int", "len", "round")


_NO_OPERATORS = {"attrgetter", "call", "itemgetter", "methodcaller"}


_NO_METHODS = {
    *("apply_", "backward", "map2_", "map_", "module_load", "numpy", "register_hook"),
    *("register_post_accumulate_grad_hook", "reinforce", "share_memory_", "storage", "to_dlpack"),
    *("untyped_storage", "storage_type"),
}


_CLASSES = ("torch.nn.modules.", "torchvision.ops.", "torchvision.models.")


_WRAPPED = ("torchvision.ops.", "torchvision.models.")


_MODES = "fxfuse.graph._modes"
_MOVED = {"fxfuse.modes": _MODES}  # where files written by earlier versions look for them


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Return the functions of torch, operator, math and builtins by name."""
    known = {id(f) for fs in get_overridable_functions().values() for f in fs}
    found: dict[str, Callable[..., Any]] = {}
    for space, module in _SPACES.items():
        held = vars(module)
        for name, function in held.items():
            plain = held.get(name[:-1]) if name.endswith("_") else function  # relu_ as relu
            named = name in _MAKERS or not name.startswith("_") and id(plain) in known
            if named and callable(function) and not isinstance(function, type):
                found[f"{space}.{name}"] = function
    for name in set(operator.__all__) - _NO_OPERATORS:
        found[f"operator.{name}"] = getattr(operator, name)
    numbers = {name: f for name, f in vars(math).items() if callable(f) and name[0] != "_"}
    found |= {f"math.{name}": function for name, function in numbers.items()}
    return found | {f"builtins.{name}": getattr(builtins, name) for name in _BUILTINS}


@cache
def _names() -> dict[int, str]:
    return {id(function): name for name, function in reversed(_functions().items())}


def name_of_function(function: Any) -> str | None:
    """Return the name of a function that may be saved, None if it may not."""
    known = _names().get(id(function))
    if known is not None or function is None:
        return known
    name = f"{getattr(function, '__module__', None)}.{getattr(function, '__name__', None)}"
    return name if function_of(name) is function else None


def function_of(name: str) -> Callable[..., Any] | None:
    """Return the function of a name, None if there is none that may be called.

    Of torchvision, it is one that is public in its operators, or that was given to `torch.fx.wrap`.
    """
    known = _functions().get(name)
    space, _, leaf = name.rpartition(".")
    if known is not None or not space.startswith(_WRAPPED):
        return known
    module = _module(space)
    function = getattr(module, leaf, None)
    if not isinstance(function, FunctionType) or function.__module__ != space:
        return None
    wrapped = (id(vars(module)), leaf) in _symbolic_trace._wrapped_fns_to_patch
    public = getattr(_module("torchvision.ops"), leaf, None) is function
    return function if wrapped or public else None


def is_method(name: str) -> bool:
    """Tell whether a saved graph may call a method of this name."""
    public = name.isidentifier() and not name.startswith("_") and name not in _NO_METHODS
    return public and callable(getattr(Tensor, name, None))


@cache
def _attributes() -> frozenset[str]:
    """Return the attributes of tensors, and the fields of what operators return."""
    kinds = [Tensor, *(k for k in vars(torch.return_types).values() if isinstance(k, type))]
    named = {n for k in kinds for n in dir(k) if not n.startswith("_")}
    plain = {n for n in named if any(not callable(getattr(k, n, len)) for k in kinds)}
    return frozenset(plain - {"grad_fn"})


def is_attribute(name: Any) -> bool:
    """Tell whether a saved graph may read an attribute of this name."""
    return isinstance(name, str) and name in _attributes()


def name_of_class(kind: type) -> str | None:
    """Return the name of a class of layers that may be saved, None if it may not."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    return name if class_of(name) is kind else None


def class_of(name: str) -> type[nn.Module] | None:
    """Return the class of layers of a name: of torch, of torchvision, or a live mode flag."""
    space, _, leaf = name.rpartition(".")
    space = _MOVED.get(space, space)
    if not f"{space}.".startswith(_CLASSES) and space != _MODES:
        return None
    found = getattr(_module(space), leaf, None)
    real = isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == space
    return found if real else None


def _module(name: str) -> ModuleType | None:
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
