"""The front-end of `torch.fx`: a forward is run on stand-ins that note what is done to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from ..errors import TraceError
from .hooks import has_hooks
from .inputs import Inputs
from .modes import is_leaf
from .state import tensors_of
from .writes import (
    assigned,
    make_constants_anew,
    random_states,
    require_nothing_drawn,
    state_kept,
    write_assigned,
)


class _Tracer(fx.Tracer):
    def __init__(
        self, inputs: Inputs, leaves: frozenset[str], proxy_buffers: bool, whole: bool
    ) -> None:
        super().__init__()
        self.inputs, self.leaves, self.whole = inputs, leaves, whole
        self.proxy_buffer_attributes = proxy_buffers
        self._constants: list[tuple[Tensor, int]] = []

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not a.is_inference():
            self._constants.append((a, a._version))
        return super().create_arg(a)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        drawn = random_states()
        graph = super().trace(root, concrete_args)
        self._require_constants(root, 0, drawn)
        return graph

    def _require_constants(self, module: nn.Module, start: int, drawn: tuple[Any, ...]) -> None:
        """Refuse what would be a constant of the graph, but is none in a module's forward.

        Args:
            module: The module.
            start: How many constants there were before.
            drawn: The states of the random generators before.
        """
        if any(tensor._version != version for tensor, version in self._constants[start:]):
            raise TraceError(
                "a tensor that forward makes, uses, and writes to again",
                where=type(module).__name__,
                expected="tensors that are complete before they meet computed values",
                do="join parts with torch.cat or torch.where instead, or wrap the function that "
                "makes it with torch.fx.wrap",
            )
        require_nothing_drawn(drawn, random_states(), module)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_leaf(m) or module_qualified_name in self.leaves:
            return True
        one_node = self.whole and not has_hooks(m)
        return one_node and super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make an input of each argument that is given; the others have their defaults."""
        values = [self.create_proxy("placeholder", name, (), {}) for name in self.inputs.names]
        return lambda root, *given: self.inputs.call(root.forward, given), [self.root, *values]

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            before = len(self._constants), random_states()
            out = super().call_module(m, forward, args, kwargs)
            self._require_constants(m, *before)
            return out
        except Exception as error:
            if not hasattr(error, "module_path"):
                error.module_path = self.path_of_module(m)  # type: ignore[attr-defined]
            raise


def trace_symbolically(
    root: nn.Module, inputs: Inputs, leaves: frozenset[str], whole: bool = False
) -> fx.Graph:
    """Return the graph of a model in the mode that it is in.

    Buffers are nodes of the graph, unless the forward looks at their values.

    Args:
        root: The model.
        inputs: The arguments of one call.
        leaves: Modules that become one node each, besides those of `torch.nn`.
        whole: Whether modules of `torch.nn` that only call their parts are one node, too.

    Raises:
        Exception: Whatever the forward raises, with the module in its attribute `module_path`.
    """
    try:
        return _traced(root, _Tracer(inputs, leaves, True, whole))
    except Exception:
        return _traced(root, _Tracer(inputs, leaves, False, whole))


def _traced(root: nn.Module, tracer: _Tracer) -> fx.Graph:
    known = _names(root)
    with state_kept(root):
        graph, values = tracer.trace(root), assigned(root)
    write_assigned(root, graph, values)
    make_constants_anew(root, graph, known)
    return _without_unused_reads(graph)


def _names(root: nn.Module) -> set[str]:
    """Return the names of the tensors of a module, those that are plain attributes included."""
    names = {*tensors_of(root)} | {n for n, _ in root.named_buffers(remove_duplicate=False)}
    names |= {n for n, _ in root.named_parameters(remove_duplicate=False)}
    for path, part in root.named_modules():
        attributes = [n for n, value in vars(part).items() if isinstance(value, Tensor)]
        names |= {f"{path}.{n}" if path else n for n in attributes}
    return names


def _without_unused_reads(graph: fx.Graph) -> fx.Graph:
    """Erase attributes that nothing reads: modes that are alike may differ in them."""
    for node in reversed(graph.nodes):
        if node.target is getattr and not node.users:
            graph.erase_node(node)
    return graph
