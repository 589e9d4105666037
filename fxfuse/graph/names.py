"""Names that a model's parts may have, but those of a graph may not.

In a `GraphModule`, `graph`, `code` and `meta` mean its own things, and the code that torch.fx
generates cannot say `self.class`. Such parts get a suffix: `code` is `code__fx` in graphs. State
dictionaries keep the names of the model, so that they load into its class and back.
"""

from __future__ import annotations

import keyword
from typing import Any

from torch import fx, nn

from .module import Graph, unpickled

SUFFIX = "__fx"
# Attributes that a GraphModule has and a module has not.
_TAKEN = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))


def in_graph(path: str) -> str:
    """Return the name that a part of a model has in its graph.

    Example:
        >>> in_graph("code.weight"), in_graph("layers.class"), in_graph("layers.code")
        ('code__fx.weight', 'layers.class__fx', 'layers.code')
    """
    steps = path.split(".")
    clash = [keyword.iskeyword(s) or (not i and s in _TAKEN) for i, s in enumerate(steps)]
    return ".".join(s + SUFFIX if wrong else s for s, wrong in zip(steps, clash))


def in_model(path: str) -> str:
    """Return the name that a part of a graph has in the model; the opposite of `in_graph`."""
    return ".".join(map(_given, path.split(".")))


def _given(step: str) -> str:
    stem = step.removesuffix(SUFFIX)
    return stem if keyword.iskeyword(stem) or stem in _TAKEN else step


def rename_parts(module: nn.Module, graph: fx.Graph) -> None:
    """Rename, in place, what a graph of a module reads, where a GraphModule has no such names."""
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            path = str(node.target)
            node.target = in_graph(path)
            owner: Any = module
            for old, new in zip(path.split("."), node.target.split(".")):
                _rename(owner, old, new)
                owner = getattr(owner, new)


def _rename(owner: nn.Module, old: str, new: str) -> None:
    """Give an attribute another name, at the same place in the order of its table."""
    if old == new:
        return
    tables: tuple[dict[str, Any], ...] = (owner._modules, owner._parameters, owner._buffers)
    for table in (*tables, vars(owner)):
        if old in table:
            items = [(new if name == old else name, value) for name, value in table.items()]
            table.clear()
            table.update(items)
    hidden = owner._non_persistent_buffers_set
    if old in hidden:
        hidden.remove(old)
        hidden.add(new)


class GivenNames(Graph):
    """A graph whose state dictionary has the names of the model, also where its parts have not."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state by the names of the model; takes the arguments of a module's."""
        state = super().state_dict(*args, **kwargs)
        metadata = getattr(state, "_metadata", {})
        for table in (state, metadata):
            items = [(in_model(name), value) for name, value in table.items()]
            table.clear()
            table.update(items)
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own = {in_model(name): name for name in super().state_dict(keep_vars=True)}
        for given, name in own.items():
            if prefix + given in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + given)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, super().__reduce__()[1]


def _unpickled(body: dict[str, Any], imports: str) -> fx.GraphModule:
    return with_given_names(unpickled(body, imports))


def with_given_names(module: fx.GraphModule) -> fx.GraphModule:
    """Let the state dictionary of a graph have the names of its model; itself if it has them.

    Args:
        module: A graph that is used no more: the result takes over its parts.
    """
    names = [*dict(module.named_modules()), *module.state_dict()]
    if isinstance(module, GivenNames) or all(in_model(name) == name for name in names):
        return module
    given = GivenNames(nn.Module(), fx.Graph(), type(module).__name__)
    vars(given).update(vars(module))
    given.graph = module.graph
    return given
