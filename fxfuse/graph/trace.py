"""From a module to a `GraphModule` that computes the same in both modes and shares nothing with it.

Symbolic tracing writes the value of `self.training` into calls (`F.dropout(x, p, self.training)`),
and leaves out what only the other mode computes. A model is therefore traced in both modes, and
`_merge` makes one graph of the two. Where the two cannot be merged, the smallest module around the
difference becomes one node. If that is the whole model, the graph is the one of eval mode.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from ..errors import DataError, ModelError, TraceError
from ._merge import merge
from ._writes import assigned, make_constants_anew, state_kept, write_assigned
from .modes import Mode, cut_to, evaluating_part
from .names import in_graph, rename_parts, with_given_names
from .state import (
    EXTRA_STATE,
    add_part,
    floats_of,
    hide,
    not_finite,
    part_at,
    tensor_at,
    tensors_of,
)

Example = Tensor | tuple[Tensor, ...]
HALVES = (torch.float16, torch.bfloat16)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Leave autocast and inference mode, in which a caller may be: they hide operators."""
    cpu, cuda = (torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda"))
    with torch.inference_mode(False), cpu, cuda:
        yield


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a network into eval mode for a while; then it is as it was.

    Each part gets its own mode back, and each buffer that a forward wrote to its values.
    """
    modes = {part: part.training for part in module.modules()}
    buffers = [
        (b, b._version, b.detach().clone()) for b in module.buffers() if not b.is_inference()
    ]
    module.eval()
    try:
        yield
    finally:
        for buffer, version, values in buffers:
            if buffer._version != version:
                buffer.data.copy_(values)
        for part, training in modes.items():
            part.training = training


class Interpreter(fx.Interpreter):
    """Run a graph as its own code would: functions get lists that they may write to."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a node's arguments as fresh lists and dictionaries instead of frozen ones."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _thawed(args), _thawed(kwargs)


def _thawed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _thawed(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_thawed(v) for v in value]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_thawed, value))
    return tuple(map(_thawed, value)) if type(value) is tuple else value  # torch has tuples, too


class _Tracer(fx.Tracer):
    def __init__(self, leaves: frozenset[str], proxy_buffers: bool) -> None:
        super().__init__()
        self.leaves, self.proxy_buffer_attributes = leaves, proxy_buffers
        self.failed_in = ""
        self._constants: list[tuple[Tensor, int]] = []

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not a.is_inference():
            self._constants.append((a, a._version))
        return super().create_arg(a)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._drawn = _random_states()
        graph = super().trace(root, concrete_args)
        self._require_constants(root)
        return graph

    def _require_constants(self, module: nn.Module) -> None:
        """Refuse what would be a constant of the graph, but is none in the module."""
        if any(tensor._version != version for tensor, version in self._constants):
            raise TraceError(
                "a tensor that forward makes, uses, and writes to again",
                where=type(module).__name__,
                expected="tensors that are complete before they meet computed values",
                do="join parts with torch.cat or torch.where instead, or wrap the function that "
                "makes it with torch.fx.wrap",
            )
        if self._drawn != _random_states():
            raise TraceError(
                "random numbers that forward draws beside its inputs",
                where=type(module).__name__,
                expected="random numbers that are drawn at each call, not once for the graph",
                do="draw them by torch.randn_like(x) or x.new_empty(...).normal_(), or wrap the "
                "function that draws them with torch.fx.wrap",
            )

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, Mode) or module_qualified_name in self.leaves:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            out = super().call_module(m, forward, args, kwargs)
            self._require_constants(m)
            return out
        except Exception:
            self.failed_in = self.failed_in or self.path_of_module(m)
            raise


def _random_states() -> tuple[Any, ...]:
    """Return the states of the generators that a forward may draw from."""
    return random.getstate(), torch.get_rng_state().numpy().tobytes()


def trace(model: nn.Module, name: str = "the model") -> fx.GraphModule:
    """Return the graph of a model, which shares nothing with the model.

    Args:
        model: Any module that `torch.fx` can trace; not modified.
        name: Its name in errors.

    Returns:
        A `GraphModule` with the model's module names and state, in the model's mode, and in single
        precision where the model is in half. Heads that the
        model runs in training only also run in eval mode. This costs their time, and they must be
        able to take the inputs. Compilers leave them out again, and so does `run_decompositions`
        after an export.

    Raises:
        TraceError: If the model cannot be traced.
        ModelError: If it is no module or its weights are not finite.
    """
    module = copy.deepcopy(trace_sharing(model, name))
    return copy_modes(model, in_single_precision(module))


def trace_sharing(model: nn.Module, name: str = "the model") -> fx.GraphModule:
    """Return the graph of a model with the model's own parameters in it.

    Use it where parameters are only read: copying them takes most of the time that `trace` needs
    for a large model. Buffers, to which a forward may write, are copied.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a {type(model).__name__} instead of a network",
            where=name,
            expected="a torch.nn.Module",
            do="build the model first and load its weights into it",
        )
    _require_plain_state(model, name)
    _require_finite(model, name)
    _refuse_hooks(model, name)
    shell = _shell(model)
    graph = _live_graph(shell, name)
    rename_parts(shell, graph)
    graph._tracer_cls = None  # unpickling makes the tracer of a GraphModule without arguments
    module = fx.GraphModule(shell, graph, type(model).__name__)
    _hide_constants(model, module)
    return copy_modes(model, module)


def _hide_constants(model: nn.Module, module: fx.GraphModule) -> None:
    """Keep out of the state what is no state of the model: fx makes buffers of all constants."""
    state = {in_graph(name) for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, _ in module.named_buffers(remove_duplicate=False):
        if name not in state:
            hide(module, name)


def copy_modes(model: nn.Module, module: fx.GraphModule) -> fx.GraphModule:
    """Give every part of a graph the mode of the model's part of that name; return the graph.

    It also gets the version that the part's class writes into state dictionaries, which loaders
    ask for.
    """
    parts = {in_graph(path): part for path, part in model.named_modules()}
    for path, part in module.named_modules():
        owner = path.rpartition(".")[0] if isinstance(part, Mode) else path
        part.training = parts.get(owner, model).training
        if path in parts and part._version != parts[path]._version:
            part._version = parts[path]._version
    return module


def as_given(model: nn.Module, module: fx.GraphModule) -> fx.GraphModule:
    """Give a graph back in the modes, the precision and with all names of its model's state."""
    _add_idle_state(model, module)
    return with_given_names(copy_precision(model, copy_modes(model, module)))


def _add_idle_state(model: nn.Module, module: fx.GraphModule) -> None:
    """Add the state of a model that its forward does not use: its class asks for it when it loads.

    What the graph has under another name is the same tensor there, too.
    """
    state = {
        in_graph(name): value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }
    if not state.keys() - module.state_dict().keys():
        return
    graph = trace_sharing(model)  # what is gone for another reason was removed
    used = graph.state_dict().keys()
    memory = {state[name].untyped_storage().data_ptr() for name in used & state.keys()}
    for name in [name for name in state if name not in used and not part_at(module, name)]:
        twin = next((n for n in used if state.get(n) is state[name]), None)
        if twin is not None and part_at(module, twin) is not None:
            add_part(module, name, tensor_at(module, twin))
        elif not state[name].numel() or state[name].untyped_storage().data_ptr() not in memory:
            add_part(module, name, copy.deepcopy(state[name]))


def copy_precision(model: nn.Module, module: fx.GraphModule) -> fx.GraphModule:
    """Give the tensors of a graph the half precision of a model's; return the graph.

    Half precision is for running networks. All that is computed of weights is computed in single
    precision at least. A tensor that the model does not have gets the precision of most others.
    """
    given = {in_graph(name): tensor.dtype for name, tensor in floats_of(model).items()}
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


def _refuse_hooks(model: nn.Module, name: str) -> None:
    """Refuse forward hooks: they may change the function, and no graph shows them."""
    for path, part in model.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            raise TraceError(
                "a module with forward hooks",
                where=f"'{path}' of {name}",
                expected="modules that compute nothing outside their forward",
                do="remove the hooks (weight_norm: torch.nn.utils.remove_weight_norm)",
            )


def as_example(example: Any, device: torch.device | None = None) -> tuple[Tensor, ...]:
    """Return the input tensors of one call as a tuple, on a device.

    Raises:
        DataError: If `example` is not a tensor or a tuple of tensors.
    """
    parts = (example,) if isinstance(example, Tensor) else example
    if not isinstance(parts, (tuple, list)) or not all(isinstance(p, Tensor) for p in parts):
        raise DataError(
            f"an example of type {type(example).__name__}",
            where="the argument `example`",
            expected="a tensor or a tuple of tensors, one for each input of the model",
            do="pass a batch as the model takes it",
        )
    return tuple(p.to(device) for p in parts)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a nested value, those in data classes included."""
    tensors: list[Tensor] = []
    for part in tree_leaves(value):
        if is_dataclass(part) and not isinstance(part, type):
            tensors += tensors_in([getattr(part, field.name) for field in fields(part)])
        elif isinstance(part, Tensor):
            tensors.append(part)
    return tensors


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model; the CPU if it has no tensors."""
    first = next(iter(tensors_of(model).values()), None)
    return torch.device("cpu") if first is None else first.device


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
        problem = _unreadable(tensor)
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


def _unreadable(tensor: Tensor) -> tuple[str, str] | None:
    """Return what keeps a tensor from being worked on, and what to do; None if nothing does."""
    if is_lazy(tensor):
        return "a lazy tensor, whose shape is not known", "run one batch through the model first"
    if tensor.is_meta:
        return "a tensor without data, on the meta device", "load its weights onto a real device"
    if tensor.layout != torch.strided:
        return f"a {tensor.layout} tensor", "replace it by tensor.to_dense()"
    if tensor.is_inference():
        do = "build the model outside of torch.inference_mode() and load its weights there"
        return "a tensor that was made in inference mode", do
    return None


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
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"the model cannot be copied: {error}",
            where=type(model).__name__,
            expected="a module that copy.deepcopy accepts",
            do="remove what cannot be copied (open files, locks, generators) from its attributes",
        ) from error


def _live_graph(shell: nn.Module, name: str) -> fx.Graph:
    """Trace in both modes until one graph serves both; modules that differ become one node each."""
    leaves: frozenset[str] = frozenset()
    while True:
        evaluating, error = _trace_in(shell, False, leaves)
        if isinstance(evaluating, str):
            if isinstance(error, TraceError):
                raise error
            raise _untraceable(shell, name, error) from error
        training, _ = _trace_in(shell, True, leaves)
        both = {training} if isinstance(training, str) else merge(shell, evaluating, training)
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


def _trace_in(
    shell: nn.Module, training: bool, leaves: frozenset[str]
) -> tuple[fx.Graph | str, Exception | None]:
    """Return the graph of one mode; or the module that failed, and why.

    Buffers are nodes of the graph, unless the forward looks at their values.
    """
    for proxy_buffers in (True, False):
        shell.train(training)  # a network that keeps what it computed forgets it here
        tracer = _Tracer(leaves, proxy_buffers)
        known = _names(shell)
        try:
            with state_kept(shell):
                graph, values = tracer.trace(shell), assigned(shell)
            write_assigned(shell, graph, values)
            make_constants_anew(graph, known)
            return _without_unused_reads(graph), None
        except Exception as error:
            failure = tracer.failed_in, error
    return failure


def _names(shell: nn.Module) -> set[str]:
    """Return the names of the tensors of a module, those that are plain attributes included."""
    names = {*tensors_of(shell)} | {n for n, _ in shell.named_buffers(remove_duplicate=False)}
    names |= {n for n, _ in shell.named_parameters(remove_duplicate=False)}
    for path, part in shell.named_modules():
        attributes = [n for n, value in vars(part).items() if isinstance(value, Tensor)]
        names |= {f"{path}.{n}" if path else n for n in attributes}
    return names


def _without_unused_reads(graph: fx.Graph) -> fx.Graph:
    """Erase attributes that nothing reads: modes that are alike may differ in them."""
    for node in reversed(graph.nodes):
        if node.target is getattr and not node.users:
            graph.erase_node(node)
    return graph


def _untraceable(shell: nn.Module, name: str, error: Exception | None) -> TraceError:
    return TraceError(
        f"torch.fx cannot trace it: {error}",
        where=f"{name} ({type(shell).__name__})",
        expected="a forward without control flow that depends on tensor values or shapes",
        do="move the branch out of forward, or wrap its function with torch.fx.wrap",
    )


def run_once(module: nn.Module, example: tuple[Tensor, ...], name: str) -> list[Tensor]:
    """Return the output tensors of one forward pass in eval mode.

    If only what training computes refuses the batch, as a head does that needs larger images, this
    part is cut off the network in place.

    Raises:
        DataError: If the model refuses the batch or computes values that are not finite.
    """
    try:
        with eval_mode(module), torch.no_grad():
            out = _forward(module, example)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in example)
        raise DataError(
            f"the model refuses a batch of shape {shapes}: {error}",
            where=name,
            expected="data that every model takes",
            do="check the shape, type and order of axes of the data against the models",
        ) from error
    tensors = tensors_in(out)
    if not all(torch.isfinite(t).all() for t in tensors if t.is_floating_point()):
        raise DataError(
            "outputs that are NaN or infinite",
            where=name,
            expected="finite outputs on the calibration data",
            do="check the data for NaN and the model for exploding activations",
        )
    return tensors


def _forward(module: nn.Module, example: tuple[Tensor, ...]) -> Any:
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
