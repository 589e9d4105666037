"""A network as plain JSON values and named tensors: the writing half of the saved form.

A description has tables of `tensors` and of `modules`; each module comes after its parts, the last
one is the network. What is held twice is written once, so that tied weights stay tied. Values that
JSON lacks are objects with one key, their kind: `{"tuple": [..]}`, `{"node": name}` and so on.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from .errors import SaveError
from .naming import is_attribute, is_method, name_of_class, name_of_function

# What every module has; of these, tensors, parts and the mode are written down by themselves.
INTERNAL = frozenset(vars(nn.Module())) | {"_is_full_backward_hook"}
GRAPH_MODULE = "torch.fx.GraphModule"
_HOOKS = sorted(name for name in INTERNAL if name.endswith("_hooks"))
_SIMPLE: dict[type, tuple[str, Callable[[Any], Any]]] = {
    torch.dtype: ("dtype", lambda value: str(value).removeprefix("torch.")),
    torch.memory_format: ("memory_format", lambda value: str(value).removeprefix("torch.")),
    torch.layout: ("layout", lambda value: str(value).removeprefix("torch.")),
    torch.device: ("device", str),
    complex: ("complex", lambda value: [str(value.real), str(value.imag)]),
    range: ("range", lambda value: [value.start, value.stop, value.step]),
    type(...): ("ellipsis", lambda _: None),
}


def encode(network: fx.GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description of a network, and its state by the names of its state dictionary.

    Raises:
        SaveError: At the first part that cannot be written down without code of its own.
    """
    writer = _Writer(network)
    writer.module(network, "")
    return {"tensors": writer.tensors, "modules": writer.modules}, writer.state


class _Writer:
    """Fills the tables of a description."""

    def __init__(self, network: fx.GraphModule) -> None:
        self.state: dict[str, Tensor] = {}
        self.tensors: list[dict[str, Any]] = []
        self.modules: list[dict[str, Any]] = []
        self._keys: dict[int, str] = {}
        self._tensor_at: dict[int, int] = {}
        self._module_at: dict[int, int] = {}
        for key, value in network.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                raise _refused(f"a state that is no tensor: {key}", "the network")
            self.state[key] = _stored(value, key)
            self._keys.setdefault(id(value), key)

    def module(self, module: nn.Module, path: str) -> int:
        """Write a module after its parts; return its place in the table."""
        if id(module) not in self._module_at:
            held = [(n, m) for n, m in module._modules.items()]
            parts = {
                n: None if m is None else self.module(m, f"{path}.{n}" if path else n)
                for n, m in held
            }
            self.modules.append(self._described(module, parts, path or "the network"))
            self._module_at[id(module)] = len(self.modules) - 1
        return self._module_at[id(module)]

    def _described(
        self, module: nn.Module, parts: dict[str, int | None], where: str
    ) -> dict[str, Any]:
        if any(vars(module).get(name) for name in _HOOKS):
            raise _refused("hooks, which are code", where)
        found: dict[str, Any] = {"kind": GRAPH_MODULE, "training": module.training, "parts": parts}
        found["parameters"] = self._held(module._parameters, where)
        found["buffers"] = self._held(module._buffers, where)
        found["hidden"] = sorted(module._non_persistent_buffers_set)
        if isinstance(module, fx.GraphModule):
            found["settings"] = {k: v for k, v in vars(module).items() if k == "_version"}
            return found | {"name": type(module).__name__, "nodes": self._nodes(module, where)}
        name = name_of_class(type(module))
        if name is None:
            raise _refused(f"a module of the class {type(module).__qualname__}", where)
        state = cast(Any, module).__reduce_ex__(2)[2]
        settings = {k: v for k, v in state.items() if k not in INTERNAL}
        values = {k: self.value(v, f"{where}.{k}") for k, v in settings.items()}
        return found | {"kind": name, "settings": values}

    # --- tensors ----------------------------------------------------------------------------------

    def _held(self, tensors: Mapping[str, Tensor | None], where: str) -> dict[str, int | None]:
        return {
            n: None if t is None else self.tensor(t, f"{where}.{n}") for n, t in tensors.items()
        }

    def tensor(self, tensor: Tensor, where: str) -> int:
        """Write a tensor; return its place in the table."""
        if id(tensor) in self._tensor_at:
            return self._tensor_at[id(tensor)]
        parameter = isinstance(tensor, nn.Parameter)
        if type(tensor) not in (Tensor, nn.Parameter):
            raise _refused(f"a {type(tensor).__name__} instead of a plain tensor", where)
        found: dict[str, Any] = {"parameter": parameter, "gradient": tensor.requires_grad}
        key = self._keys.get(id(tensor))
        if key is None:
            plain = _stored(tensor, where)
            raw = plain.view(-1).view(torch.uint8).numpy().tobytes()
            found["data"] = base64.b64encode(raw).decode("ascii")
            found["dtype"] = _SIMPLE[torch.dtype][1](plain.dtype)
            found["shape"] = list(plain.shape)
        else:
            found["key"] = key
        if tensor.is_complex():
            found["complex"] = True
        if not tensor.is_contiguous() and tensor.numel():
            found["order"] = memory_order(tensor)
        self._tensor_at[id(tensor)] = len(self.tensors)
        self.tensors.append(found)
        return len(self.tensors) - 1

    # --- graphs -----------------------------------------------------------------------------------

    def _nodes(self, module: fx.GraphModule, where: str) -> list[dict[str, Any]]:
        if type(module.graph._codegen) is not CodeGen:
            raise _refused("a graph that packs its inputs or outputs in its own way", where)
        return [self._node(n, f"node '{n.name}' of {where}") for n in module.graph.nodes]

    def _node(self, node: fx.Node, where: str) -> dict[str, Any]:
        found: dict[str, Any] = {"name": node.name, "op": node.op, "target": node.target}
        if node.op == "call_function":
            found |= _function(node, where)
        elif node.op == "call_method" and not is_method(str(node.target)):
            raise _refused(f"a call of the method {node.target!r}", where)
        if node.args:
            found["args"] = [self.value(a, where) for a in node.args]
        if node.kwargs:
            found["kwargs"] = {k: self.value(v, where) for k, v in node.kwargs.items()}
        if "origin" in node.meta:
            made_by, sources = node.meta["origin"]
            found["origin"] = [made_by, list(sources)]
        return found

    # --- values -----------------------------------------------------------------------------------

    def value(self, value: Any, where: str) -> Any:
        """Return a value as JSON knows it."""
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        if isinstance(value, fx.Node):
            return {"node": value.name}
        if isinstance(value, Tensor):
            return {"tensor": self.tensor(value, where)}
        if isinstance(value, (tuple, list, set, frozenset, dict, slice)):
            return self._container(value, where)
        if type(value) in _SIMPLE:
            kind, plain = _SIMPLE[type(value)]
            return {kind: plain(value)}
        name = name_of_function(value) if callable(value) else None
        if name is None:
            raise _refused(f"{_called(value)}, a {type(value).__name__}", where)
        return {"function": name}

    def _container(self, value: Any, where: str) -> Any:
        if isinstance(value, dict):
            return {"dict": [[self.value(x, where) for x in pair] for pair in value.items()]}
        if isinstance(value, slice):
            ends = value.start, value.stop, value.step
            return {"slice": [self.value(x, where) for x in ends]}
        parts = [self.value(x, where) for x in value]
        if isinstance(value, list):
            return parts
        if isinstance(value, torch.Size):
            return {"size": parts}
        if isinstance(value, (set, frozenset)):
            return {"set": sorted(parts, key=repr)}
        if hasattr(value, "_fields"):
            return {"namedtuple": [type(value).__name__, list(value._fields), parts]}
        return {"tuple": parts}


def _function(node: fx.Node, where: str) -> dict[str, Any]:
    """Return what a node calls: a function by name, or a class of named tuples by its fields."""
    fields = getattr(node.target, "_fields", None)
    if isinstance(node.target, type) and issubclass(node.target, tuple) and fields:
        return {"target": node.target.__name__, "fields": list(fields)}
    name = name_of_function(node.target)
    if name is None:
        raise _refused(f"a call of {_called(node.target)}", where)
    if name == "builtins.getattr" and not is_attribute(node.args[1]):
        raise _refused(f"a look at the attribute {node.args[1]!r}", where)
    return {"target": name}


def memory_order(tensor: Tensor) -> list[int]:
    """Return the axes of a tensor from the outermost in memory to the innermost."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))


def _stored(tensor: Tensor, where: str) -> Tensor:
    """Return a tensor as it goes to the file: contiguous, on the CPU, real."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise _refused("a tensor that is sparse, quantised or without data", where)
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    return (torch.view_as_real(plain) if plain.is_complex() else plain).contiguous()


def _called(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or repr(value)
    return f"'{getattr(value, '__module__', '')}.{name}'".replace("'.", "'")[:200]


def _refused(met: str, where: str) -> SaveError:
    return SaveError(
        met,
        where=where,
        expected="tensors, layers of torch.nn and torchvision.ops, and functions on tensors",
        do="let torch.fx trace through it, so that the graph holds what it computes; or write the "
        "weights alone with safetensors.torch.save_file(network.state_dict(), path)",
    )
