"""The inputs of a graph: the tensors in the arguments of one call of its model, one after another.

A graph that is analysed takes tensors only. Where an argument of the model is a structure, as a
dictionary of tensors, `take_arguments` lets the finished graph be called as the model is.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import DataError
from .calls import (
    MANY,
    Call,
    Reader,
    ToCall,
    arguments_of,
    needed_of,
    places_of,
    require_readable,
)
from .structures import Slot


@dataclass(frozen=True)
class Inputs:
    """The tensors in the arguments of one call.

    Attributes:
        names: Of the tensors, in the order of the example; of one that is an argument, its name.
        tensors: The tensors; none if there is no example.
        form: The call, with slots for them.
        placed: The names of the arguments that are passed by their place.
        taken: Those arguments by name that the model takes. Others of its kind may take more.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    form: Call
    placed: tuple[str, ...]
    taken: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, example: Any = None, to_call: ToCall | None = None) -> Inputs:
        """Tell which arguments of a model an example gives.

        Args:
            model: The model.
            example: Inputs; a call; or a batch: a tensor, a tuple of its first arguments, a
                mapping from names of arguments. None stands for the arguments without a default.
            to_call: From a batch to args, kwargs.

        Raises:
            DataError: If the example is of another form.
        """
        if isinstance(example, Inputs):
            return example
        if example is None:
            names = needed_of(model)
            return cls(names, (), Call(tuple(map(Slot, range(len(names))))), names, frozenset())
        call = example
        if not isinstance(example, Call):
            call = Reader([model], to_call).example(example)
        form, tensors, paths = call.parted()
        require_readable(tensors, "the argument `example`")
        placed = _places(model, len(form.args))
        names = _names_of(
            [(placed[p[0]] if isinstance(p[0], int) else p[0], *p[1:]) for p in paths]
        )
        known = set(arguments_of([model])) or set(form.kwargs)
        return cls(names, tuple(tensors), form, placed, frozenset(known & set(form.kwargs)))

    def call(self, function: Callable[..., Any], values: Sequence[Any]) -> Any:
        """Call a function with values in place of the tensors; other arguments have defaults."""
        args, kwargs = self._filled(values)
        return function(*args, **kwargs)

    def by_place(self, module: fx.GraphModule) -> tuple[Any, ...]:
        """Return the arguments of a graph in the order of its placeholders."""
        args, kwargs = self._filled(self.tensors)
        named = {**dict(zip(self.placed, args)), **kwargs}
        targets = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]
        return (*args, *(named[t] for t in targets[len(args) :] if t in named))

    def _filled(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = self.form.filled(values)
        return call.args, {n: v for n, v in call.kwargs.items() if n in self.taken}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the values on a device."""
        return tuple(t.to(device) for t in self.tensors)


def _places(model: nn.Module, count: int) -> tuple[str, ...]:
    """Return the names of so many first arguments of a model."""
    places = places_of(model)
    names = [p.name for p in places if p.kind is not MANY]
    many = next((p.name for p in places if p.kind is MANY), "input")
    while len(names) < count:
        names.append(f"{many}_{len(names)}")
    return tuple(names[:count])


def _names_of(paths: Sequence[tuple[Any, ...]]) -> tuple[str, ...]:
    """Return a name for each tensor, from the path that leads to it."""
    names: list[str] = []
    for path in paths:
        stem = name = re.sub(r"\W", "_", "_".join(map(str, path)))
        while name in names:
            name = f"{stem}_{len(names)}"
        names.append(name)
    return tuple(names)


def take_arguments(module: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    """Let a graph, in place, take the arguments of its model, where any is a structure.

    Args:
        module: A graph whose placeholders are the tensors of `inputs`, in order.
        inputs: How the model was called.
    """
    call, graph = inputs.form, module.graph
    given = {**dict(zip(inputs.placed, call.args)), **call.kwargs}
    flat = [n for n in graph.nodes if n.op == "placeholder"]
    if all(isinstance(value, Slot) for value in given.values()) or len(flat) != len(inputs.names):
        return module
    first_step = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(flat[0]):
        nodes = {name: graph.placeholder(name) for name, v in given.items() if _slots(v)}
    with graph.inserting_before(first_step):
        for name, node in nodes.items():
            for number, path in _slots(given[name]):
                part = node
                for read, key in path:
                    part = graph.call_function(read, (part, key))
                flat[number].replace_all_uses_with(part)
    for node in reversed(flat):
        graph.erase_node(node)
    module.recompile()
    return module


Path = tuple[tuple[Callable[..., Any], Any], ...]  # functions that read a part, each with its key


def _slots(value: Any, path: Path = ()) -> list[tuple[int, Path]]:
    """Return the numbers of the tensors in an argument, and how each is read from it."""
    if isinstance(value, Slot):
        return [(value.number, path)]
    parts: list[tuple[Callable[..., Any], Any, Any]] = []
    if isinstance(value, Mapping):
        parts = [(operator.getitem, key, part) for key, part in value.items()]
    elif isinstance(value, (tuple, list)):
        parts = [(operator.getitem, i, part) for i, part in enumerate(value)]
    elif hasattr(value, "__dataclass_fields__"):
        parts = [(getattr, name, getattr(value, name)) for name in value.__dataclass_fields__]
    return [found for read, key, part in parts for found in _slots(part, (*path, (read, key)))]


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
    require_readable(parts, "the argument `example`")
    return tuple(p.to(device) for p in parts)
