"""A front-end that runs a model and records what it calls, for forwards that branch on shapes.

The model runs as it is, in Python, as `torch.export` runs it: on tensors without data whose sizes
are symbols. What is recorded are calls of the modules of `torch.nn`, of the functions of torch and
of the methods of tensors, as symbolic tracing finds them. So names, states and modes live on, and
a graph looks the same whichever front-end found it. A size is read from a tensor at hand, not from
the inputs. Sizes that the forward branches on become numbers.

Whole numbers that are read from tensors, as the number of graphs in a batch, have stand-ins. The
model runs with several, and must do the same with each.
"""

from __future__ import annotations

import builtins
import logging
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .hooks import copied
from .inputs import Inputs
from .modes import is_leaf
from .sizes import integers_in, place_of, run_apart, symbol_of
from .structures import tensors_in
from .writes import read_behind, require_nothing_drawn, write_assigned, write_item

METHODS = {getattr(Tensor, n): n for n in reversed(dir(Tensor)) if callable(getattr(Tensor, n))}
SWAPPED = {"__rdiv__": operator.truediv}  # whose operator has another name
LITERALS: tuple[type, ...] = (str, int, float, complex, bool, type(None), type(...))
LITERALS += (torch.dtype, torch.device, torch.layout, torch.memory_format)


READS = {Tensor.__int__, Tensor.__index__, Tensor.item}
STAND_INS = (1, 18, 40009)  # the last one is told from numbers that mean something else
APART, NEAR = 10007, 64  # of the stand-ins of two numbers; of a number from the stand-in it is from


def record(root: nn.Module, inputs: Inputs, leaves: frozenset[str]) -> fx.Graph:
    """Return the graph of a model in the mode that it is in.

    Args:
        root: The model; it gets the constants of the forward as attributes.
        inputs: The arguments of one call.
        leaves: Modules that become one node each, besides those of `torch.nn`.

    Raises:
        Exception: Whatever the forward raises, with the module in its attribute `module_path`.
    """
    finish, steps = _run(root, inputs, leaves, STAND_INS[0])
    for stand_in in STAND_INS[1:] if steps else ():
        finish, others = _run(root, inputs, leaves, stand_in)
        if others[1:] != steps[1:]:
            error = TypeError("steps that depend on a number which is read from a tensor")
            error.module_path = steps[0]  # type: ignore[attr-defined]
            raise error
    return finish()


def _run(
    root: nn.Module, inputs: Inputs, leaves: frozenset[str], stand_in: int
) -> tuple[Callable[[], fx.Graph], list[Any]]:
    """Run a model once on tensors without data.

    Args:
        root: The model.
        inputs: The arguments of one call.
        leaves: Modules that become one node each, besides those of `torch.nn`.
        stand_in: What the first number that is read from a tensor is taken to be.

    Returns:
        What completes the graph, gives the model its constants and returns the graph; and, if any
        number was read, the module that read the first one and all steps.
    """
    model = copied(root)
    recorder = _Recorder(model, leaves, stand_in)
    fake = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    values = [recorder.placeholder(fake, n, t) for n, t in zip(inputs.names, inputs.tensors)]
    seen: tuple[Any, ...] = _lengths_as_sizes(), _calls_seen_by(recorder)
    unlinked = torch.no_grad()  # gradients would cost time and change no step
    with _as_for_export(), enable_python_dispatcher(), fake, recorder, seen[0], seen[1], unlinked:
        out = inputs.call(model, values)
    require_nothing_drawn(recorder.drawn, random.getstate(), root)

    def finish() -> fx.Graph:
        recorder.graph.output(recorder.described(out))
        write_assigned(root, recorder.graph, recorder.assigned(root, model))
        for name, value in recorder.constants.items():  # a layer in a list is no part of the model
            setattr(root, name, value.detach() if isinstance(value, nn.Parameter) else value)
        return recorder.graph

    if not recorder.numbers:
        return finish, []
    made = [n for n in recorder.graph.nodes if n not in recorder.computed]
    around = next(iter(recorder.numbers.values())).meta["nn_module_stack"]
    reader = [path for path, _ in around.values()][-1:] or [""]
    return finish, [*reader, *((n.op, n.target) for n in made)]


@contextmanager
def _as_for_export() -> Iterator[None]:
    """Let models know that their values must not be looked at, and keep fused kernels out.

    Kernels that cannot run without data are no errors here: nothing is logged of them.
    """
    compiler: Any = torch.compiler
    log = logging.getLogger("torch._subclasses.fake_tensor")
    silent, log.disabled = log.disabled, True
    before = getattr(compiler, "_is_exporting_flag", None)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    if before is not None:
        compiler._is_exporting_flag = True
    try:
        yield
    finally:
        log.disabled = silent
        torch.backends.mha.set_fastpath_enabled(fastpath)
        if before is not None:
            compiler._is_exporting_flag = before


@contextmanager
def _calls_seen_by(recorder: _Recorder) -> Iterator[None]:
    """Let a recorder run the calls of modules, for a while."""
    call = nn.Module.__call__

    def seen(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call_module(call, module, args, kwargs)

    nn.Module.__call__ = seen  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]


@contextmanager
def _lengths_as_sizes() -> Iterator[None]:
    """Let the length of a stand-in be a symbol: of what `__len__` returns Python makes a number."""
    count = builtins.len

    def length(value: Any, /) -> Any:
        return value.shape[0] if isinstance(value, FakeTensor) and value.dim() else count(value)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = count


_ON_VALUES = DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode


class _Recorder(TorchFunctionMode):
    """Sees each call of torch, and writes it into a graph."""

    def __init__(self, root: nn.Module, leaves: frozenset[str], stand_in: int) -> None:
        super().__init__()
        self.stand_in = stand_in
        self.numbers: dict[int, fx.Node] = {}  # those that were read, by their stand-ins
        self.computed: set[fx.Node] = set()  # nodes that compute numbers from them
        self.graph = fx.Graph()
        self.root, self.leaves = root, leaves
        self.constants: dict[str, Tensor] = {}
        self.paths = {m: path for path, m in reversed([*root.named_modules()])}
        self.stack: dict[str, tuple[str, type]] = {}
        self.calls: dict[str, int] = {}
        self.inside_leaf = False
        self.results: dict[Any, Tensor] = {}  # what leaves of a form make of values of a form
        self.drawn = random.getstate()  # what torch draws is a call like others
        self.nodes: dict[int, fx.Node] = {}
        self.parts: dict[int, tuple[fx.Node, Callable[..., Any], Any]] = {}  # not yet read
        self.values: list[tuple[fx.Node, Tensor]] = []  # in order; keeps them alive
        self.attributes = _tensors_by_id(root)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch, and record it if it makes or changes tensors."""
        kwargs = kwargs or {}
        if func is Tensor.__iter__ and not self.inside_leaf:
            with self:
                return iter(args[0].unbind(0))
        if self.inside_leaf:
            return func(*args, **kwargs)
        if func in READS and isinstance(args[0], FakeTensor) and _is_whole_number(args[0]):
            return self._number_read(args[0])
        first = args[0] if args and isinstance(args[0], Tensor) else None
        version = None if first is None else first._version
        try:
            out = func(*args, **kwargs)
        except _ON_VALUES:
            raise
        except Exception as error:  # some kernels look at numbers, or are not there for no data
            out = run_apart(func, args, kwargs, error)
        if func is Tensor.__setitem__:
            self._note(args[0], self._called(write_item, args, kwargs))
            self._read_behind(args[0])
        elif tensors_in(out):
            self._note(out, self._called(func, args, kwargs))
            if first is not None and out is first and first._version != version:
                self._read_behind(first)
        return out

    # --- what is called -------------------------------------------------------------------------

    def placeholder(self, fake: FakeTensorMode, name: str, tensor: Tensor) -> Tensor:
        """Add an input; return its stand-in, whose sizes are symbols but for those of size 1."""
        kinds = [DimDynamic.DYNAMIC if n > 1 else DimDynamic.STATIC for n in tensor.shape]
        value = fake.from_tensor(
            tensor.clone(),  # one tensor may be given twice
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds),
            source=ConstantSource(name),
        )
        self._note(value, self.graph.placeholder(name))
        return value

    def call_module(
        self, call: Callable[..., Any], module: nn.Module, args: Sequence[Any], kwargs: Any
    ) -> Any:
        """Run a module: a leaf becomes one node; others are looked into."""
        path = self.paths.get(module)
        if path is None or self.inside_leaf or module is self.root:
            return call(module, *args, **kwargs)
        outer, self.stack = self.stack, dict(self.stack)
        count = self.calls[path] = self.calls.get(path, -1) + 1
        self.stack[f"{path}@{count}" if count else path] = path, type(module)
        try:
            if not is_leaf(module) and path not in self.leaves:
                out = call(module, *args, **kwargs)
                require_nothing_drawn(self.drawn, random.getstate(), module)
                return out
            arguments = self._arguments((tuple(args), kwargs))
            self.inside_leaf = True
            out = self._run_leaf(call, module, args, kwargs)
            if tensors_in(out):  # else a flag that follows the mode, as it is here
                self._note(out, self._create("call_module", path, *arguments))
            return out
        except Exception as error:
            if not hasattr(error, "module_path"):
                error.module_path = path  # type: ignore[attr-defined]
            raise
        finally:
            self.stack, self.inside_leaf = outer, False

    def _run_leaf(
        self, call: Callable[..., Any], module: nn.Module, args: Sequence[Any], kwargs: Any
    ) -> Any:
        """Run a leaf; what another one of its form has made of such values is not run again."""
        form = _form_of(module, args, kwargs)
        if form is not None and form in self.results:
            like = self.results[form]
            sizes = like.shape, like.stride()
            return torch.empty_strided(*sizes, dtype=like.dtype, device=like.device)
        try:
            out = call(module, *args, **kwargs)
        except Exception as error:
            out = run_apart(call, (module, *args), kwargs, error)
        if form is not None and isinstance(out, Tensor):
            given = tensors_in((tuple(args), kwargs))
            if not any(_memory_of(out) == _memory_of(t) for t in given):
                self.results[form] = out
        return out

    def _called(self, func: Any, args: Sequence[Any], kwargs: Any) -> fx.Node:
        """Add the node of a function, a method or an attribute of a tensor."""
        args, kwargs = self._arguments((tuple(args), kwargs))
        name = METHODS.get(func, "") if getattr(func, "__hash__", None) else ""
        if getattr(func, "__name__", "") == "__get__":
            return self._create("call_function", getattr, (args[0], func.__self__.__name__), {})
        if not name:
            return self._create("call_function", func, args, kwargs)
        if name.startswith("__"):
            plain = getattr(operator, name, None)
            if plain is not None:
                return self._create("call_function", plain, args, kwargs)
            swapped = SWAPPED.get(name) or getattr(operator, f"__{name[3:]}", None)
            if name.startswith("__r") and swapped is not None:
                return self._create("call_function", swapped, args[::-1], kwargs)
        return self._create("call_method", name, args, kwargs)

    def _create(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["nn_module_stack"] = dict(self.stack)
        return node

    # --- what is passed -------------------------------------------------------------------------

    def _note(self, out: Any, node: fx.Node) -> None:
        """Remember which node a value is from, and which parts of a value are from it."""
        if isinstance(out, Tensor):
            self.nodes[id(out)] = node
            self.values.append((node, out))
            return
        for key, read, part in _parts(out):
            for tensor in tensors_in(part):
                self.values.append((node, tensor))
            if isinstance(part, Tensor):
                self.nodes.pop(id(part), None)
                self.parts[id(part)] = node, read, key
            elif tensors_in(part):
                with self.graph.inserting_after(node):
                    self._note(part, self.graph.call_function(read, (node, key)))

    def _read_behind(self, written: Tensor) -> None:
        """Let what shares memory that was written to be read behind the write from now on."""
        write, memory = self.nodes[id(written)], _memory_of(written)
        for _, other in self.values:
            mine = other is not written and id(other) in self.nodes
            if mine and other.layout is torch.strided and _memory_of(other) == memory:
                self.parts[id(other)] = write, read_behind, self.nodes.pop(id(other))

    def _arguments(self, value: Any) -> Any:
        """Write arguments in nodes."""
        near = tensors_in(value)
        return self._written(value, near)

    def _written(self, value: Any, near: list[Tensor]) -> Any:
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._size(value.node.expr, near)
        if type(value) is int and self.numbers and abs(value) > STAND_INS[-1] - NEAR:
            return self._computed(value)
        if isinstance(value, slice):
            return slice(*(self._written(v, near) for v in (value.start, value.stop, value.step)))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._written(v, near) for v in value))
        if isinstance(value, (tuple, list)):
            kind = list if isinstance(value, list) else tuple
            return kind(self._written(v, near) for v in value)
        if isinstance(value, Mapping):
            return {k: self._written(v, near) for k, v in value.items()}
        if isinstance(value, LITERALS):
            return float(value) if isinstance(value, float) else value  # numpy has floats, too
        raise TypeError(f"a call of torch with a {type(value).__name__}, which no graph can hold")

    def _node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor: a value, a part of one, or an attribute of the model."""
        key = id(tensor)
        if key not in self.nodes and key in self.parts:
            node, read, part = self.parts[key]
            with self.graph.inserting_after(node):
                self.nodes[key] = self._create("call_function", read, (node, part), {})
        elif key not in self.nodes:
            self.values.append((self._attribute(tensor), tensor))
            self.nodes[key] = self.values[-1][0]
        return self.nodes[key]

    def _attribute(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self.attributes:
            if isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(
                tensor
            ):
                raise TypeError("a tensor that no function of torch made, or one inside torch.vmap")
            number = 0
            while hasattr(self.root, name := f"_tensor_constant{number}"):
                number += 1
            setattr(self.root, name, tensor)
            self.constants[name] = tensor
            self.attributes[id(tensor)] = name
        return self._create("get_attr", self.attributes[id(tensor)], (), {})

    def assigned(self, root: nn.Module, model: nn.Module) -> dict[str, fx.Node]:
        """Return the values that the forward has assigned to buffers, by their names."""
        before = dict(root.named_buffers())
        after = dict(model.named_buffers())
        own = {name for name in before if id(after.get(name)) in self.nodes}
        kept = {self.attributes.get(id(t)) for t in after.values()}
        return {name: self.nodes[id(after[name])] for name in own - kept}

    # --- numbers that are read from tensors ------------------------------------------------------

    def _number_read(self, tensor: Tensor) -> int:
        """Note that the model reads a number from a tensor; return what stands in for it."""
        number = self.stand_in + APART * len(self.numbers)
        self.numbers[number] = self._create("call_function", int, (self._node_of(tensor),), {})
        return number

    def _computed(self, value: int) -> Any:
        """Write a number that may be computed from one that was read: a multiple, and some more."""
        for number, node in self.numbers.items():
            times = round(value / number)
            more = value - times * number
            if self.stand_in == STAND_INS[-1] and 0 < times <= 4 and abs(more) <= NEAR:
                for step, by in ((operator.mul, times), (operator.add, more)):
                    if by != (step is operator.mul):
                        node = self._create("call_function", step, (node, by), {})
                        self.computed.add(node)
                return node
        return value

    # --- sizes ----------------------------------------------------------------------------------

    def _size(self, expression: Any, near: list[Tensor]) -> Any:
        """Write a size that is computed from those of inputs: a number, or nodes that compute it.

        It is read from the tensors at hand, or computed from their sizes, if it can be. Where it is
        read from the latest tensor that has it, the step depends on another layer.

        Args:
            expression: The size in symbols.
            near: Tensors that the step reads, whose sizes are at hand.
        """
        if self.numbers and any(abs(n) > STAND_INS[-1] - NEAR for n in integers_in(expression)):
            raise TypeError("a size that depends on a number which is read from a tensor")
        if expression.is_number:
            return int(expression) if expression.is_integer else float(expression)
        symbols = sorted(expression.free_symbols, key=str)
        latest = [tensor for _, tensor in reversed(self.values)]
        ways = ([expression], near), (symbols, near), ([expression], latest)
        for sizes, tensors in (*ways, (symbols, [*near, *latest])):
            found = [place_of(size, tensors) for size in sizes]
            places = [place for place in found if place is not None]
            if len(places) == len(sizes):
                break
        else:
            raise TypeError(f"a size {expression} that is that of no tensor")
        nodes = [self._create("call_method", "size", (self._node_of(t), d), {}) for t, d in places]
        if sizes == [expression]:
            return nodes[0]
        proxies = dict(zip(sizes, map(fx.Proxy, nodes)))
        result = sympy_interp(PythonReferenceAnalysis, proxies, expression)
        for node in _between(result.node, set(p.node for p in proxies.values())):
            node.meta["nn_module_stack"] = dict(self.stack)
        return result.node

    # --- what is returned -----------------------------------------------------------------------

    def described(self, out: Any) -> Any:
        """Write the output in nodes; objects that are no structures of tensors are left out."""
        if isinstance(out, Tensor):
            return self._node_of(out)
        if is_dataclass(out) and not isinstance(out, type):
            parts = {f.name: self.described(getattr(out, f.name)) for f in fields(out)}
            parts = {k: v for k, v in parts.items() if v is not None}
            return self.graph.call_function(type(out), (), parts)
        if isinstance(out, Mapping):
            return {k: self.described(v) for k, v in out.items()}
        if isinstance(out, tuple) and hasattr(out, "_fields"):
            return self.graph.call_function(type(out), tuple(map(self.described, out)))
        if isinstance(out, (tuple, list)):
            return type(out)(map(self.described, out))
        if isinstance(out, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._size(out.node.expr, [])
        return out if isinstance(out, LITERALS) else None


def _form_of(module: nn.Module, args: Sequence[Any], kwargs: Any) -> Any:
    """Return what the form of a leaf's output depends on; None if it may be more than that.

    Leaves whose output may depend on other state are those with buffers, and those of which a
    single one was given a forward of its own.
    """
    if not is_leaf(module) or "forward" in vars(module) or next(module.buffers(), None) is not None:
        return None
    tensors = [t for t in tree_leaves((args, kwargs)) if not isinstance(t, LITERALS)]
    if not all(isinstance(t, Tensor) for t in tensors):
        return None
    parts = tree_map(lambda v: _form_of_tensor(v) if isinstance(v, Tensor) else v, (args, kwargs))
    shapes = tuple(tuple(p.shape) for p in module.parameters())
    dtypes = tuple(p.dtype for p in module.parameters())
    return type(module), repr(module), module.training, shapes, dtypes, repr(parts)


def _form_of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    sizes = [symbol_of(n) or n for n in (*tensor.shape, *tensor.stride())]
    return sizes, tensor.dtype, tensor.device


def _memory_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_whole_number(tensor: Tensor) -> bool:
    """Tell whether a tensor is one number, and that a whole one."""
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return whole and not tensor.dim()


def _tensors_by_id(root: nn.Module) -> dict[int, str]:
    """Return the first name of each tensor that is an attribute of a module."""
    names: dict[int, str] = {}
    plain = [(path, vars(m)) for path, m in root.named_modules()]
    tables = [(p, {k: v for k, v in t.items() if isinstance(v, Tensor)}) for p, t in plain]
    tensors = [*root.named_parameters(), *root.named_buffers()]
    tensors += [(f"{p}.{k}" if p else k, v) for p, t in tables for k, v in t.items()]
    for name, tensor in tensors:
        names.setdefault(id(tensor), name)
    return names


def _parts(value: Any) -> Iterator[tuple[Any, Callable[..., Any], Any]]:
    """Yield the parts of a value of several, each with its key and the function that reads it."""
    if isinstance(value, Mapping):
        yield from ((key, operator.getitem, part) for key, part in value.items())
    elif isinstance(value, (tuple, list)):
        yield from ((i, operator.getitem, part) for i, part in enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((f.name, getattr, getattr(value, f.name)) for f in fields(value))


def _between(node: fx.Node, ends: set[fx.Node]) -> Iterator[fx.Node]:
    """Yield a node and those it is computed from, up to some nodes."""
    if node not in ends:
        yield node
        for source in node.all_input_nodes:
            yield from _between(source, ends)
