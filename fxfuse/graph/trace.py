"""From a module to a `GraphModule` that computes the same in both modes and shares nothing with it.

Symbolic tracing writes the value of `self.training` into calls (`F.dropout(x, p, self.training)`),
and leaves out what only the other mode computes. A model is therefore traced in both modes, and
`_merge` makes one graph of the two. Where the two cannot be merged, the smallest module around the
difference becomes one node. If that is the whole model, the graph is the one of eval mode.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..errors import DataError, FuseError, ModelError, NotEquivalent, TraceError, line_of
from ._merge import merge
from .compare import require_same
from .hooks import copied, refuse_hooks
from .inputs import Inputs, take_arguments
from .modes import Mode, cut_to, eval_mode, evaluating_part, only_calls_parts
from .module import Graph
from .names import in_graph, rename_parts, with_given_names
from .products import as_written
from .recurrent import put_together
from .state import (
    EXTRA_STATE,
    add_part,
    device_of,
    floats_of,
    hide,
    not_finite,
    part_at,
    tensor_at,
    tensors_of,
    unreadable,
)
from .structures import tensors_in
from .symbolic import trace_symbolically
from .wrappers import unwrapped
from .writes import read_what_is_written

HALVES = (torch.float16, torch.bfloat16)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Leave autocast and inference mode, in which a caller may be: they hide operators."""
    cpu, cuda = (torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda"))
    with torch.inference_mode(False), cpu, cuda:
        yield


class Interpreter(fx.Interpreter):
    """Run a graph as its own code would: functions get lists that they may write to.

    Args:
        module: The graph.
        garbage_collect_values: Whether a value is freed once nothing reads it any more.
        look: Called behind each node with the node, its value, and all values that are held then.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        garbage_collect_values: bool = True,
        look: Callable[[fx.Node, Any, dict[fx.Node, Any]], None] | None = None,
    ) -> None:
        super().__init__(module, garbage_collect_values)
        self.look = look

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and show it with its value to who looks on."""
        value = super().run_node(n)
        if self.look is not None:
            self.look(n, value, self.env)
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a node's arguments as fresh lists and dictionaries instead of frozen ones."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _thawed(args), _thawed(kwargs)


def _thawed(value: Any) -> Any:
    if isinstance(value, dict) and not is_dataclass(value):  # an output may be both
        return {k: _thawed(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_thawed(v) for v in value]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_thawed, value))
    return tuple(map(_thawed, value)) if type(value) is tuple else value  # torch has tuples, too


def _record(root: nn.Module, inputs: Inputs, leaves: frozenset[str]) -> fx.Graph:
    if isinstance(root, fx.GraphModule) and _is_recorded(root, inputs):
        return copy.deepcopy(root.graph)
    from .recorded import record  # which imports half of a compiler

    return record(root, inputs, leaves)


def _is_recorded(module: fx.GraphModule, inputs: Inputs) -> bool:
    """Tell whether a graph has these inputs, and steps that are not to be looked into."""
    nodes = list(module.graph.nodes)
    parts = [module.get_submodule(str(n.target)) for n in nodes if n.op == "call_module"]
    given = [n.target for n in nodes if n.op == "placeholder"]
    return given == list(inputs.names) and not any(map(only_calls_parts, parts))


FrontEnd = Callable[[nn.Module, Inputs, frozenset[str]], fx.Graph]
DOORS: dict[str, FrontEnd] = {
    "traced symbolically": trace_symbolically,
    "recorded": _record,
    "traced symbolically, modules of torch whole": partial(trace_symbolically, whole=True),
}


# Of each model, the names in its state that its graph has not: of what its forward does not use,
# and further names of what it uses. And how it was called.
_idle_state: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
_called: WeakKeyDictionary[nn.Module, Inputs] = WeakKeyDictionary()


def trace(
    model: nn.Module, example: Any = None, name: str = "the model", doors: Sequence[str] = ()
) -> fx.GraphModule:
    """Return the graph of a model, which shares nothing with the model.

    Args:
        model: Any module; not modified. What compiles or copies a model is taken off it.
        example: One batch as the model takes it: a tensor, a tuple of its first arguments, or a
            mapping from names of arguments. Arguments that it lacks have their defaults. Without
            an example, only models can be traced that branch on no shape.
        name: Its name in errors.
        doors: The front-ends that may be tried, of `DOORS`; all of them if not given.

    Returns:
        A `GraphModule` with the model's module names and state, in the model's mode, and in single
        precision where the model is in half. Its inputs are the tensors of the example, in that
        order. A part that no front-end can look into, as one that branches on values, is one node
        that calls the part itself.
        Heads that the model runs in training only also run in eval mode. This costs their time, and
        they must be able to take the inputs. Compilers leave them out again, and so does
        `run_decompositions` after an export. Its `meta["door"]` names the front-end.

    Raises:
        TraceError: If no front-end finds a graph that computes what the model does.
        ModelError: If it is no module or its weights are not finite.
        DataError: If the model refuses the example.
    """
    module = copy.deepcopy(trace_sharing(model, example, name, doors))
    halves = {n for n, t in floats_of(module).items() if t.dtype in HALVES}
    module = copy_modes(model, in_single_precision(module))
    if halves and example is not None:
        _require_single_precision(model, module, example, name)
    return module


def _require_single_precision(
    model: nn.Module, module: fx.GraphModule, example: Any, name: str
) -> None:
    """Refuse a forward that converts values to half precision by itself, as its layers had it."""
    inputs = Inputs.of(unwrapped(model), example).on(device_of(module))
    try:
        run_once(module, tuple(map(at_least_single, inputs)), name)
    except DataError as error:
        raise ModelError(
            "a forward that converts values to half precision for layers that are in it",
            where=f"{name} ({type(unwrapped(model)).__name__})",
            expected="a network that also runs in single precision, in which all work is done",
            do="write x.to(layer.weight.dtype) for x.half() or x.bfloat16(), or remove the "
            "conversions and fuse the model in float32: model.float()",
        ) from error


def trace_sharing(
    model: nn.Module, example: Any = None, name: str = "the model", doors: Sequence[str] = ()
) -> fx.GraphModule:
    """Return the graph of a model with the model's own parameters in it.

    Use it where parameters are only read: copying them takes most of the time that `trace` needs
    for a large model. Buffers, to which a forward may write, are copied. Arguments and errors are
    those of `trace`.
    """
    model = unwrapped(model, name)
    _require_plain_state(model, name)
    _require_finite(model, name)
    refuse_hooks(model, name)
    inputs = Inputs.of(model, example)
    inputs = replace(inputs, tensors=inputs.on(device_of(model)))
    whole: frozenset[str] = frozenset()  # the parts that no front-end can look into
    while True:
        failures: dict[str, Exception] = {}
        for door in doors or DOORS:
            try:
                module = _captured(model, inputs, DOORS[door], whole)
                require_same(model, module, inputs)
            except Exception as error:
                failures[door] = error
                continue
            module.meta["door"] = door
            return module
        if inputs.tensors and not whole:
            run_once(_shell(model), inputs, name)
        culprit = _culprit(failures) if inputs.tensors else ""
        if not culprit or culprit in whole:
            raise _untraceable(model, name, failures)
        kind = type(model.get_submodule(culprit))  # all parts of a class are found at once
        whole |= {path for path, part in model.named_modules() if type(part) is kind and path}


def _culprit(failures: Mapping[str, Exception]) -> str:
    """Return the smallest part of a model in which a front-end failed; empty if it was in none.

    A recording knows it best, since it stops at the step that is at fault. Where it came to an end
    and is another function, the others tell where they stopped. What a front-end refuses by itself,
    as random numbers that would be constants, is no part to be kept.
    """
    doors = [d for d in ("recorded", *failures) if d in failures]
    door = next((d for d in doors if not isinstance(failures[d], NotEquivalent)), "")
    error = failures.get(door)
    return "" if isinstance(error, FuseError) else str(getattr(error, "module_path", ""))


def trace_alike(
    models: Sequence[nn.Module], example: Any, names: Sequence[str]
) -> list[fx.GraphModule]:
    """Return the graphs of models, all by one front-end, since each has its own way to write them.

    Args:
        models: The models; not modified.
        example: One batch as they take it.
        names: Their names in errors.

    Raises:
        TraceError: If one of them cannot be traced, or if no front-end takes all of them.
    """
    graphs: list[fx.GraphModule] = []
    doors = list(DOORS)
    while len(graphs) < len(models):
        k = len(graphs)
        graphs.append(trace(models[k], example, names[k], doors))
        door = graphs[k].meta["door"]
        doors = doors[doors.index(door) :]
        if door != graphs[0].meta["door"]:
            graphs = []  # those before are written in another way
    return graphs


def _captured(
    model: nn.Module, inputs: Inputs, front_end: FrontEnd, whole: frozenset[str]
) -> fx.GraphModule:
    """Return what a front-end finds; some parts become one node each."""
    shell = _shell(model)
    graph = _live_graph(shell, inputs, front_end, whole)
    read_what_is_written(graph)
    rename_parts(shell, graph)
    graph._tracer_cls = None  # unpickling makes the tracer of a GraphModule without arguments
    module = Graph(shell, graph, type(model).__name__)
    _hide_constants(model, module)
    state = {in_graph(n) for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    _idle_state[model] = frozenset(state - set(module.state_dict()))
    _called[model] = replace(inputs, tensors=())
    return copy_modes(model, module)


def _hide_constants(model: nn.Module, module: fx.GraphModule) -> None:
    """Keep out of the state what is no state of the model: fx makes buffers of all constants."""
    state = {in_graph(name) for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, _ in module.named_buffers(remove_duplicate=False):
        if name not in state:
            hide(module, name)


def copy_modes(model: Any, module: fx.GraphModule) -> fx.GraphModule:
    """Give every part of a graph the mode of the model's part of that name; return the graph.

    Where that has no state, as an Identity, and the graph's has, the mode of the model counts. It
    also gets the version that the part's class writes into state dictionaries, which loaders
    ask for.
    """
    model = unwrapped(model)
    parts = {in_graph(path): part for path, part in model.named_modules()}
    for path, part in module.named_modules():
        owner = path.rpartition(".")[0] if isinstance(part, Mode) else path
        named = parts.get(owner, model)
        inserted = _has_state(part) and not _has_state(named)
        part.training = (model if inserted else named).training
        if path in parts and part._version != parts[path]._version:
            part._version = parts[path]._version
    return module


def _has_state(part: nn.Module) -> bool:
    return bool(part._parameters or part._buffers)


def as_given(model: nn.Module, module: fx.GraphModule) -> fx.GraphModule:
    """Give a graph back in the modes, the precision and with all names of its model's state.

    It takes the arguments of its model then; recurrent layers are of one module again, and products
    are written as they were.
    """
    put_together(module)
    as_written(module)
    _add_idle_state(model, module)
    with_arguments(model, module)
    return with_given_names(copy_precision(model, copy_modes(model, module)))


def with_arguments(model: nn.Module, module: fx.GraphModule) -> fx.GraphModule:
    """Let a graph, in place, be called as its model was when it was traced; return the graph."""
    called = _called.get(unwrapped(model))
    return module if called is None else take_arguments(module, called)


def _add_idle_state(model: nn.Module, module: fx.GraphModule) -> None:
    """Add the state of a model that its forward does not use: its class asks for it when it loads.

    What the graph has under another name is the same tensor there, too.
    """
    bare = unwrapped(model)
    state = {in_graph(name): value for name, value in bare.state_dict(keep_vars=True).items()}
    idle = _idle_state.get(bare, frozenset())
    used = {name: value for name, value in state.items() if name not in idle}
    memory = {t.untyped_storage().data_ptr() for t in used.values() if isinstance(t, Tensor)}
    for name in [name for name in state if name in idle and not part_at(module, name)]:
        twin = next((n for n, value in used.items() if value is state[name]), None)
        if twin is not None and part_at(module, twin) is not None:
            add_part(module, name, tensor_at(module, twin))
        elif not state[name].numel() or state[name].untyped_storage().data_ptr() not in memory:
            add_part(module, name, copy.deepcopy(state[name]))


def copy_precision(model: nn.Module, module: fx.GraphModule) -> fx.GraphModule:
    """Give the tensors of a graph the half precision of a model's; return the graph.

    Half precision is for running networks. All that is computed of weights is computed in single
    precision at least. A tensor that the model does not have gets the precision of most others.
    """
    tensors = floats_of(unwrapped(model))
    given = {in_graph(name): tensor.dtype for name, tensor in tensors.items()}
    usual = Counter(given.values()).most_common(1)
    for name, tensor in floats_of(module).items():
        dtype = given.get(name, usual[0][0] if usual else tensor.dtype)
        tensor.data = tensor.data.to(dtype) if dtype in HALVES else tensor.data
    return module


def in_single_precision(module: fx.GraphModule) -> fx.GraphModule:
    """Turn half-precision tensors of a graph into float32, in place; return the graph."""
    for tensor in floats_of(module).values():
        tensor.data = at_least_single(tensor.data)
    return module


def at_least_single(tensor: Tensor) -> Tensor:
    """Return a tensor of half precision in float32, any other as it is."""
    return tensor.float() if tensor.dtype in HALVES else tensor


def _require_plain_state(model: nn.Module, name: str) -> None:
    """Refuse state that cannot be read, moved and mixed as numbers of a tensor each."""
    for path, part in model.named_modules():
        if parametrize.is_parametrized(part):
            raise ModelError(
                "a parametrized weight, which is computed from other tensors at each use",
                where=f"'{path}' of {name}",
                expected="weights that are parameters themselves",
                do="torch.nn.utils.parametrize.remove_parametrizations(module, "
                f"{next(iter(part.parametrizations))!r})",
            )
    for path, tensor in tensors_of(model).items():
        problem = unreadable(tensor) or _of_inference(tensor)
        if problem is not None:
            what, do = problem
            raise ModelError(
                what, where=f"'{path}' of {name}", expected="an ordinary dense tensor", do=do
            )
    for path, value in model.state_dict(keep_vars=True).items():
        if path.endswith(EXTRA_STATE):
            continue  # what a module's own code adds to its state
        if not isinstance(value, Tensor) or value.is_quantized:
            raise ModelError(
                f"state that is not an ordinary tensor, but a {type(value).__name__}",
                where=f"'{path}' of {name}",
                expected="weights that can be read and averaged, not quantized ones",
                do="fuse the networks before they are quantized, and quantize the result",
            )


def _of_inference(tensor: Tensor) -> tuple[str, str] | None:
    if not tensor.is_inference():
        return None
    do = "build the model outside of torch.inference_mode() and load its weights there"
    return "a tensor that was made in inference mode", do


def _require_finite(model: nn.Module, name: str) -> None:
    for path, count in not_finite(model).items():
        raise ModelError(
            f"{count} values that are NaN or infinite",
            where=f"'{path}' of {name}",
            expected="finite weights and statistics",
            do="load a checkpoint that finished training",
        )


def _shell(model: nn.Module) -> nn.Module:
    """Copy a model without its parameters: tracing must neither touch it nor double its memory."""
    try:
        return copied(model)
    except Exception as error:
        raise TraceError(
            f"the model cannot be copied: {error}",
            where=type(model).__name__,
            expected="a module that copy.deepcopy accepts",
            do="remove what cannot be copied (open files, locks, generators) from its attributes",
        ) from error


def _live_graph(
    shell: nn.Module, inputs: Inputs, front_end: FrontEnd, whole: frozenset[str]
) -> fx.Graph:
    """Trace in both modes until one graph serves both; modules that differ become one node each."""
    leaves = whole
    while True:
        try:
            evaluating = front_end(shell.eval(), inputs, leaves)
        except Exception:
            if leaves == whole:
                raise
            return evaluating  # no graph can hold what is handed to one of the leaves
        try:
            training = front_end(shell.train(), inputs, leaves)  # it forgets what it computed
            both = merge(shell, evaluating, training)
        except Exception as error:
            both = {getattr(error, "module_path", "")}
        if isinstance(both, fx.Graph):
            return both
        if "" in both or both <= leaves:
            return evaluating  # the model itself differs
        leaves |= both | _alike(shell, both)


def _alike(shell: nn.Module, paths: set[str]) -> set[str]:
    """Return all parts without tensors that are of a class of some parts without tensors.

    A model that drops paths has many such parts, and finding each would cost two traces.
    """
    empty = {path: m for path, m in shell.named_modules() if not tensors_of(m)}
    kinds = {type(empty[path]) for path in paths & set(empty)}
    return {path for path, m in empty.items() if type(m) in kinds}


def _untraceable(model: nn.Module, name: str, failures: Mapping[str, Exception]) -> TraceError:
    """Return the error that says where the forward failed, and what each front-end said."""
    said = [f"  {door}: {_first_line(error)}" for door, error in failures.items()]
    where = name
    for door in ("recorded", *failures):  # a recording stops at the step that is at fault
        line = line_of(failures[door]) if door in failures else ""
        if line:
            path = getattr(failures[door], "module_path", "")
            inside = f"'{path}' of {name}" if path else name
            where = f"{line}, in the forward of {inside} ({type(model).__name__})"
            break
        if isinstance(error := failures.get(door), FuseError):
            where = f"{error.where} in {name}"
    expected = "a forward whose steps do not depend on the values of tensors"
    do = "move that branch out of forward, or into a module of its own that is called on both ways"
    if isinstance(error := failures.get("recorded"), NotEquivalent):
        expected, do = "a forward that is the same function of all inputs", error.do
    return TraceError(
        "\n".join(["a forward that cannot be written as a graph", *said]),
        where=where,
        expected=expected,
        do=f"{do}; torch.fx.wrap keeps a function whole",
    )


def _first_line(error: Exception) -> str:
    """Return what an error says first."""
    text = error.met if isinstance(error, FuseError) else f"{type(error).__name__}: {error}"
    return text.strip().split("\n")[0][:300]


def run_once(module: nn.Module, example: tuple[Tensor, ...] | Inputs, name: str) -> list[Tensor]:
    """Return the output tensors of one forward pass in eval mode, which are finite.

    Raises:
        DataError: If the model refuses the batch or computes values that are not finite.
    """
    tensors = outputs_of(module, example, name)
    if not all(torch.isfinite(t).all() for t in tensors if t.is_floating_point()):
        raise DataError(
            "outputs that are NaN or infinite",
            where=name,
            expected="finite outputs on the calibration data",
            do="check the data for NaN and the model for exploding activations",
        )
    return tensors


def outputs_of(module: nn.Module, example: tuple[Tensor, ...] | Inputs, name: str) -> list[Tensor]:
    """Return the output tensors of one forward pass in eval mode.

    If only what training computes refuses the batch, as a head does that needs larger images, this
    part is cut off the network in place.

    Raises:
        DataError: If the model refuses the batch.
    """
    try:
        with eval_mode(module), torch.no_grad():
            return tensors_in(_forward(module, example))
    except Exception as error:
        given = example.tensors if isinstance(example, Inputs) else tensors_in(example)
        shapes = ", ".join(str(tuple(t.shape)) for t in given)
        raise DataError(
            f"the model refuses a batch of shape {shapes}: {error}",
            where=name,
            expected="data that every model takes",
            do="check the shape, type and order of axes of the data against the models",
        ) from error


def _forward(module: nn.Module, example: tuple[Tensor, ...] | Inputs) -> Any:
    if isinstance(example, Inputs):
        return example.call(module.forward, example.tensors)
    try:
        return module.forward(*example)  # calling a graph would print the error
    except Exception:
        if not isinstance(module, fx.GraphModule):
            raise
        part = evaluating_part(module)
        if part is None:
            raise
        out = part.eval().forward(*example)
        cut_to(module, part)
        return out
