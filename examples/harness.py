"""One training loop for all experiments: resumable, the same on one device or several processes.

What an epoch draws (order, crops, flips) comes from the seed and the number of the epoch alone, so
that a run that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from images import Images, Split, augmented
from torch import Tensor, nn

from fxfuse._files import write_atomically
from fxfuse.errors import ArgumentError, DataError


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with momentum.

    Attributes:
        epochs: Passes over the training images.
        rate: Learning rate; of a cycle, its peak.
        batch: Images per step, of all processes together.
        decay: Weight decay.
        momentum: Of the steps.
        cuts: Epochs after which the rate is divided by `factor`; None for one cycle over the whole
            run: a linear rise over the first tenth, then a cosine down to zero.
        factor: See `cuts`.
        clip: Largest norm of the gradient, for networks without norms.
    """

    epochs: int
    rate: float
    batch: int = 128
    decay: float = 1e-4
    momentum: float = 0.9
    cuts: tuple[int, ...] | None = None
    factor: float = 10.0
    clip: float | None = None

    def rate_at(self, progress: float) -> float:
        """Return the learning rate after a number of epochs, parts of one included.

        Example:
            >>> recipe = Recipe(4, 1.0, cuts=(2,))
            >>> [recipe.rate_at(p) for p in (0, 1.9, 2.0)]
            [1.0, 1.0, 0.1]
        """
        if self.cuts is not None:
            return self.rate / self.factor ** sum(progress >= cut for cut in self.cuts)
        share = progress / self.epochs
        if share < 0.1:
            return self.rate * (0.05 + 9.5 * share)
        return self.rate * 0.5 * (1 + math.cos(math.pi * (share - 0.1) / 0.9))


@dataclass(frozen=True, eq=False)
class Teacher:
    """A network whose logits a student is to match (Hinton et al.), beside the labels.

    Attributes:
        network: In eval mode.
        temperature: Of both softmaxes.
        weight: Share of the distillation loss; the labels' loss has the rest.
    """

    network: nn.Module
    temperature: float
    weight: float

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            aim = self.network(images) / self.temperature
        student = (logits / self.temperature).log_softmax(1)
        matched = F.kl_div(student, aim.log_softmax(1), reduction="batchmean", log_target=True)
        scaled = self.weight * self.temperature**2 * matched
        return scaled + (1 - self.weight) * F.cross_entropy(logits, labels)


@dataclass
class Run:
    """A trained network and how it got there.

    Attributes:
        network: On the CPU, in eval mode.
        before: Accuracy in percent on the test images before the first epoch.
        epochs: Of each one: `loss`, `seconds` of training, `test` and `valid` accuracy in percent,
            and what else was measured; without a curve, accuracies of the last one only.
        start: What else was measured before the first epoch.
    """

    network: nn.Module
    before: float = math.nan
    epochs: list[dict[str, float]] = field(default_factory=list)
    start: dict[str, float] = field(default_factory=dict)

    @property
    def after(self) -> float:
        """Accuracy after the last epoch."""
        return self.epochs[-1]["test"] if self.epochs else self.before


Watch = Callable[[str, int, int], None]  # a run's name, epochs done, epochs in all
Measure = Callable[[nn.Module], dict[str, float]]  # a network on the device, in eval mode


class OutOfTime(Exception):
    """The time allowed is over; what was done is kept."""


@dataclass
class Trainer:
    """Trains networks on one data set, keeping each finished epoch in a folder.

    Attributes:
        data: The images.
        folder: Where runs are kept.
        device: `auto`, `cpu` or `cuda`.
        precision: `no`, `fp16` or `bf16`.
        deadline: Value of `time.monotonic()` after which no epoch starts.
        watch: Told how far a run is.

    Raises:
        ArgumentError: If the device is not there.
    """

    data: Images
    folder: Path
    device: str = "auto"
    precision: Literal["no", "fp16", "bf16"] = "no"
    deadline: float = math.inf
    watch: Watch = lambda name, done, of: None

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ArgumentError(
                "no CUDA device",
                where="--device cuda",
                expected="a device that torch sees, and a torch built for it",
                do="leave --device out to use what is there",
            )
        self.accelerator = Accelerator(
            mixed_precision=None if self.precision == "no" else self.precision,
            cpu=self.device == "cpu",
        )
        self.digest = self.data.described()["sha256"]

    # --- one run ------------------------------------------------------------------------------

    def fit(
        self, name: str, start: nn.Module, recipe: Recipe, seed: int,
        teacher: Teacher | None = None, curve: bool = True, measure: Measure | None = None,
    ) -> Run:  # fmt: skip
        """Train a copy of a network, or go on where an earlier run of the same kind stopped.

        Args:
            name: What the run is called while it runs.
            start: Where training starts; not modified.
            recipe: How.
            seed: Of order, crops and flips.
            teacher: What to learn from beside the labels.
            curve: Measure accuracy after every epoch, not after the last one only.
            measure: What else to measure before the first epoch and after each; the same for all
                runs of a kind.

        Raises:
            OutOfTime: If the deadline passes before the last epoch.
            DataError: If what is kept of the run cannot be read.
        """
        kind = "" if curve else "-last"
        kind += "-measured" if measure else ""
        path = self.folder / f"{self.fingerprint(start, recipe, seed, teacher)}{kind}.pt"
        network = copy.deepcopy(start).to(self.accelerator.device)
        network = network.to(memory_format=torch.channels_last)
        run, kept = Run(network), self._kept(path)
        if kept is not None:
            network.load_state_dict(kept["network"])
            run.before, run.epochs = kept["before"], kept["epochs"]
            run.start = kept.get("start", {})
        if len(run.epochs) < recipe.epochs:
            self._train(name, run, recipe, seed, teacher, curve, measure, path, kept)
        # What was prepared for training casts its inputs and outputs: the state alone is returned.
        state, run.network = run.network.state_dict(), copy.deepcopy(start).cpu()
        run.network.load_state_dict(state)
        run.network.eval()
        return run

    def _train(self, name, run, recipe, seed, teacher, curve, measure, path, kept) -> None:
        inner = run.network
        optimiser = torch.optim.SGD(
            inner.parameters(), recipe.rate, recipe.momentum, weight_decay=recipe.decay
        )
        network, optimiser = self.accelerator.prepare(inner, optimiser)
        if kept is not None:
            optimiser.load_state_dict(kept["optimiser"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(kept["scaler"])
        else:
            run.before = self.accuracy(network, self.data.test)
            run.start = self._measured(measure, inner)
        if teacher is not None:
            own = copy.deepcopy(teacher.network).to(self.accelerator.device).eval()
            teacher = replace(teacher, network=own)
        while len(run.epochs) < recipe.epochs:
            done = len(run.epochs)
            self.watch(name, done, recipe.epochs)
            if self._is_late():
                raise OutOfTime
            begin = time.perf_counter()
            loss = self._epoch(network, optimiser, recipe, seed, done, teacher)
            row = {"loss": loss, "seconds": time.perf_counter() - begin}
            last = done + 1 == recipe.epochs
            for part in ("valid", "test") if curve or last else ():
                row[part] = self.accuracy(network, getattr(self.data, part))
            row |= self._measured(measure, inner)
            run.epochs.append(row)
            self._keep(path, inner, optimiser, run, last)
            self.accelerator.wait_for_everyone()  # nobody looks for the file before it is whole
        self.watch(name, recipe.epochs, recipe.epochs)

    @torch.no_grad()
    def _measured(self, measure: Measure | None, network: nn.Module) -> dict[str, float]:
        if measure is None:
            return {}
        network.eval()
        return measure(network)

    def _is_late(self) -> bool:
        """Tell whether the deadline has passed for any process, so that all stop together."""
        late = torch.tensor(int(time.monotonic() > self.deadline), device=self.accelerator.device)
        return bool(self.accelerator.reduce(late, "sum"))

    def _epoch(self, network, optimiser, recipe, seed, epoch, teacher) -> float:
        torch.manual_seed(seed * 100_003 + epoch)  # for layers that draw
        network.train()
        count = max(1, len(self.data.train) // recipe.batch)
        losses = []
        for step, (images, labels) in enumerate(self.batches(recipe.batch, seed, epoch)):
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate_at(epoch + min(step / count, 0.999))
            with self.accelerator.autocast():
                logits = network(images)
                if teacher is None:
                    loss = F.cross_entropy(logits, labels)
                else:
                    loss = teacher.loss(logits, images, labels)
            optimiser.zero_grad()
            self.accelerator.backward(loss)
            if recipe.clip is not None:
                self.accelerator.clip_grad_norm_(network.parameters(), recipe.clip)
            optimiser.step()
            losses.append(loss.detach())
        return float(self.accelerator.reduce(torch.stack(losses).mean(), "mean"))

    def batches(self, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of the batches of one epoch, on the device.

        The images that do not fill a last batch are left to another epoch's order.
        """
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(len(self.data.train), generator=generator)
        here = self.accelerator.process_index, self.accelerator.num_processes
        for rows in order.split(size):
            if len(rows) < size <= len(order):
                return
            images = self.data.train.images[rows].to(self.accelerator.device)
            images = self.data.inputs(augmented(images, generator)[here[0] :: here[1]])
            labels = self.data.train.labels[rows][here[0] :: here[1]]
            yield (
                images.contiguous(memory_format=torch.channels_last),
                labels.to(self.accelerator.device),
            )

    @torch.no_grad()
    def accuracy(self, network: nn.Module, split: Split, size: int = 500) -> float:
        """Return the share of right answers in percent, in eval mode."""
        network.eval()
        device = self.accelerator.device
        right = torch.zeros((), dtype=torch.long, device=device)
        here = self.accelerator.process_index, self.accelerator.num_processes
        for rows in torch.arange(len(split)).split(size):
            part = split.part(rows[here[0] :: here[1]])
            images = self.data.inputs(part.images.to(device))
            with self.accelerator.autocast():
                logits = network(images.contiguous(memory_format=torch.channels_last))
            right += (logits.argmax(1).cpu() == part.labels).sum().to(device)
        return 100.0 * float(self.accelerator.reduce(right, "sum")) / len(split)

    # --- what is kept -------------------------------------------------------------------------

    def fingerprint(
        self, start: nn.Module, recipe: Recipe, seed: int, teacher: Teacher | None
    ) -> str:
        """Return what a run depends on, as one name: start, recipe, seed, data, teacher."""
        parts = [state_digest(start), json.dumps(asdict(recipe)), str(seed), self.digest]
        parts += [self.precision, str(self.accelerator.num_processes)]
        if teacher is not None:
            parts += [state_digest(teacher.network), str((teacher.temperature, teacher.weight))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]

    def _kept(self, path: Path) -> dict | None:
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise DataError(
                f"a kept run that cannot be read: {str(error).splitlines()[0]}",
                where=str(path),
                expected="a file that this program wrote",
                do="remove the file; the run starts again",
            ) from error

    def _keep(self, path: Path, network: nn.Module, optimiser, run: Run, last: bool) -> None:
        if not self.accelerator.is_main_process:
            return
        kept = {"network": network.state_dict(), "before": run.before, "epochs": run.epochs}
        kept["start"] = run.start
        if not last:
            kept["optimiser"] = optimiser.state_dict()
            if self.accelerator.scaler is not None:
                kept["scaler"] = self.accelerator.scaler.state_dict()
        write_atomically(path, lambda temporary: torch.save(kept, temporary))


def state_digest(network: nn.Module) -> str:
    """Return a digest of the names, types and values of a network's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
