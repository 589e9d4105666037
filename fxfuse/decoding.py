"""A network rebuilt from its description: the reading half of the saved form.

Nothing is unpickled, and nothing of the original model is needed. Every name is looked up among
what `naming` allows, and every text that ends up in the code that torch.fx generates is checked, so
that a file from a stranger can compute on tensors and nothing else.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn

from .encoding import GRAPH_MODULE, INTERNAL
from .errors import CheckpointError, FuseError
from .naming import class_of, is_attribute, is_method
from .plain import read
from .values import CONTAINERS, PLAIN, Wrong, function_named, kind_of_tuple, require, tensor_of

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
        "call_module": lambda: isinstance(_part(holder, n.target), nn.Module),
        "get_attr": lambda: isinstance(_part(holder, n.target), Tensor),
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


def _part(module: nn.Module, path: str) -> Any:
    """Return the module or tensor of a qualified name, looked up in nothing but their tables."""
    owner, _, leaf = path.rpartition(".")
    held: Any = module
    for name in owner.split(".") if owner else []:
        held = held._modules[name]
    tables = (held._modules, held._parameters, held._buffers)
    return next((table[leaf] for table in tables if leaf in table), None)


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
