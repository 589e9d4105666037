"""A short descent behind the closed form: all weights, to outputs that are wanted, without labels.

References:
    Hinton et al. 2015, Distilling the knowledge in a neural network; at temperature 1. Difference:
    it starts at the fused network, norms keep their statistics, and the weights that come nearest
    on samples held out are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._progress import tell
from .._ranks import taken_from_first
from ..calibration.counted import Counted, Served
from ..calibration.data import Calibration
from ..calibration.distance import is_logits
from ..calibration.shares import Batch
from ..errors import ArgumentError
from ..graph.modes import eval_mode
from ..graph.state import device_of
from ..graph.structures import tensors_in
from ..ir import Finished

POOL = 1024  # samples among which batches are drawn
MEMORY = 1 << 28  # bytes of the outputs wanted that are kept; if they are more, they are made anew
CHECKS = 8  # how often the distance is measured on the way

Wanted = Callable[[Batch], Sequence[Tensor]]


@dataclass(frozen=True)
class Finish:
    """How a fused network is trained on, for steps or for seconds, to the networks' mean outputs.

    Adam on all floating-point parameters, with a rate that falls to zero; the network stays in eval
    mode. Class scores are compared by their divergence, other outputs by their squared error. The
    result is never farther from what is wanted, on samples held out, than the network was before.
    With steps it is the same again with the same seed.

    Attributes:
        steps: How many steps to take. Either these or seconds are given.
        seconds: Wall time, the networks' outputs and all measuring included.
        rate: Learning rate at the start.
        batch: Samples in a step.
        seed: Of the order of the samples.
    """

    steps: int | None = None
    seconds: float | None = None
    rate: float = 3e-4
    batch: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        given = [x for x in (self.steps, self.seconds) if x is not None]
        good = len(given) == 1 and given[0] > 0 and self.rate > 0 and self.batch > 0
        if not good:
            raise ArgumentError(
                f"a finish of {self.steps} steps and {self.seconds} seconds, rate {self.rate}, "
                f"batches of {self.batch}",
                where="fxfuse.refit.Finish",
                expected="steps or seconds, one of them, and positive numbers",
                do="write Finish(steps=200), or Finish(seconds=10)",
            )

    def __call__(
        self, module: nn.Module, wanted: Wanted, far: Callable[[], float], data: Calibration
    ) -> Finished:
        """Train a network on, in place.

        Args:
            module: The network.
            wanted: From a batch to the outputs that are wanted.
            far: Measures how far the network is from these, on samples that are not in the data.
            data: Calibration inputs.
        """
        start = time.perf_counter()
        parameters = [p for p in module.parameters() if p.is_floating_point()]
        frozen = [p for p in parameters if not p.requires_grad]
        descent = _Descent(module, parameters, far, self.rate)
        checked, steps = 0, 0
        for steps, (inputs, aims) in enumerate(self._batches(data, wanted)):
            done = self._done(steps, start)
            tell(min(done, 1.0))
            if int(done * CHECKS) > checked:
                checked = int(done * CHECKS)
                descent.check(steps)
            if done >= 1:
                break
            descent.step(inputs, aims, 1 - done)
        descent.keep()
        for parameter in frozen:
            parameter.requires_grad_(False)
        return Finished(steps, descent.kept, descent.before, descent.least)

    def _done(self, steps: int, start: float) -> float:
        """Return the share of the steps or of the time that is over, the same in all processes."""
        if self.steps is not None:
            return steps / self.steps
        assert self.seconds is not None, "there are steps or seconds"
        share = torch.tensor([(time.perf_counter() - start) / self.seconds], dtype=torch.float64)
        taken_from_first([share])
        return float(share)

    def _batches(
        self, data: Calibration, wanted: Wanted
    ) -> Iterator[tuple[Batch, Sequence[Tensor]]]:
        """Yield inputs with the outputs wanted, in another order each time round, for ever."""
        generator = torch.Generator().manual_seed(self.seed)
        first = data.example(1)
        size = sum(t.nbytes for t in wanted(first)) * data.samples
        known: dict[int, list[Tensor]] | None = {} if size <= MEMORY and not data.whole else None
        while True:
            for i, pool in enumerate(data.chunks(POOL)):
                if known is not None and i not in known:
                    every = torch.arange(len(pool[0])).split(self.batch)
                    parts = zip(*(wanted(_rows(pool, at)) for at in every))
                    known[i] = [torch.cat(parts_of_one) for parts_of_one in parts]
                for at in _orders(pool, self.batch, generator):
                    rows = pool if at is None else _rows(pool, at)
                    if known is None or at is None:
                        yield rows, wanted(rows)
                    else:
                        yield rows, [t[at.to(t.device)] for t in known[i]]


def _orders(pool: Served, size: int, generator: torch.Generator) -> Iterator[Tensor | None]:
    """Yield which samples of a pool make a batch; None for all, where they are one sample."""
    if Served.is_whole(pool):
        yield None
        return
    yield from torch.randperm(len(pool[0]), generator=generator).split(size)


def _rows(pool: Served, at: Tensor) -> Served:
    return pool.like([t[at.to(t.device)] for t in pool])


class _Descent:
    """A network on its way down, and the nearest that it came.

    Args:
        module: The network.
        parameters: What is trained.
        far: See `Finish`.
        rate: Learning rate at the start.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        far: Callable[[], float],
        rate: float,
    ) -> None:
        self.module, self.parameters, self.far, self.rate = module, parameters, far, rate
        self.optimiser = torch.optim.Adam(parameters, rate)
        self.kept, self.before = 0, far()
        self.least = self.before
        self.best = [p.detach().clone() for p in parameters]
        for parameter in parameters:
            parameter.requires_grad_(True)

    def step(self, inputs: Batch, aims: Sequence[Tensor], left: float) -> None:
        """Take a step."""
        self.optimiser.param_groups[0]["lr"] = self.rate * left
        counted = Counted.of(inputs)
        with torch.enable_grad(), eval_mode(self.module):
            outputs = tensors_in(self.module(*(t.to(device_of(self.module)) for t in inputs)))
            given, wanted = ([counted.rows(t) for t in side] for side in (outputs, aims))
            loss = _loss([t for t in given if t.is_floating_point()], wanted)
            self.optimiser.zero_grad()
            loss.backward()
        self.optimiser.step()

    def check(self, steps: int) -> None:
        """Measure the distance; remember the weights if they are the nearest so far."""
        far = self.far()
        if far < self.least:
            self.kept, self.least = steps, far
            self.best = [p.detach().clone() for p in self.parameters]

    def keep(self) -> None:
        """Give the network the nearest weights."""
        for parameter, best in zip(self.parameters, self.best):
            parameter.data.copy_(best)
            parameter.grad = None


def _loss(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return the divergence of class scores, or the squared error relative to the values wanted."""
    if len(wanted) == 1 and is_logits(wanted[0]):
        aim = wanted[0].to(given[0]).log_softmax(1)
        return F.kl_div(given[0].log_softmax(1), aim, reduction="batchmean", log_target=True)
    error = sum(((a - b.to(a)).abs() ** 2).sum() for a, b in zip(given, wanted))
    power = sum((b.abs() ** 2).sum() for b in wanted)
    return torch.as_tensor(error) / torch.as_tensor(power).clamp(min=1e-30)
