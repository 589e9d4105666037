"""A batch as a call: which parts of it are which arguments of forward, and which are labels.

A mapping gives arguments by their names, or is one argument itself. A tuple or list starts with as
many arguments as forward needs, or with one tuple of them; labels come behind. Where a batch can be
read in two ways, the models are run on it, and the first way that all of them take is the one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, line_of
from .hooks import copied
from .modes import eval_mode
from .state import device_of, unreadable
from .structures import Slot, rebuilt, tensors_in
from .wrappers import unwrapped

Example = Any  # a tensor, a tuple, a mapping: one batch
ToCall = Callable[[Any], tuple[Sequence[Any], Mapping[str, Any]]]  # from a batch to args, kwargs
LABELS = "label"  # in the names of arguments that are no inputs, but what is to come out
CONSTANTS = (str, int, float, complex, bool, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Call:
    """The arguments of one call; they may be nested.

    Attributes:
        args: By place.
        kwargs: By name.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def parted(self) -> tuple[Call, list[Tensor], list[tuple[Any, ...]]]:
        """Return the call with slots for its tensors, the tensors, and the path to each.

        Raises:
            DataError: If there is anything in it but tensors and constants.
        """
        tensors: list[Tensor] = []
        paths: list[tuple[Any, ...]] = []

        def slot(value: Any, path: tuple[Any, ...]) -> Any:
            if isinstance(value, Tensor):
                tensors.append(value)
                paths.append(path)
                return Slot(len(tensors) - 1)
            if not isinstance(value, CONSTANTS):
                raise _no_input(f"an argument with a {type(value).__name__}", path)
            return value

        args = tuple(rebuilt(value, slot, (i,)) for i, value in enumerate(self.args))
        kwargs = {k: rebuilt(value, slot, (k,)) for k, value in self.kwargs.items()}
        return Call(args, kwargs), tensors, paths

    def like(self, call: Call) -> Call:
        """Return another call with its arguments by name in the order of this one's."""
        kwargs = {k: call.kwargs[k] for k in self.kwargs if k in call.kwargs}
        return Call(call.args, kwargs | call.kwargs)

    def filled(self, values: Sequence[Any]) -> Call:
        """Return the call with values in its slots."""

        def value_of(value: Any, _: tuple[Any, ...]) -> Any:
            return values[value.number] if isinstance(value, Slot) else value

        args = tuple(rebuilt(value, value_of) for value in self.args)
        return Call(args, {k: rebuilt(v, value_of) for k, v in self.kwargs.items()})


# --- what a forward takes -------------------------------------------------------------------------

MANY = inspect.Parameter.VAR_POSITIONAL


def places_of(model: nn.Module) -> list[inspect.Parameter]:
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
    variadic = MANY, inspect.Parameter.VAR_KEYWORD
    parameters = [p for model in models for p in _parameters(model)]
    return list(dict.fromkeys(p.name for p in parameters if p.kind not in variadic))


def required_of(models: Sequence[nn.Module]) -> int:
    """Return how many arguments all of some models need."""
    return max((len(needed_of(m)) for m in models), default=1)


def needed_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a forward that have no default."""
    places = places_of(model)
    return tuple(p.name for p in places if p.default is p.empty and p.kind is not MANY)


# --- from batches to calls ------------------------------------------------------------------------


class Reader:
    """Reads batches as calls of some models, all in the way in which the first one can be read.

    Args:
        models: Those that will take the inputs.
        to_call: From a batch to args, kwargs, where the usual ways do not fit.
    """

    def __init__(self, models: Sequence[nn.Module] = (), to_call: ToCall | None = None) -> None:
        self.models = [unwrapped(m) for m in models]
        self.arguments, self.required = arguments_of(self.models), required_of(self.models)
        places = [places_of(m) for m in self.models]
        some = [len(p) for p in places if not any(x.kind is MANY for x in p)]
        self.places = max(some) if self.models and len(some) == len(places) else None
        self.to_call = to_call
        self._way: int | None = None

    def call(self, batch: Any, where: str = "the argument `data`") -> Call:
        """Return the call of a batch of data, labels left out.

        Raises:
            DataError: If a batch is of another form.
        """
        return self._chosen(list(self._calls(batch)), batch, where)

    def example(self, example: Any) -> Call:
        """Return the call of an example: a tuple has no labels if forward has so many arguments.

        Raises:
            DataError: If it is of another form.
        """
        if self.to_call is None and self._are_arguments(example):
            return Call(tuple(example))
        return self.call(example, "the argument `example`")

    def is_call(self, entries: Any) -> bool:
        """Tell whether entries start with all that models of several arguments need."""
        first = entries[: self.required] if isinstance(entries, (tuple, list)) else ()
        return 1 < self.required == len(first) and all(map(tensors_in, first))

    def named(self, paths: Sequence[tuple[Any, ...]]) -> list[str]:
        """Return a name for each tensor of a call, from the path that leads to it."""
        places = [p.name for p in places_of(self.models[0])] if self.models else []
        heads = [places[p[0]] if p[0] in range(len(places)) else p[0] for p in paths]
        return ["_".join(map(str, (head, *path[1:]))) for head, path in zip(heads, paths)]

    def _fits(self, count: int) -> bool:
        return self.places is None or count <= self.places

    def _are_arguments(self, entries: Any) -> bool:
        """Tell whether entries can be arguments, one after the other."""
        several = isinstance(entries, (tuple, list)) and bool(entries)
        return several and self._fits(len(entries)) and all(map(tensors_in, entries))

    def _calls(self, batch: Any) -> Iterator[Call]:
        """Yield the calls that a batch can be, the most likely one first."""
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if isinstance(first, Call):
            yield first
        elif self.to_call is not None:
            yield _given(self.to_call, batch)
        elif isinstance(batch, Mapping) and (named := self._by_name(batch)):
            yield Call((), named)
        elif isinstance(batch, Mapping):
            if self._is_one(batch):
                yield Call((batch,))
            yield from self._entry(next(iter(batch.values()), None))
        elif self.is_call(batch):
            if self.is_call(batch[0]):
                yield Call(tuple(batch[0]))
            yield Call(tuple(batch[: self.required]))
        else:
            yield from self._entry(first)

    def _entry(self, entry: Any) -> Iterator[Call]:
        """Yield the calls that the first entry of a batch can be."""
        if isinstance(entry, Mapping) and (named := self._by_name(entry)):
            yield Call((), named)
        elif isinstance(entry, Tensor) or self._is_one(entry):
            yield Call((entry,))
        if self._are_arguments(entry):
            yield Call(tuple(entry))

    def _is_one(self, value: Any) -> bool:
        """Tell whether a structure can be the one argument that the models need."""
        one = bool(self.models) and self.required <= 1 and self._fits(1)
        return one and bool(tensors_in(value))

    def _by_name(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of a mapping is an argument, labels left out; empty if no tensor is one."""
        named = {k: v for k, v in batch.items() if k in self.arguments and LABELS not in str(k)}
        return named if tensors_in(named) else {}

    def _chosen(self, calls: list[Call], batch: Any, where: str) -> Call:
        """Return the call that all models take; which it is, is settled by the first batch."""
        if not calls:
            entry = batch
            if isinstance(batch, (Mapping, tuple, list)):
                values = [*batch.values()] if isinstance(batch, Mapping) else batch
                entry = values[0] if values else None
            raise DataError(
                f"a batch whose first entry is of type {type(entry).__name__}",
                where=where,
                expected="a tensor, a mapping from the names of arguments, or a tuple or list that "
                "starts with the arguments of forward",
                do="convert the samples to tensors (torchvision: transforms.ToTensor()), or say "
                "what forward is called with: inputs=lambda batch: (args, kwargs)",
            )
        if self._way is None:
            ways = list(enumerate(calls if len(calls) > 1 else ()))
            taken = (i for rows in (2, None) for i, call in ways if self.takes(call, rows))
            self._way = next(taken, 0)
        return calls[min(self._way, len(calls) - 1)]

    def takes(self, call: Call, rows: int | None = None) -> bool:
        """Tell whether all models take a call, by running copies of them.

        Args:
            call: The call.
            rows: Of how many of its first samples; of all if not given.
        """
        try:
            form, tensors, _ = call.parted()
            for model in self.models:
                given = [t[:rows].to(device_of(model)).clone() for t in tensors]
                other = copied(model)
                with eval_mode(other), torch.no_grad():
                    filled = form.filled(given)
                    other.forward(*filled.args, **filled.kwargs)
        except Exception:
            return False
        return True


def _given(to_call: ToCall, batch: Any) -> Call:
    """Return the call that the caller's own function makes of a batch."""
    try:
        made: Any = to_call(batch)
    except Exception as error:
        raise DataError(
            f"a batch that `inputs` refuses: {type(error).__name__}: {error}",
            where=f"the argument `inputs` {line_of(error)}".strip(),
            expected="a function from a batch to args, kwargs of forward",
            do="call it on one batch yourself, and mend what fails there",
        ) from error
    pair = made if isinstance(made, tuple) and len(made) == 2 else (None, None)
    if isinstance(pair[0], (tuple, list)) and isinstance(pair[1], Mapping):
        return Call(tuple(pair[0]), dict(pair[1]))
    raise DataError(
        f"inputs of type {type(made).__name__}",
        where="what the argument `inputs` returned",
        expected="a pair (args, kwargs) of a tuple and a dictionary",
        do="return what forward is called with: lambda batch: ((batch['image'],), {})",
    )


def _no_input(met: str, path: tuple[Any, ...]) -> DataError:
    place = "".join(f"[{step!r}]" for step in path)
    return DataError(
        met,
        where=f"the arguments {place} of forward",
        expected="tensors, constants, and tuples, lists, mappings and data classes of these",
        do="leave it out: inputs=lambda batch: (args, kwargs) says what forward is called with",
    )


def require_readable(inputs: Sequence[Tensor], where: str) -> None:
    """Refuse inputs that are no ordinary tensors with values."""
    for tensor in inputs:
        problem = unreadable(tensor)
        if problem is not None:
            what, do = problem
            raise DataError(what, where=where, expected="ordinary dense tensors", do=do)
