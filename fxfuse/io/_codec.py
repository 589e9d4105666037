"""A network as plain JSON values and named tensors, written and read back.

A description has tables of `tensors` and of `modules`; each module comes after its parts, and the
last one is the network. What is held twice is written once, so that tied weights stay tied. Values
that JSON lacks are objects with one key, their kind: `{"tuple": [..]}`, `{"node": name}` and so on.

Reading unpickles nothing and needs nothing of the original model. Every name is looked up among
what `_allowlist` allows, and every text that ends up in the code that torch.fx generates is
checked, so that a file from a stranger can compute on tensors and do nothing else.
"""

from __future__ import annotations

import base64
import keyword
import math
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from .._schema import read
from ..errors import CheckpointError, FuseError, SaveError
from ..graph.state import part_at
from ._allowlist import (
    class_of,
    function_of,
    is_attribute,
    is_method,
    name_of_class,
    name_of_function,
)


class Wrong(Exception):
    """Something in a description that cannot be."""


def require(good: bool, what: str) -> None:
    """Refuse what is not good."""
    if not good:
        raise Wrong(what)


def tensor_of(data: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor whose bytes are given in base64."""
    raw, kind = bytearray(base64.b64decode(data, validate=True)), _of_torch(torch.dtype)(dtype)
    if not raw:
        require(0 in shape, "a tensor without data")
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(raw, dtype=torch.uint8).clone().view(kind).view(shape)


def _of_torch(kind: type) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        found = vars(torch).get(name)
        require(isinstance(found, kind), f"no {kind.__name__}: {str(name)[:100]!r}")
        return found

    return find


def function_named(name: str) -> Callable[..., Any]:
    """Return the function of a name, if it may be called."""
    found = function_of(name)
    if found is None:
        raise Wrong(f"a function that is not allowed: {name[:100]!r}")
    return found


def _namedtuple(parts: list[Any]) -> Any:
    name, fields, values = parts
    return kind_of_tuple(name, tuple(fields))(*values)


@lru_cache(maxsize=256)
def kind_of_tuple(name: str, fields: tuple[str, ...]) -> type:
    """Return a class of named tuples like one of the model's code, which is not needed for it."""
    require(all(isinstance(n, str) for n in (name, *fields)), "names that are no text")
    return namedtuple(name, fields)


PLAIN: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "complex": lambda parts: complex(float(parts[0]), float(parts[1])),
    "dtype": _of_torch(torch.dtype),
    "memory_format": _of_torch(torch.memory_format),
    "layout": _of_torch(torch.layout),
    "device": torch.device,
    "range": lambda parts: range(*parts),
    "ellipsis": lambda _: ...,
    "function": function_named,
}


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "size": torch.Size,
    "slice": lambda parts: slice(*parts),
    "dict": dict,
    "namedtuple": _namedtuple,
}


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


T = TypeVar("T")


@dataclass(frozen=True)
class _TensorEntry:
    parameter: bool
    gradient: bool
    key: str | None = None
    data: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    complex: bool = False
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _NodeEntry:
    name: str
    op: str
    target: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    origin: tuple[Any, ...] | None = None
    fields: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _ModuleEntry:
    kind: str
    training: bool
    parts: dict[str, int | None]
    parameters: dict[str, int | None]
    buffers: dict[str, int | None]
    hidden: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    nodes: tuple[_NodeEntry, ...] = ()


@dataclass(frozen=True)
class _Description:
    tensors: tuple[_TensorEntry, ...]
    modules: tuple[_ModuleEntry, ...]


def decode(description: Any, state: Mapping[str, Tensor], where: str) -> fx.GraphModule:
    """Return the network of a description.

    Args:
        description: What `encode` returned.
        state: The tensors that it names; they become those of the network.
        where: The file, for errors.

    Raises:
        CheckpointError: If the description does not hold together, or names what is not allowed.
    """
    try:
        found = read(_Description, description, "the description")
        reader = _Reader(state)
        reader.tensors = [reader.tensor(entry) for entry in found.tensors]
        for entry in found.modules:
            reader.modules.append(reader.module(entry))
        network = reader.modules[-1]
        if not isinstance(network, fx.GraphModule):
            raise Wrong(f"a {type(network).__name__} where the network should be")
        if set(network.state_dict()) != set(state):
            raise Wrong("tensors that are not those of the network")
        return network
    except FuseError as error:
        raise refused(f"a network that cannot be rebuilt: {error.met}", where, error) from error
    except Exception as error:  # whatever torch says to sizes, settings and arguments
        reason = f"{type(error).__name__}: {error}" if type(error) is not Wrong else str(error)
        raise refused(f"a network that cannot be rebuilt: {reason[:300]}", where) from error


def refused(met: str, where: str, inner: FuseError | None = None) -> CheckpointError:
    """Return the error for a saved network that is refused."""
    return CheckpointError(
        met,
        where=where if inner is None else f"{where}, {inner.where}",
        expected="a file that fxfuse.save wrote, unchanged",
        do="save the network again; of a file from others, ask for its weights alone",
    )


class _Reader:
    """Rebuilds the tables of a description."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []

    def tensor(self, entry: _TensorEntry) -> Tensor:
        """Return a tensor as it was: real or complex, laid out in memory as before."""
        plain = (
            tensor_of(entry.data, entry.dtype, entry.shape)
            if entry.key is None
            else self.state[entry.key]
        )
        if entry.complex:
            plain = torch.view_as_complex(plain.contiguous())
        if entry.order is not None:
            axes = list(entry.order)
            require(sorted(axes) == list(range(plain.dim())), "axes that are no permutation")
            back = [axes.index(d) for d in range(len(axes))]
            plain = plain.permute(axes).contiguous().permute(back)
        if entry.parameter:
            return nn.Parameter(plain, entry.gradient)
        return plain.requires_grad_(entry.gradient)

    # --- modules ----------------------------------------------------------------------------------

    def module(self, entry: _ModuleEntry) -> nn.Module:
        """Return a module with its tensors, parts and settings."""
        if entry.kind == GRAPH_MODULE:
            return self._graph_module(entry)
        kind = class_of(entry.kind)
        if kind is None:
            raise Wrong(f"a class that is not allowed: {entry.kind[:100]!r}")
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        settings = {}
        for name, value in entry.settings.items():
            free = name.isidentifier() and not name.startswith("__") and name not in INTERNAL
            require(free, f"a setting that is not allowed: {name[:100]!r}")
            settings[name] = self.value(value, {})
        cast(Any, module).__setstate__(vars(module) | self._held(entry) | settings)
        return module

    def _graph_module(self, entry: _ModuleEntry) -> fx.GraphModule:
        require(entry.name.isidentifier(), f"a name that is no name of a class: {entry.name!r}")
        holder, held = nn.Module(), self._held(entry)
        vars(holder).update(held)
        module = fx.GraphModule(holder, self._graph(entry, holder), entry.name)
        version = read(dict[str, int], entry.settings, "the settings")
        require(set(version) <= {"_version"}, "settings of a graph")
        vars(module).update(held | version)
        return module

    def _held(self, entry: _ModuleEntry) -> dict[str, Any]:
        """Return the tensors, parts and mode of a module as its instance dictionary has them."""
        parts = {n: None if i is None else _at(self.modules, i) for n, i in entry.parts.items()}
        tensors = {
            "_parameters": self._tensors(entry.parameters),
            "_buffers": self._tensors(entry.buffers),
        }
        wrong = [
            name
            for name, tensor in tensors["_parameters"].items()
            if not isinstance(tensor, (nn.Parameter, type(None)))
        ]
        require(not wrong, f"parameters that are none: {wrong}")
        names = [*parts, *tensors["_parameters"], *tensors["_buffers"]]
        for name in names:
            require(_is_part_name(name), f"a name that is not allowed: {name[:100]!r}")
        require(len(set(names)) == len(names), "two parts of one name")
        hidden = set(entry.hidden)
        require(hidden <= set(tensors["_buffers"]), "hidden buffers that do not exist")
        rest = {"_modules": parts, "training": entry.training}
        return {**tensors, **rest, "_non_persistent_buffers_set": hidden}

    def _tensors(self, held: Mapping[str, int | None]) -> dict[str, Tensor | None]:
        return {n: None if i is None else _at(self.tensors, i) for n, i in held.items()}

    # --- graphs -----------------------------------------------------------------------------------

    def _graph(self, entry: _ModuleEntry, holder: nn.Module) -> fx.Graph:
        graph = fx.Graph()
        nodes: dict[str, fx.Node] = {}
        for n in entry.nodes:
            require(n.name.isidentifier() and n.name not in nodes, f"a node {n.name[:100]!r}")
            require(all(map(_is_argument, n.kwargs)), f"arguments of the node {n.name[:100]!r}")
            args = tuple(self.value(a, nodes) for a in n.args)
            kwargs = {k: self.value(a, nodes) for k, a in n.kwargs.items()}
            target = _target(n, args, kwargs, holder)
            nodes[n.name] = graph.create_node(n.op, target, args, kwargs, n.name)
            if n.origin is not None:
                made_by, sources = read(tuple[str, tuple[str, ...]], list(n.origin), "an origin")
                nodes[n.name].meta["origin"] = made_by, sources
        ops = [n.op for n in entry.nodes]
        require(ops.count("output") == 1 and ops[-1] == "output", "a graph without one output")
        graph.lint()
        return graph

    # --- values -----------------------------------------------------------------------------------

    def value(self, value: Any, nodes: Mapping[str, fx.Node]) -> Any:
        """Return what `encode` wrote as JSON knows it."""
        if isinstance(value, list):
            return [self.value(part, nodes) for part in value]
        if not isinstance(value, dict):
            return value
        require(len(value) == 1, "a value of no known kind")
        ((kind, plain),) = value.items()
        if kind == "node":
            return nodes[plain]
        if kind == "tensor":
            return _at(self.tensors, plain)
        if kind in PLAIN:
            return PLAIN[kind](plain)
        require(kind in CONTAINERS, f"a value of no known kind: {kind[:100]!r}")
        return CONTAINERS[kind](self.value(plain, nodes))


def _target(n: _NodeEntry, args: tuple[Any, ...], kwargs: dict[str, Any], holder: nn.Module) -> Any:
    """Return the target of a node, once it is known to be allowed."""
    if n.op == "call_function":
        return _function_at(n, args, kwargs)
    allowed: dict[str, Callable[[], bool]] = {
        "call_method": lambda: is_method(n.target) and len(args) > 0,
        "call_module": lambda: isinstance(part_at(holder, n.target), nn.Module),
        "get_attr": lambda: isinstance(part_at(holder, n.target), Tensor),
        "placeholder": lambda: _is_argument(n.target.removeprefix("*").removeprefix("*")),
        "output": lambda: n.target == "output" and len(args) == 1,
    }
    good = n.op in allowed and allowed[n.op]()
    require(good, f"a {n.op[:20]} of {n.target[:100]!r}, which is not allowed")
    return n.target


def _function_at(
    n: _NodeEntry, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any]:
    if n.fields is not None:
        return kind_of_tuple(n.target, n.fields)
    function = function_named(n.target)
    if function is getattr:
        good = len(args) in (2, 3) and not kwargs and is_attribute(args[1])
        require(good, f"a look at an attribute that is not allowed: {str(args[1:2])[:100]}")
    return function


def _at(table: list[T], place: Any) -> T:
    require(type(place) is int and 0 <= place < len(table), f"no entry {place!r}")
    found: T = table[place]
    return found


def _is_part_name(name: str) -> bool:
    """Tell whether a name may stand in generated code as an attribute or in quotes."""
    return (
        bool(name) and name.isprintable() and not name.startswith("__") and not set(name) & _MARKS
    )


def _is_argument(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


_MARKS = set(".\"'\\")
