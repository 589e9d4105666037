"""How a model is called: which tensors of an example are which arguments of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from .state import unreadable

Example = Tensor | tuple[Tensor, ...] | Mapping[str, Any]
LABELS = "label"  # in the names of arguments that are no inputs, but what is to come out


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call.

    Attributes:
        names: Of the arguments, in the order of the example.
        tensors: Their values; none if there is no example.
        positional: How many of them are passed by their place.
        taken: Those that the model takes. Others of its kind may take more.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    positional: int
    taken: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, example: Any = None) -> Inputs:
        """Tell which arguments of a model an example gives.

        Args:
            model: The model.
            example: A tensor, a tuple of tensors for its first arguments, or a mapping from names
                of arguments. None stands for the arguments without a default.

        Raises:
            DataError: If the example is of another form.
        """
        if isinstance(example, Mapping):
            names = arguments_of([model])
            named = by_name(example, names or list(example))
            if named:
                taken = set(names) & set(named) if names else named
                return cls(tuple(named), tuple(named.values()), 0, frozenset(taken))
            example = next(iter(example.values()), ())
        places = _places(model)
        if example is None:
            names = [p.name for p in places if p.default is p.empty and p.kind is not _MANY]
            return cls(tuple(names), (), len(names), frozenset(names))
        tensors = as_example(example)
        names = [p.name for p in places if p.kind is not _MANY]
        many = next((p.name for p in places if p.kind is _MANY), "input")
        while len(names) < len(tensors):
            names.append(f"{many}_{len(names)}")
        names = names[: len(tensors)]
        return cls(tuple(names), tensors, len(names), frozenset(names))

    def call(self, function: Callable[..., Any], values: Sequence[Any]) -> Any:
        """Call a function with a value for each argument; the others have their defaults."""
        named = {n: v for n, v in zip(self.names, values) if n in self.taken}
        placed = [named.pop(n) for n in self.names[: self.positional]]
        return function(*placed, **named)

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the values on a device."""
        return tuple(t.to(device) for t in self.tensors)


_MANY = inspect.Parameter.VAR_POSITIONAL


def _places(model: nn.Module) -> list[inspect.Parameter]:
    """Return the arguments of a model's forward that may be passed by their place."""
    later = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD
    return [p for p in _parameters(model) if p.kind not in later]


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """Return the arguments of a forward; none of one without a signature, or if there is none."""
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (AttributeError, TypeError, ValueError):
        return []


def arguments_of(models: Sequence[nn.Module]) -> list[str]:
    """Return the names of the arguments that any of some models takes."""
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    names: dict[str, None] = {}
    for model in models:
        for p in _parameters(model):
            if p.kind not in variadic:
                names[p.name] = None
    return list(names)


def required_of(models: Sequence[nn.Module]) -> int:
    """Return how many arguments all of some models need."""
    counts = [sum(p.default is p.empty and p.kind is not _MANY for p in _places(m)) for m in models]
    return max(counts, default=1)


def by_name(batch: Mapping[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of a mapping that are arguments of those names, labels left out."""
    return {
        key: value
        for key, value in batch.items()
        if key in names and LABELS not in key and isinstance(value, Tensor)
    }


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
            expected="a tensor or a tuple of tensors, one for each input of the model; or a "
            "mapping from the names of inputs",
            do="pass a batch as the model takes it",
        )
    require_readable(parts, "the argument `example`")
    return tuple(p.to(device) for p in parts)


def require_readable(inputs: Sequence[Tensor], where: str) -> None:
    """Refuse inputs that are no ordinary tensors with values."""
    for tensor in inputs:
        problem = unreadable(tensor)
        if problem is not None:
            what, do = problem
            raise DataError(what, where=where, expected="ordinary dense tensors", do=do)
