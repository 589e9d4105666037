"""Turn the models and data of a caller into analysed networks and data that can be read again.

Models are traced, checked for having the same outputs, and run once to find their spaces. Inputs
are read once and kept as batches of tensors, so that every stage sees the same samples even of a
loader that shuffles or augments; what exceeds a memory budget is kept in a temporary file. Of
several processes, each keeps its share (see `shares`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._progress import Clock, counted, part, tell
from .._ranks import gathered, rank, require_alike, summing, world
from ..errors import ArgumentError, DataError, FuseError, ModelError, line_of
from ..graph.calls import Call, Example, Reader, ToCall, require_readable
from ..graph.inputs import Inputs
from ..graph.modes import cut_to, evaluating_part
from ..graph.passes import canonical
from ..graph.products import as_linear, count_products
from ..graph.recurrent import depths_of, take_apart
from ..graph.state import device_of, ties_of, untie
from ..graph.trace import at_least_single, run_once, trace_alike
from ..graph.wrappers import unwrapped
from ..spaces.network import Network
from .counted import MASKS, Served
from .shares import Batch, Dealing, checksum
from .spill import SpillStore, Waiting

MEMORY = 1 << 30  # bytes of inputs that are kept in memory
FEW = 2  # rows of a batch that models are asked to take, where it may be one sample


class Calibration:
    """Unlabelled inputs, read once, served in batches of any size.

    Args:
        data: A tensor `(N, ...)`; a mapping from the names of arguments to such tensors; or an
            iterable of batches. A batch is a tensor, a mapping, or a tuple or list that starts with
            as many inputs as the models need; what comes behind, as labels, is left out. An input
            may itself be a structure of tensors, such as a dictionary. A batch of tensors with
            first axes of different lengths is one sample, as a graph is with its nodes and edges.
        limit: Read at most this many samples.
        models: Those that will take the inputs; they tell how many they need, and by which names.
        to_call: From a batch to args, kwargs, where the usual ways do not fit.
        whole: Whether each batch is one sample, which is neither cut nor joined to others. If not
            given, it is if its tensors say so, or if the models refuse the first two rows of what
            they take whole, as where a network knows the graph and is given its nodes.

    Attributes:
        samples: How many there are, of all processes together.
        whole: Whether each batch is one sample.

    Raises:
        DataError: If there are no data, or they hold NaN, or are of another form.
    """

    def __init__(
        self,
        data: Any,
        limit: int | None = None,
        models: Sequence[nn.Module] = (),
        to_call: ToCall | None = None,
        whole: bool | None = None,
    ) -> None:
        self._reader = Reader(models, to_call)
        self.whole, self._unsettled = bool(whole), whole is None and bool(models)
        self._form: Call | None = None  # of the first batch, and so of all
        self._masks: dict[int, bool] = {}  # which tensors are masks, and whether their ones count
        self._longest: list[tuple[int, ...]] = []  # sizes of a sample of each tensor
        self._left = False  # whether the padding stands before the sequences
        self._store = SpillStore(MEMORY)
        self._batches: list[tuple[Waiting, Tensor]] = []  # each with its rows that count
        self._owners: Tensor | None = None  # the process of each sample, if there are several
        self._everywhere = False  # whether all processes work on all samples in any case
        self.samples, dealing = 0, Dealing()
        if isinstance(data, Tensor):
            require_readable((data,), "the argument `data`")
        is_tensor = isinstance(data, Tensor)  # then all of it is in memory in any case
        elsewhere = {data.untyped_storage().data_ptr()} if is_tensor else set()
        for batch in read(self._batches_of(data)):
            inputs, before = self._inputs(batch), self.samples
            require_readable(inputs, f"the batch that starts at sample {before} of `data`")
            if before == limit:
                break
            if limit is not None and not self.whole:
                inputs = tuple(t[: limit - before] for t in inputs)
            if not len(inputs[0]):
                continue
            _require_finite(inputs, before)
            self._measure(inputs)
            own = dealing.own(inputs, self.whole)
            self._keep(own, elsewhere, copied=not is_tensor)
            self.samples = len(dealing.read)
            if limit is not None:
                tell(self.samples / limit)
        if not self.samples:
            raise DataError(
                "no samples",
                where="the argument `data`",
                expected="at least one batch; a few hundred unlabelled samples are usual",
                do="check the path or the loader; an iterator that was read before is empty",
            )
        self._owners = dealing.owners()
        if self._owners is not None:
            self._agree(limit)

    def _agree(self, limit: int | None) -> None:
        """Let all processes know how many samples there are, and pad them to one length."""
        assert self._owners is not None, "there are several processes"
        sizes = torch.tensor([[self._left, *sum(self._longest, ())]], dtype=torch.long)
        left, *most = torch.cat(gathered(sizes)).amax(0).tolist()
        self._left = bool(left)
        self._longest = [tuple(most.pop(0) for _ in size) for size in self._longest]
        self.samples = len(self._owners)
        part = self.first(self.samples if limit is None else limit)
        self.samples, self._owners, self._batches = part.samples, part._owners, part._batches

    def _keep(self, inputs: Batch, elsewhere: set[int], copied: bool) -> None:
        """Keep a batch, as a copy if a loader may use its buffers again."""
        if len(inputs[0]):
            inputs = tuple(t.clone() for t in inputs) if copied else inputs
            rows = torch.arange(self.samples_in(inputs))
            self._batches.append((self._store.put(inputs, elsewhere), rows))

    def example(self, samples: int = 2) -> Batch:
        """Return the first few inputs, as one batch; the first, if each is a batch of its own."""
        if self.whole:
            return next(self.chunks(1))
        batch = self._batch(0) if self._owners is None else next(self.chunks(samples))
        return Served.of([t[:samples] for t in batch], self._masks)

    def as_call(self, tensors: Batch) -> Call:
        """Return inputs as models are called with them: by name, if the data name them."""
        assert self._form is not None, "there is a batch"
        return self._form.filled(tensors)

    def at_a_time(self, size: int) -> int:
        """Return how many samples a batch has if so many are asked for."""
        return 1 if self.whole else size

    def samples_in(self, batch: Batch) -> int:
        """Return how many samples a batch has."""
        return 1 if self.whole else len(batch[0])

    def parted(self, every: int) -> tuple[Calibration, Calibration]:
        """Return all inputs but each `every`-th one, and each `every`-th one; nothing is copied."""
        taken = torch.arange(self.samples) % every == every - 1
        return self._part(~taken), self._part(taken)

    def first(self, samples: int) -> Calibration:
        """Return the first inputs; nothing is copied."""
        return self._part(torch.arange(self.samples) < samples)

    def of_same_samples(self, batches: Iterable[Batch]) -> Calibration:
        """Return other inputs for the same samples.

        Args:
            batches: Batches that have a row for each sample that `own` yields, in order.
        """
        other = Calibration.__new__(Calibration)
        vars(other).update(vars(self), _store=SpillStore(MEMORY), _batches=[], _masks={})
        other._longest, other._owners = [], self._owners if self.spread else None
        for inputs in batches:
            inputs = tuple(at_least_single(t.detach()) for t in inputs)
            _require_finite(inputs, 0)
            other._measure(inputs)
            other._keep(inputs, set(), copied=True)
        return other

    def everywhere(self) -> Calibration:
        """Return the inputs such that every process has all of them as its own."""
        other = copy.copy(self)
        other._everywhere = True
        return other

    @property
    def spread(self) -> bool:
        """Whether the samples lie in several processes, each with some of them."""
        if self._owners is None or self._everywhere:
            return False
        return len(self._owners.unique()) == world()

    @property
    def numbers(self) -> Tensor:
        """The numbers, among all samples, of those that `own` yields."""
        if not self.spread or self._owners is None:
            return torch.arange(self.samples)
        return (self._owners == rank()).nonzero().flatten()

    def chunks(self, size: int) -> Iterator[Served]:
        """Yield all inputs in order, in batches of `size` samples, the last one shorter.

        Every process gets all of them, and has to ask for as many batches.
        """
        if self._owners is None:
            yield from self._cut(_sizes(self.samples, size))
            return
        parts = self._owners.split(size)
        for owners, inputs in zip(parts, self._cut([int((p == rank()).sum()) for p in parts])):
            parts_of_all = [_joined(gathered(t), owners) for t in inputs]
            yield Served.of(parts_of_all, self._masks)

    def own(self, size: int) -> Iterator[Served]:
        """Yield the inputs that are this process's share, in batches of `size` samples.

        What is made of them has to be summed over processes, by `_ranks.total` inside `summed`.
        If not every process has a share, all get all, and nothing is summed.
        """
        return self._cut(_sizes(len(self.numbers), size)) if self.spread else self.chunks(size)

    def dealt(self, size: int) -> Iterator[Batch]:
        """Yield the batches of `chunks` that this process is to work on, whole, as `own` does."""
        for number, batch in enumerate(self.chunks(size)):
            if not self.spread or number % world() == rank():
                yield batch

    @contextmanager
    def summed(self) -> Iterator[None]:
        """Let `_ranks.total` sum what processes make of their shares of these data."""
        with summing(self.spread):
            yield

    def _part(self, chosen: Tensor) -> Calibration:
        """Return some of the inputs; `chosen` tells for each sample whether it is one of them."""
        part = copy.copy(self)
        part.samples, part._batches = int(chosen.sum()), []
        if self._owners is not None:
            part._owners, chosen = self._owners[chosen], chosen[self._owners == rank()]
        for waiting, rows in self._batches:
            mine, chosen = chosen[: len(rows)], chosen[len(rows) :]
            if mine.any():
                part._batches.append((waiting, rows[mine]))
        return part

    def _cut(self, sizes: Sequence[int]) -> Iterator[Served]:
        """Yield the inputs that lie in this process, in batches of some sizes."""
        if self.whole:
            for held, _ in self._batches:
                yield Served.of(self._store.get(held), self._masks, whole=True)
            return
        waiting = (self._batch(i) for i in range(len(self._batches)))
        lengths = zip(self._longest, self._kinds)
        none = tuple(torch.empty(0, *n, dtype=kind) for n, kind in lengths)
        pending: list[Batch] = [tuple(t[:0] for t in self._batch(0)) if self._batches else none]
        for size in sizes:
            while sum(len(b[0]) for b in pending) < size:
                pending.append(next(waiting))
            joined = tuple(torch.cat(parts) for parts in zip(*pending))
            yield Served.of([t[:size] for t in joined], self._masks)
            pending = [tuple(t[size:] for t in joined)]

    def _batch(self, i: int) -> Batch:
        """Return one batch as it was read, or the part of it that belongs here."""
        waiting, rows = self._batches[i]
        batch: Batch = self._store.get(waiting)
        batch = batch if len(rows) == len(batch[0]) else tuple(t[rows] for t in batch)
        if [tuple(t.shape[1:]) for t in batch] == self._longest:
            return batch
        return tuple(self._padded(number, t) for number, t in enumerate(batch))

    def _padded(self, number: int, tensor: Tensor) -> Tensor:
        """Return a tensor with the sizes of the longest sequences; what is added does not count."""
        missing = [n - size for n, size in zip(self._longest[number], tensor.shape[1:])]
        pads = [p for n in reversed(missing) for p in ((n, 0) if self._left else (0, n))]
        filling = int(number in self._masks and not self._masks[number])
        return nn.functional.pad(tensor, pads, value=filling)

    def _measure(self, inputs: Batch) -> None:
        """Note how long the sequences of a batch are, and where they are padded.

        Raises:
            DataError: If the batch can neither be joined to the first nor padded.
        """
        sizes = [tuple(t.shape[1:]) for t in inputs]
        if self.whole:
            return
        if not self._longest:
            self._longest, self._kinds = sizes, [t.dtype for t in inputs]
        elif sizes != self._longest or [t.dtype for t in inputs] != self._kinds:
            lengths = {inputs[i].shape[1] for i in self._masks}
            same = [t.dtype for t in inputs] == self._kinds
            pairs = [list(zip(*both)) for both in zip(sizes, self._longest)]
            ranks = [len(both[0]) == len(both[1]) for both in zip(sizes, self._longest)]
            differ = {a for of_one in pairs for a, b in of_one if a != b}
            if not same or not all(ranks) or not differ <= lengths:
                raise _unlike(inputs, self._longest, self._kinds, self.samples)
            self._longest = [tuple(map(max, of_one)) for of_one in pairs]
        masks = [(inputs[i] != 0) == counts for i, counts in self._masks.items()]
        self._left = self._left or any(bool((~mask[:, 0] & mask[:, -1]).any()) for mask in masks)

    def _batches_of(self, data: Any) -> Iterable[Any]:
        if isinstance(data, Tensor):
            if not data.dim():
                return []
            self._settle(self._reader.call(data))
            return [data] if self.whole else data.split(64)
        if isinstance(data, Mapping) or (isinstance(data, tuple) and self._reader.is_call(data)):
            return [data]
        if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
            return data
        raise DataError(
            f"calibration data of type {type(data).__name__}",
            where="the argument `data`",
            expected="a tensor (N, ...) or an iterable of batches, such as a DataLoader",
            do="pass the inputs as one tensor, or a loader over them",
        )

    def _settle(self, call: Call) -> None:
        """Tell from the first call whether each batch is one sample, if nobody said."""
        _, tensors, _ = call.parted()
        lengths = {len(t) for t in tensors if t.dim()}
        if self._unsettled and all(t.dim() for t in tensors) and max(lengths) > FEW:
            apart = len(lengths) > 1 or not self._reader.takes(call, FEW)
            self.whole = apart and self._reader.takes(call)
        self._unsettled = False

    def _inputs(self, batch: Any) -> Batch:
        """Return the tensors in the arguments that a batch gives."""
        call = self._reader.call(batch)
        self._settle(call)
        form, tensors, paths = (self._form.like(call) if self._form else call).parted()
        if self._form is None:
            self._form, self._masks = form, _masks_among(tensors, self._reader.named(paths))
        if form != self._form:
            raise DataError(
                f"a batch with the arguments {form} after batches with {self._form}",
                where=f"the batch that starts at sample {self.samples} of `data`",
                expected="batches that differ in their tensors only",
                do="say what forward is called with: inputs=lambda batch: (args, kwargs)",
            )
        lengths = [len(t) if t.dim() else "no" for t in tensors]
        if not self.whole and (len(set(lengths)) > 1 or "no" in lengths):
            raise DataError(
                f"inputs of {lengths} samples",
                where=f"the batch that starts at sample {self.samples} of `data`",
                expected="tensors (samples, ...), all with as many samples",
                do="give each input a first axis of samples, or leave out what has none: "
                "inputs=lambda batch: (args, kwargs)",
            )
        return tuple(at_least_single(t.detach()) for t in tensors)


def _sizes(samples: int, size: int) -> list[int]:
    """Return the sizes of batches of so many samples, the last one smaller."""
    return [min(size, samples - start) for start in range(0, samples, size)]


def _joined(parts: Sequence[Tensor], owners: Tensor) -> Tensor:
    """Return the samples of all processes in order."""
    whole = parts[0].new_empty(len(owners), *parts[0].shape[1:])
    for k, samples in enumerate(parts):
        whole[(owners == k).to(whole.device)] = samples
    return whole


def read(batches: Iterable[Any], where: str = "the argument `data`") -> Iterator[Any]:
    """Yield batches; what the caller's own loader raises becomes an error of the library."""
    end = object()
    try:
        given = iter(batches)
        batch = next(given, end)
        while batch is not end:
            yield batch
            batch = next(given, end)
    except FuseError:
        raise
    except Exception as error:
        raise DataError(
            f"data that cannot be read: {type(error).__name__}: {error}",
            where=f"{where} {line_of(error)}".strip(),
            expected="batches whose first entry is the input",
            do="read the first batches in a loop of your own, and mend what fails there",
        ) from error


def _masks_among(tensors: Sequence[Tensor], names: Sequence[str]) -> dict[int, bool]:
    """Return the numbers of the tensors that are masks, and whether their ones count."""
    whole = [not t.is_floating_point() and t.dim() == 2 for t in tensors]
    pairs = ((i, name, ones) for i, name in enumerate(names) for ones in MASKS.items() if whole[i])
    return {i: counts for i, name, (part, counts) in pairs if part in name}


def _unlike(
    inputs: Batch, sizes: Sequence[tuple[int, ...]], kinds: Sequence[torch.dtype], before: int
) -> DataError:
    found = [(tuple(t.shape[1:]), t.dtype) for t in inputs]
    return DataError(
        f"a batch of samples {found} after batches of samples {[*zip(sizes, kinds)]}",
        where=f"the batch that starts at sample {before} of `data`",
        expected="inputs of one shape and type, or sequences with their attention mask",
        do="resize or pad the samples to one shape, or give the `attention_mask` of the tokenizer",
    )


def _require_finite(inputs: Batch, before: int) -> None:
    for t in inputs:
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise DataError(
                "inputs that are NaN or infinite",
                where=f"the batch that starts at sample {before} of `data`",
                expected="finite inputs",
                do="clean the samples or the transform that makes them",
            )


TRACED = 0.25  # share of the work that is done once all networks are traced


def prepare(
    models: Sequence[nn.Module],
    data: Any,
    clock: Clock,
    outputs_may_differ: bool = False,
    to_call: ToCall | None = None,
) -> tuple[list[Network], Calibration]:
    """Trace and analyse models that have the same inputs and outputs.

    Args:
        models: The networks; not modified.
        data: Calibration inputs.
        clock: Times the stages.
        outputs_may_differ: Take networks with different outputs, too. Heads that exist in training
            mode only are then left out.
        to_call: From a batch of the data to args, kwargs.

    Raises:
        ArgumentError: If there are no models.
        TraceError: If a model cannot be traced.
        ModelError: If weights are not finite, or outputs differ in shape.
        DataError: If the data are empty or refused by a model.
        ProcessError: If several processes have different models.
    """
    if not isinstance(models, Sequence) or not len(models):
        raise ArgumentError(
            "no models" if isinstance(models, Sequence) else f"a {type(models).__name__}",
            where="the argument `models`",
            expected="a list of one or more networks",
            do="pass them as a list: fxfuse.fuse([a, b], data)",
        )
    with clock.stage("read data"):
        known = isinstance(data, Calibration)
        calibration = data if known else Calibration(data, models=models, to_call=to_call)
    if world() > 1:
        tensors = (t for m in models for t in (*m.parameters(), *m.buffers()))
        require_alike([checksum(t) for t in tensors], "models")
    with clock.stage("trace and find spaces"):
        return _analyse_all(models, calibration, outputs_may_differ), calibration


def _analyse_all(
    models: Sequence[nn.Module], data: Calibration, outputs_may_differ: bool
) -> list[Network]:
    """Trace all models, then analyse one after the other."""
    names, example = _names(models), data.example()
    with part(0.0, TRACED):
        graphs = trace_alike(models, data.as_call(example), names)
    if len({len(ties_of(g)) for g in graphs}) > 1:  # a weight of one network is two of another
        for graph in graphs:
            untie(graph)
    inputs = [tuple(t.to(device_of(g)) for t in example) for g in graphs]
    if len({tuple(depths_of(g)) for g in graphs}) > 1:
        for graph, x in zip(graphs, inputs):
            take_apart(graph, x)
    if len({count_products(g) for g in graphs}) > 1:
        for graph in graphs:
            as_linear(graph)
    outputs = [run_once(g, x, name) for g, x, name in zip(graphs, inputs, names)]
    if not outputs_may_differ:
        _require_same_outputs(outputs, names)
    _drop_training_heads(graphs, outputs_may_differ)
    networks = []
    with part(TRACED, 1.0):
        for name, x in counted(list(zip(names, inputs))):
            graph = graphs.pop(0)  # huge perhaps, and `canonical` returns a copy: this one goes
            networks.append(Network.of(name, canonical(graph, x), x))
    return networks


def analyse(
    model: nn.Module, example: Example, name: str, to_call: ToCall | None = None
) -> Network:
    """Trace and analyse one model; see `analyse_alike`."""
    return analyse_alike([model], example, [name], to_call)[0]


def analyse_alike(
    models: Sequence[nn.Module],
    example: Example,
    names: Sequence[str],
    to_call: ToCall | None = None,
) -> list[Network]:
    """Trace models by one front-end, since each has its own way to write them, and analyse them.

    Args:
        models: The models; not modified.
        example: Inputs for one run of each.
        names: How to call them in errors.
        to_call: From the example to args, kwargs.

    Raises:
        TraceError: If a model cannot be traced.
        DataError: If it refuses the example.
    """
    bare = [unwrapped(model) for model in models]
    call = example if isinstance(example, Call) else Reader(bare, to_call).example(example)
    networks = []
    for model, graph, name in zip(bare, trace_alike(models, call, names), names):
        given = Inputs.of(model, call).on(device_of(graph))
        inputs = tuple(map(at_least_single, given))
        tell(TRACED)
        run_once(graph, inputs, name)
        with part(TRACED, 1.0):
            networks.append(Network.of(name, canonical(graph, inputs), inputs))
    return networks


def _drop_training_heads(graphs: list[fx.GraphModule], always: bool) -> None:
    """Cut off heads that exist in training mode only, unless all networks have such heads."""
    parts = [evaluating_part(g) for g in graphs]
    if always or not all(parts):
        for graph, part in zip(graphs, parts):
            if part is not None:
                cut_to(graph, part)


def _names(models: Sequence[nn.Module]) -> list[str]:
    """Name models by their classes, numbered where several are of one class."""
    kinds = [type(m).__name__ for m in models]
    return [f"{kind} {i}" if kinds.count(kind) > 1 else kind for i, kind in enumerate(kinds)]


def _require_same_outputs(outputs: list[list[torch.Tensor]], names: list[str]) -> None:
    shapes = [[tuple(t.shape[1:]) for t in out] for out in outputs]
    for other, name in zip(shapes, names):
        if other != shapes[0]:
            raise ModelError(
                f"outputs of shape {shapes[0]} and {other}",
                where=f"{names[0]} and {name}",
                expected="networks with the same outputs",
                do="keep a head for each, heads=fxfuse.heads.Separate(), or give one the labels "
                "of all, heads=fxfuse.heads.Union(labels=[...])",
            )
