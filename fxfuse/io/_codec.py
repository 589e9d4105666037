"""A network as plain JSON values and named tensors, written and read back.

A description has tables of `tensors` and of `modules`; each module comes after its parts, and the
last one is the network. What is held twice is written once, so that tied weights stay tied.

Reading unpickles nothing and needs nothing of the original model. Every name is looked up among
what `_allowlist` allows, and every text that ends up in the code that torch.fx generates is
checked, so that a file from a stranger can compute on tensors and do nothing else.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from .._schema import read, written
from ..errors import CheckpointError, FuseError, SaveError
from ..graph.module import Graph
from ..graph.names import with_given_names
from ..graph.state import part_at
from ._allowlist import class_of, is_attribute, is_method, name_of_class, name_of_function
from ._values import (
    KINDS,
    Wrong,
    called,
    class_of_tuples,
    contiguous,
    data_of,
    function_named,
    in_memory_order,
    kind_of,
    memory_order,
    require,
    tensor_of,
)

T = TypeVar("T")

GRAPH_MODULE = "torch.fx.GraphModule"
# What every module has. Of these, tensors, parts and the mode have fields of their own.
INTERNAL = frozenset(vars(nn.Module())) | {"_is_full_backward_hook"}
_HOOKS = sorted(name for name in INTERNAL if name.endswith("_hooks"))

# --- what a description holds ---------------------------------------------------------------------


@dataclass(frozen=True)
class _TensorEntry:
    """A tensor of the state, by its `key` there, or any other one, by its data.

    `complex` says that the last axis holds real and imaginary parts, `order` that the axes lie in
    memory in another order.
    """

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
    """A node of a graph; one that makes a named tuple has the `fields` of its class."""

    name: str
    op: str
    target: str
    fields: tuple[str, ...] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    origin: tuple[str, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class _ModuleEntry:
    """A module: its class, and by name the places of its parts and tensors in the tables.

    `hidden` are the buffers outside the state. Graphs have a `name`, that of their class, and
    `nodes`; other modules have the rest of what they hold in `settings`.
    """

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


# --- writing --------------------------------------------------------------------------------------


def encode(network: fx.GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description of a network, and its state by the names of its state dictionary.

    Raises:
        SaveError: At the first part that cannot be written down without code of its own.
    """
    writer = _Writer(network)
    writer.module(network, "")
    description = _Description(tuple(writer.tensors), tuple(writer.modules))
    return written(description, defaults=False), writer.state


@contextmanager
def _saving(where: str) -> Iterator[None]:
    """Say where something was met that cannot be written."""
    try:
        yield
    except Wrong as error:
        raise SaveError(
            str(error),
            where=where,
            expected="tensors, layers of torch.nn and torchvision.ops, and functions on tensors",
            do="let torch.fx trace through it, so that the graph holds what it computes; or write "
            "the weights alone with safetensors.torch.save_file(network.state_dict(), path)",
        ) from error


class _Writer:
    """Fills the tables of a description, and the state that it refers to."""

    def __init__(self, network: fx.GraphModule) -> None:
        self.state: dict[str, Tensor] = {}
        self.tensors: list[_TensorEntry] = []
        self.modules: list[_ModuleEntry] = []
        self._keys: dict[int, str] = {}  # of the state, by the identity of the tensor
        self._tensor_places: dict[int, int] = {}  # in the tables, by identity as well
        self._module_places: dict[int, int] = {}
        for key, tensor in network.state_dict(keep_vars=True).items():
            with _saving(key):
                require(isinstance(tensor, Tensor), "a part of the state that is not a tensor")
                self.state[key] = contiguous(tensor)
            self._keys.setdefault(id(tensor), key)

    def module(self, module: nn.Module, path: str) -> int:
        """Write a module after its parts; return its place in the table."""
        if id(module) not in self._module_places:
            parts = {
                name: None
                if part is None
                else self.module(part, f"{path}.{name}" if path else name)
                for name, part in module._modules.items()
            }
            where = path or "the network"
            with _saving(where):
                entry = self._module_entry(module, parts, where)
            self._module_places[id(module)] = len(self.modules)
            self.modules.append(entry)
        return self._module_places[id(module)]

    def _module_entry(
        self, module: nn.Module, parts: dict[str, int | None], where: str
    ) -> _ModuleEntry:
        hooked = any(vars(module).get(name) for name in _HOOKS)
        require(not hooked, "hooks, which are code")
        parameters = self._places(module._parameters, where)
        buffers = self._places(module._buffers, where)
        hidden = tuple(sorted(module._non_persistent_buffers_set))
        contents = module.training, parts, parameters, buffers, hidden
        if isinstance(module, fx.GraphModule):
            version = {k: v for k, v in vars(module).items() if k == "_version"}
            nodes = self._nodes(module, where)
            return _ModuleEntry(GRAPH_MODULE, *contents, version, type(module).__name__, nodes)
        kind = name_of_class(type(module))
        if kind is None:
            raise Wrong(f"a module of the class {type(module).__qualname__}")
        settings = {}
        for name, value in cast(Any, module).__reduce_ex__(2)[2].items():
            if name not in INTERNAL:
                with _saving(f"{where}.{name}"):
                    settings[name] = self.value(value)
        return _ModuleEntry(kind, *contents, settings)

    def _places(self, tensors: Mapping[str, Tensor | None], where: str) -> dict[str, int | None]:
        places: dict[str, int | None] = {}
        for name, tensor in tensors.items():
            with _saving(f"{where}.{name}"):
                places[name] = None if tensor is None else self.tensor(tensor)
        return places

    def tensor(self, tensor: Tensor) -> int:
        """Write a tensor; return its place in the table."""
        if id(tensor) not in self._tensor_places:
            entry = self._tensor_entry(tensor)
            self._tensor_places[id(tensor)] = len(self.tensors)
            self.tensors.append(entry)
        return self._tensor_places[id(tensor)]

    def _tensor_entry(self, tensor: Tensor) -> _TensorEntry:
        plain = type(tensor) in (Tensor, nn.Parameter)
        require(plain, f"a {type(tensor).__name__} instead of a plain tensor")
        key = self._keys.get(id(tensor))
        data, dtype, shape = data_of(contiguous(tensor)) if key is None else ("", "", ())
        reordered = tensor.numel() and not tensor.is_contiguous()
        order = tuple(memory_order(tensor)) if reordered else None
        parameter = isinstance(tensor, nn.Parameter)
        kept = parameter, tensor.requires_grad
        return _TensorEntry(*kept, key, data, dtype, shape, tensor.is_complex(), order)

    def _nodes(self, module: fx.GraphModule, where: str) -> tuple[_NodeEntry, ...]:
        plain = type(module.graph._codegen) is CodeGen
        require(plain, "a graph that packs its inputs or outputs in its own way")
        entries = []
        for node in module.graph.nodes:
            with _saving(f"node '{node.name}' of {where}"):
                entries.append(self._node_entry(node))
        return tuple(entries)

    def _node_entry(self, node: fx.Node) -> _NodeEntry:
        target, fields = _written_target(node)
        args = tuple(self.value(value) for value in node.args)
        kwargs = {name: self.value(value) for name, value in node.kwargs.items()}
        origin = None
        if "origin" in node.meta:
            made_by, sources = node.meta["origin"]
            origin = made_by, tuple(sources)
        return _NodeEntry(node.name, node.op, target, fields, args, kwargs, origin)

    def value(self, value: Any) -> Any:
        """Return a value as JSON knows it."""
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float) and math.isfinite(value):
            return float(value)
        if isinstance(value, list):
            return [self.value(part) for part in value]
        if isinstance(value, fx.Node):
            return {"node": value.name}
        if isinstance(value, Tensor):
            return {"tensor": self.tensor(value)}
        kind = kind_of(value)
        return {kind: KINDS[kind].write(value, self.value)}


def _written_target(node: fx.Node) -> tuple[str, tuple[str, ...] | None]:
    """Return the name of what a node calls, and the fields if it is a class of named tuples.

    Data classes, which only code of their own can make, become dictionaries of their fields.
    """
    if node.op != "call_function":
        allowed = node.op != "call_method" or is_method(str(node.target))
        require(allowed, f"a call of the method {node.target!r}")
        return str(node.target), None
    fields = getattr(node.target, "_fields", None)
    if isinstance(node.target, type) and issubclass(node.target, tuple) and fields:
        return node.target.__name__, tuple(fields)
    makes_fields = isinstance(node.target, type) and is_dataclass(node.target) and not node.args
    name = name_of_function(dict if makes_fields else node.target)
    if name is None:
        raise Wrong(f"a call of {called(node.target)}")
    if name == "builtins.getattr" and not is_attribute(node.args[1]):
        raise Wrong(f"a read of the attribute {node.args[1]!r}")
    return name, None


# --- reading --------------------------------------------------------------------------------------


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
        tables = read(_Description, description, "the description")
        reader = _Reader(state)
        reader.tensors = [reader.tensor(entry) for entry in tables.tensors]
        for entry in tables.modules:
            reader.modules.append(reader.module(entry))
        network = reader.modules[-1]
        if not isinstance(network, fx.GraphModule):
            raise Wrong(f"a {type(network).__name__} where the network should be")
        network = with_given_names(network)
        same = set(network.state_dict()) == set(state)
        require(same, "tensors that are not those of the network")
        return network
    except FuseError as error:
        raise refused(f"a network that cannot be rebuilt: {error.met}", where, error) from error
    except Exception as error:  # torch refuses sizes, settings and arguments in many ways
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
    """Rebuilds what the tables of a description hold."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []

    def tensor(self, entry: _TensorEntry) -> Tensor:
        """Return a tensor as it was: real or complex, laid out in memory as before."""
        if entry.key is not None:
            tensor = self.state[entry.key]
        else:
            tensor = tensor_of(entry.data, entry.dtype, entry.shape)
        if entry.complex:
            tensor = torch.view_as_complex(tensor.contiguous())
        if entry.order is not None:
            tensor = in_memory_order(tensor, entry.order)
        if entry.parameter:
            return nn.Parameter(tensor, entry.gradient)
        return tensor.requires_grad_(entry.gradient)

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
        cast(Any, module).__setstate__(vars(module) | self._contents(entry) | settings)
        return module

    def _graph_module(self, entry: _ModuleEntry) -> fx.GraphModule:
        require(entry.name.isidentifier(), f"a name that no class can have: {entry.name!r}")
        holder, contents = nn.Module(), self._contents(entry)
        vars(holder).update(contents)
        module = Graph(holder, self._graph(entry, holder), entry.name)
        version = read(dict[str, int], entry.settings, "the settings")
        require(set(version) <= {"_version"}, "settings of a graph")
        vars(module).update(contents | version)
        return module

    def _contents(self, entry: _ModuleEntry) -> dict[str, Any]:
        """Return the tensors, parts and mode of a module as its instance dictionary has them."""
        parts = {n: None if i is None else _at(self.modules, i) for n, i in entry.parts.items()}
        parameters, buffers = self._tensors(entry.parameters), self._tensors(entry.buffers)
        others = [
            name
            for name, tensor in parameters.items()
            if not isinstance(tensor, (nn.Parameter, type(None)))
        ]
        require(not others, f"parameters that are plain tensors: {others}")
        names = [*parts, *parameters, *buffers]
        for name in names:
            require(_is_part_name(name), f"a name that is not allowed: {name[:100]!r}")
        require(len(set(names)) == len(names), "two parts of one name")
        hidden = set(entry.hidden)
        require(hidden <= set(buffers), "hidden buffers that do not exist")
        tensors = {"_parameters": parameters, "_buffers": buffers}
        return {
            **tensors,
            "_modules": parts,
            "training": entry.training,
            "_non_persistent_buffers_set": hidden,
        }

    def _tensors(self, places: Mapping[str, int | None]) -> dict[str, Tensor | None]:
        return {n: None if i is None else _at(self.tensors, i) for n, i in places.items()}

    def _graph(self, entry: _ModuleEntry, holder: nn.Module) -> fx.Graph:
        graph = fx.Graph()
        nodes: dict[str, fx.Node] = {}
        for n in entry.nodes:
            require(n.name.isidentifier() and n.name not in nodes, f"a node {n.name[:100]!r}")
            require(all(map(_is_argument, n.kwargs)), f"arguments of the node {n.name[:100]!r}")
            args = tuple(self.value(a, nodes) for a in n.args)
            kwargs = {k: self.value(a, nodes) for k, a in n.kwargs.items()}
            target = _read_target(n, args, kwargs, holder)
            nodes[n.name] = graph.create_node(n.op, target, args, kwargs, n.name)
            if n.origin is not None:
                nodes[n.name].meta["origin"] = n.origin
        ops = [n.op for n in entry.nodes]
        require(ops.count("output") == 1 and ops[-1] == "output", "a graph without one output")
        graph.lint()
        return graph

    def value(self, value: Any, nodes: Mapping[str, fx.Node]) -> Any:
        """Return the value that the writer wrote; `nodes` are those before it in the graph."""
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
        require(kind in KINDS, f"a value of no known kind: {kind[:100]!r}")
        return KINDS[kind].read(plain, lambda part: self.value(part, nodes))


def _read_target(
    n: _NodeEntry, args: tuple[Any, ...], kwargs: dict[str, Any], holder: nn.Module
) -> Any:
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
        return class_of_tuples(n.target, n.fields)
    function = function_named(n.target)
    if function is getattr:
        good = len(args) in (2, 3) and not kwargs and is_attribute(args[1])
        require(good, f"an attribute that may not be read: {str(args[1:2])[:100]}")
    return function


def _at(table: list[T], place: Any) -> T:
    require(type(place) is int and 0 <= place < len(table), f"no entry {place!r}")
    entry: T = table[place]
    return entry


_MARKS = set(".\"'\\")


def _is_part_name(name: str) -> bool:
    """Tell whether a name may stand in generated code as an attribute or in quotes."""
    harmless = bool(name) and name.isprintable() and not set(name) & _MARKS
    return harmless and not name.startswith("__")


def _is_argument(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)
