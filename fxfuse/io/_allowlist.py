"""What a saved network may call, and by what name: tensor operators and layers, nothing else.

A saved graph is a program, so a file from a stranger may name only what computes on tensors. Left
out is whatever opens files, runs code that it is given, or reaches behind an object: `torch.load`,
`operator.call`, `Tensor.apply_`, attributes with underscores.
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

from ..graph.writes import read_behind, write_item

_MODULES: dict[str, ModuleType] = {
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


_BUILTINS = ("abs", "bool", "dict", "float", "getattr", "int", "len", "round")
_NO_OPERATORS = {"attrgetter", "call", "itemgetter", "methodcaller"}
_NO_METHODS = {
    *("apply_", "backward", "map2_", "map_", "module_load", "numpy", "register_hook"),
    *("register_post_accumulate_grad_hook", "reinforce", "share_memory_", "storage", "to_dlpack"),
    *("untyped_storage", "storage_type"),
}
_CLASSES = ("torch.nn.modules.", "torchvision.ops.", "torchvision.models.")  # of layers
_WRAPPED = ("torchvision.ops.", "torchvision.models.")  # where functions are wrapped for tracing
_MODES = "fxfuse.graph.modes"
_MOVED = {"fxfuse.modes": _MODES}  # where files written by earlier versions look for them


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Return the functions of torch, operator, math and builtins by name."""
    take_tensors = {id(f) for fs in get_overridable_functions().values() for f in fs}
    functions: dict[str, Callable[..., Any]] = {}
    for module_name, module in _MODULES.items():
        members = vars(module)
        for name, function in members.items():
            base = members.get(name[:-1]) if name.endswith("_") else function  # relu_ as relu
            allowed = name in _MAKERS or not name.startswith("_") and id(base) in take_tensors
            if allowed and callable(function) and not isinstance(function, type):
                functions[f"{module_name}.{name}"] = function
    for name in set(operator.__all__) - _NO_OPERATORS:
        functions[f"operator.{name}"] = getattr(operator, name)
    for name, function in vars(math).items():
        if callable(function) and not name.startswith("_"):
            functions[f"math.{name}"] = function
    for function in (read_behind, write_item):
        functions[f"{function.__module__}.{function.__name__}"] = function
    return functions | {f"builtins.{name}": getattr(builtins, name) for name in _BUILTINS}


@cache
def _names() -> dict[int, str]:
    return {id(function): name for name, function in reversed(_functions().items())}


def name_of_function(function: Any) -> str | None:
    """Return the name of a function that may be saved, None if it may not."""
    if function is None:
        return None
    listed = _names().get(id(function))
    if listed is not None:
        return listed
    name = f"{getattr(function, '__module__', None)}.{getattr(function, '__name__', None)}"
    return name if function_of(name) is function else None


def function_of(name: str) -> Callable[..., Any] | None:
    """Return the function of a name, None if there is none that may be called.

    Of torchvision, it is one that is public in its operators, or that was given to `torch.fx.wrap`.
    """
    listed = _functions().get(name)
    module_name, _, leaf = name.rpartition(".")
    if listed is not None or not module_name.startswith(_WRAPPED):
        return listed
    module = _module(module_name)
    function = getattr(module, leaf, None)
    if not isinstance(function, FunctionType) or function.__module__ != module_name:
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
    returned = (kind for kind in vars(torch.return_types).values() if isinstance(kind, type))
    kinds = [Tensor, *returned]
    names = {name for kind in kinds for name in dir(kind) if not name.startswith("_")}
    data = {name for name in names if any(not callable(getattr(k, name, len)) for k in kinds)}
    return frozenset(data - {"grad_fn"})


def is_attribute(name: Any) -> bool:
    """Tell whether a saved graph may read an attribute of this name."""
    return isinstance(name, str) and name in _attributes()


def name_of_class(kind: type) -> str | None:
    """Return the name of a class of layers that may be saved, None if it may not."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    return name if class_of(name) is kind else None


def class_of(name: str) -> type[nn.Module] | None:
    """Return the class of layers of a name: of torch, of torchvision, or a live mode flag."""
    module_name, _, leaf = name.rpartition(".")
    module_name = _MOVED.get(module_name, module_name)
    if not f"{module_name}.".startswith(_CLASSES) and module_name != _MODES:
        return None
    kind = getattr(_module(module_name), leaf, None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        return None
    return kind if kind.__module__ == module_name else None


def _module(name: str) -> ModuleType | None:
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
