"""What the experiments with training share: scales, parents, command line, records.

Every script answers one question of the CLAFusion paper (Nguyen et al., Model Fusion of
Heterogeneous Neural Networks via Cross-Layer Alignment) for a pair of networks:

    resnet        ResNet-34 (A) and ResNet-18 (B) with BatchNorm
    resnet-plain  the same without norms, as in the paper
    resnet-half   ResNet-34 and ResNet-18 of half the width, without norms: teacher and student
    vgg           VGG-13 of double and VGG-11 of half the width, without norms: teacher and student
    cifar         He et al.'s ResNet-32 (A) and ResNet-20 (B), at every scale as wide as they are:
                  for networks trained elsewhere, `--parents A.safetensors B.safetensors`

and of small networks, the same at every scale, for a thread and not an accelerator:

    resnet14        ResNet-14 (A) and ResNet-8 (B) of width 16 with BatchNorm
    resnet14-plain  the same without norms
    vgg8            VGG-8 of double and VGG-5 of half the width, without norms: teacher and student

    python examples/SCRIPT.py [--pairs resnet ...] [--scale tiny|cpu|small|paper] [--seeds 0 1 2]
                              [--data folder:PATH | cifar10:PATH | cifar100:PATH]
                              [--device cpu|cuda] [--precision bf16] [--minutes 10]

Several processes: `accelerate launch examples/SCRIPT.py ...`. Finished epochs are kept under
`--work`; a run that was interrupted, or that stopped after `--minutes`, goes on when the command is
given again. One JSON per seed goes to `--results`, and a table and a plot of all found there.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal

import results
import torch
from accelerate import PartialState
from harness import Measure, OutOfTime, Recipe, Run, Teacher, Trainer, Watch
from images import Images, load
from networks import CifarResNet, Vgg
from records import hardware
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import fxfuse
from fxfuse._files import write_text
from fxfuse.errors import ArgumentError, FuseError
from fxfuse.io import load_weights

RESULTS = Path(__file__).resolve().parent / "results"
FEW, MANY = 200, 1000  # samples of the papers' methods, and of the default


# --- scales -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How large networks, images and schedules are.

    Attributes:
        divisor: Of all widths.
        small_images: Height and width for networks that halve their images three times at most.
        counts: Images to train on, to choose on and to test on; 0 for all.
        train: How each kind of parent is trained.
        tune: How each kind is fine-tuned and distilled.
        distil_epochs: Of each of the many runs of distillation; else they are as those of `tune`.
        maps: How many random maps are averaged.
        rates: Learning rates to choose from for `tune`, on images held out; none: its own.
        area: Whether images are made smaller by means of areas.
        longer: How many times as long the runs are that ask what more training changes.
        precision: Of training, where the command line says none.
        temperatures: Of distillation.
        shares: Of the distillation loss.
    """

    divisor: int
    small_images: int
    counts: tuple[int, int, int]
    train: dict[str, Recipe]
    tune: dict[str, Recipe]
    distil_epochs: int
    maps: int
    rates: tuple[float, ...] = ()
    area: bool = False
    longer: int = 10
    precision: Literal["no", "fp16", "bf16"] = "no"
    temperatures: tuple[float, ...] = (20, 10, 8, 4, 1)
    shares: tuple[float, ...] = (0.05, 0.1, 0.5, 0.7, 0.95, 0.99)


_RESNET = Recipe(300, 0.1, 256, 1e-4, cuts=(150, 250))
_RESNET_TUNE = Recipe(120, 0.1, 256, 1e-4, cuts=(20, 40, 60, 80, 100), factor=2)
_VGG = Recipe(300, 0.05, 128, 5e-4, cuts=tuple(range(30, 300, 30)), factor=2)
_VGG_TUNE = replace(_VGG, epochs=120, rate=0.01, cuts=(20, 40, 60, 80, 100))
_CIFAR = Recipe(200, 0.1, 128, 1e-4, cuts=(100, 150))  # of He et al.'s networks

# For one thread and a few hours: parents by one cycle, each start by the paper's schedule (halved
# after every sixth of its 120 epochs) at a twentieth of its length.
_CPU = Scale(
    divisor=4,
    small_images=16,
    counts=(0, 5000, 0),
    train={
        "normed": Recipe(20, 0.1, 128, 5e-4),
        "resnet": Recipe(20, 0.05, 128, 5e-4, clip=1.0),
        "vgg": Recipe(20, 0.05, 128, 5e-4, clip=1.0),
        "cifar": Recipe(20, 0.1, 128, 5e-4),
    },
    tune={
        "normed": Recipe(6, 0.03, 128, 5e-4, cuts=(1, 2, 3, 4, 5), factor=2),
        "resnet": Recipe(6, 0.03, 128, 5e-4, cuts=(1, 2, 3, 4, 5), factor=2, clip=1.0),
        "vgg": Recipe(6, 0.03, 128, 5e-4, cuts=(1, 2, 3, 4, 5), factor=2, clip=1.0),
        "cifar": Recipe(6, 0.03, 128, 5e-4, cuts=(1, 2, 3, 4, 5), factor=2),
    },
    rates=(0.1, 0.03, 0.01),
    distil_epochs=4,
    maps=1,
    area=True,
    precision="bf16",
    shares=(0.1, 0.7),
)
_CONSTANT = {kind: replace(recipe, cuts=()) for kind, recipe in _CPU.tune.items()}

SCALES = {
    "tiny": Scale(
        divisor=8,
        small_images=16,
        counts=(4000, 1000, 2000),
        train={
            "normed": Recipe(24, 0.1, 64, 5e-4),
            "resnet": Recipe(24, 0.2, 64, 5e-4, clip=1.0),
            "vgg": Recipe(24, 0.05, 64, 5e-4, clip=1.0),
            "cifar": Recipe(24, 0.1, 64, 5e-4),
        },
        tune={
            "normed": Recipe(2, 0.01, 64, 5e-4),
            "resnet": Recipe(2, 0.01, 64, 5e-4, clip=1.0),
            "vgg": Recipe(2, 0.01, 64, 5e-4, clip=1.0),
            "cifar": Recipe(1, 0.003, 64, 5e-4),
        },
        distil_epochs=1,
        maps=1,
        shares=(0.1, 0.7),
    ),
    "cpu": _CPU,
    "cpu-constant": replace(_CPU, tune=_CONSTANT, rates=(0.003, 0.001)),
    "small": Scale(
        divisor=1,
        small_images=32,
        counts=(0, 2000, 0),
        train={
            "normed": Recipe(30, 0.2, 256, 5e-4),
            "resnet": Recipe(30, 0.1, 256, 5e-4, clip=1.0),
            "vgg": Recipe(30, 0.05, 128, 5e-4, clip=1.0),
            "cifar": Recipe(30, 0.1, 128, 5e-4),
        },
        tune={
            "normed": Recipe(12, 0.05, 256, 5e-4),
            "resnet": Recipe(12, 0.03, 256, 5e-4, clip=1.0),
            "vgg": Recipe(12, 0.02, 128, 5e-4, clip=1.0),
            "cifar": Recipe(12, 0.02, 128, 5e-4),
        },
        distil_epochs=4,
        maps=2,
        shares=(0.05, 0.5, 0.95),
    ),
    "paper": Scale(
        divisor=1,
        small_images=32,
        counts=(0, 1, 0),
        train={"normed": _RESNET, "resnet": _RESNET, "vgg": _VGG, "cifar": _CIFAR},
        tune={
            "normed": _RESNET_TUNE,
            "resnet": _RESNET_TUNE,
            "vgg": _VGG_TUNE,
            "cifar": _RESNET_TUNE,
        },
        distil_epochs=120,
        maps=5,
    ),
}  # fmt: skip


# --- pairs of networks ------------------------------------------------------------------------

Build = Callable[..., nn.Module]  # called with `classes`


@dataclass(frozen=True)
class Pair:
    """Two networks of one family: A is the deeper one, B the shallower one."""

    first: Callable[[int, int], nn.Module]  # from divisor and number of classes
    second: Callable[[int, int], nn.Module]
    recipe: str
    halvings: int

    def size(self, scale: Scale) -> int:
        return scale.small_images if self.halvings <= 3 else 32


def _resnet(blocks: Sequence[int], width: int, norm: bool, divisor: int, classes: int) -> nn.Module:
    return CifarResNet(blocks, max(4, width // divisor), "conv", norm, classes)


def _cifar(blocks: int, divisor: int, classes: int) -> nn.Module:
    return CifarResNet([blocks] * 3, classes=classes)


def _slim(blocks: int, norm: bool, divisor: int, classes: int) -> nn.Module:
    return CifarResNet([blocks] * 3, 16, "conv", norm, classes)


def _short(plan: Sequence[int], divisor: int, classes: int) -> nn.Module:
    return Vgg(plan, norm=False, classes=classes)


def _vgg(plan: Sequence[int], divisor: int, classes: int) -> nn.Module:
    return Vgg([width // divisor for width in plan], norm=False, classes=classes)


_34, _18 = (3, 4, 6, 3), (2, 2, 2, 2)
_13 = (64, 128, 0, 256, 256, 0, 512, 512, 0, 1024, 1024, 0, 1024, 512, 0)
_11 = (64, 0, 64, 0, 128, 128, 0, 256, 256, 0, 256, 512, 0)
_8 = (32, 32, 0, 64, 64, 0, 128, 128, 128, 0)
_5 = (16, 0, 32, 0, 64, 64, 0)
PAIRS = {
    "resnet": Pair(partial(_resnet, _34, 64, True), partial(_resnet, _18, 64, True), "normed", 3),
    "resnet-plain": Pair(
        partial(_resnet, _34, 64, False), partial(_resnet, _18, 64, False), "resnet", 3
    ),
    "resnet-half": Pair(
        partial(_resnet, _34, 64, False), partial(_resnet, _18, 32, False), "resnet", 3
    ),
    "vgg": Pair(partial(_vgg, _13), partial(_vgg, _11), "vgg", 5),
    "cifar": Pair(partial(_cifar, 5), partial(_cifar, 3), "cifar", 5),
    "resnet14": Pair(partial(_slim, 2, True), partial(_slim, 1, True), "normed", 2),
    "resnet14-plain": Pair(partial(_slim, 2, False), partial(_slim, 1, False), "resnet", 2),
    "vgg8": Pair(partial(_short, _8), partial(_short, _5), "vgg", 3),
}


@dataclass
class Lab:
    """One pair at one scale with one seed: its data, its parents, and what is done to them."""

    pair: Pair
    scale: Scale
    seed: int
    trainer: Trainer
    checkpoints: Sequence[Path] = ()

    @property
    def data(self) -> Images:
        return self.trainer.data

    @cached_property
    def first(self) -> Run:
        """A, trained."""
        return self.parent(0, self.seed)

    @cached_property
    def second(self) -> Run:
        """B, trained."""
        return self.parent(1, self.seed)

    def untrained(self, which: int, seed: int) -> nn.Module:
        """Return A (0) or B (1) with random weights."""
        torch.manual_seed(1000 * seed + which)
        build = (self.pair.first, self.pair.second)[which]
        return build(self.scale.divisor, self.data.classes)

    def parent(self, which: int, seed: int) -> Run:
        """Return A (0) or B (1), trained here or with the weights of a file."""
        network, name = self.untrained(which, seed), "AB"[which]
        if self.checkpoints:
            if seed != self.seed:
                raise ArgumentError(
                    "one A and one B, and a question that asks for more",
                    where="--parents",
                    expected="a question about two networks",
                    do="leave --parents out; the networks are trained here",
                )
            load_weights(network, self.checkpoints[which])
            return Run(network.eval(), self.score(network))
        recipe = self.scale.train[self.pair.recipe]
        return self.trainer.fit(f"train {name}, seed {seed}", network, recipe, seed, curve=False)

    @cached_property
    def recipe(self) -> Recipe:
        """How every start is trained on.

        Where the scale has rates to choose from, the one that is best for B on the images held out:
        the B of seed 0, so that all seeds are trained alike.
        """
        recipe, best = self.scale.tune[self.pair.recipe], -math.inf
        for rate in self.scale.rates:
            tried, start = replace(self.scale.tune[self.pair.recipe], rate=rate), self._chooser
            run = self.trainer.fit(f"B at rate {rate:g}", start, tried, 0, curve=False)
            if run.epochs[-1]["valid"] > best:
                recipe, best = tried, run.epochs[-1]["valid"]
        return recipe

    @cached_property
    def _chooser(self) -> nn.Module:
        return (self.second if self.checkpoints else self.parent(1, 0)).network

    def tune(self, name: str, start: nn.Module, measure: Measure | None = None) -> Run:
        """Train on from a start, with the same budget for all."""
        label = f"{name}, seed {self.seed}"
        return self.trainer.fit(label, start, self.recipe, self.seed, measure=measure)

    def tune_long(self, name: str, start: nn.Module) -> Run:
        """Train on from a start for several times as long, by the same schedule stretched."""
        recipe, times = self.recipe, self.scale.longer
        cuts = None if recipe.cuts is None else tuple(times * cut for cut in recipe.cuts)
        longer = replace(recipe, epochs=times * recipe.epochs, cuts=cuts)
        return self.trainer.fit(f"{name}, longer, seed {self.seed}", start, longer, self.seed)

    def distil(self, name: str, start: nn.Module, teacher: Teacher) -> Run:
        """Train on from a start with a teacher."""
        recipe = replace(self.recipe, epochs=self.scale.distil_epochs)
        label = f"{name}, seed {self.seed}"
        return self.trainer.fit(label, start, recipe, self.seed, teacher)

    def score(self, network: nn.Module) -> float:
        """Return the accuracy on the test images."""
        moved = copy.deepcopy(network).to(self.trainer.accelerator.device)
        return self.trainer.accuracy(moved, self.data.test)

    def ensemble(self, networks: Sequence[nn.Module]) -> float:
        """Return the accuracy of the mean of the networks' probabilities."""
        return self.score(Ensemble(networks))

    def inputs(self, count: int) -> Tensor:
        """Return unlabelled training images for a fusion."""
        return self.data.calibration(count, self.seed).to(self.trainer.accelerator.device)

    def fuse(
        self, method: Callable[..., nn.Module], networks: Iterable[nn.Module], count: int = FEW,
        **options: Any,
    ) -> nn.Module:  # fmt: skip
        """Fuse on the device, return on the CPU."""
        device = self.trainer.accelerator.device
        here = [copy.deepcopy(n).to(device) for n in networks]
        return method(here, self.inputs(count), **options).cpu()


class Ensemble(nn.Module):
    """The mean of several networks' probabilities."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return sum(n(x).softmax(1) for n in self.networks) / len(self.networks)


# --- records ----------------------------------------------------------------------------------


def row(name: str, run: Run, **more: Any) -> dict[str, Any]:
    """Return one row of a record: a start, and what training made of it."""
    found = {"name": name, "parameters": sum(p.numel() for p in run.network.parameters())}
    found |= {"before": run.before, "after": run.after} | more
    found |= {"start": run.start} if run.start else {}
    return found | {"epochs": [{k: round(v, 4) for k, v in e.items()} for e in run.epochs]}


@dataclass(frozen=True)
class Question:
    """What one script asks.

    Attributes:
        name: Of the records.
        pairs: Which pairs it is asked of, by default.
        rows: From a lab to the rows of a record.
        title: Of the table.
        table: From records of one pair and scale to Markdown.
        picture: Draws those records to a file.
    """

    name: str
    pairs: Sequence[str]
    rows: Callable[[Lab], list[dict[str, Any]]]
    title: str
    table: results.Table
    picture: results.Picture = results.draw


def options(about: str) -> argparse.ArgumentParser:
    """Return the options of every experiment."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--scale", choices=list(SCALES), default="tiny")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", help="folder:PATH, cifar10:PATH or cifar100:PATH")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fxfuse-runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--precision", choices=["no", "fp16", "bf16"], help="the scale's own if not given"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after as many")
    parser.add_argument(
        "--parents", nargs=2, type=Path, default=(), metavar="FILE", help="checkpoints of A and B"
    )
    return parser


def main(question: Question, arguments: Sequence[str] | None = None) -> None:
    """Run a question for every pair and seed; write the records, then the tables of all records."""
    parser = options(question.title)
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(question.pairs))
    args = parser.parse_args(arguments)
    try:
        with Progress(console=Console(stderr=True), transient=True) as bars:
            _run_all(question, args, _watch(bars))
    except FuseError as error:
        sys.exit(_said(error))
    except OutOfTime:
        sys.exit(_stopped(f"stopped after {args.minutes:g} minutes", 3))
    except KeyboardInterrupt:
        sys.exit(_stopped("interrupted", 130))


def _said(error: FuseError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _stopped(how: str, code: int) -> int:
    print(f"{how}; the same command goes on from the last finished epoch", file=sys.stderr)
    return code


def _watch(bars: Progress) -> Watch:
    tasks: dict[str, Any] = {}

    def watch(name: str, done: int, of: int) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=of)
        bars.update(tasks[name], completed=done, visible=done < of)

    return watch


def _circumstances(lab: Lab) -> dict[str, Any]:
    """Return what the figures of a record rest on."""
    return {
        "recipes": {"train": asdict(lab.scale.train[lab.pair.recipe]), "tune": asdict(lab.recipe)},
        "parents": [path.name for path in lab.checkpoints],
        "data": lab.data.described(),
        "versions": {"fxfuse": fxfuse.__version__, "torch": torch.__version__},
        "hardware": hardware() | {"precision": lab.trainer.precision},
    }


def trainers(args: argparse.Namespace, watch: Watch) -> Callable[[str], Trainer]:
    """Return what gives the trainer of a pair; pairs of one size of images share one."""
    deadline, scale = time.monotonic() + 60 * args.minutes, SCALES[args.scale]

    @cache
    def of_size(size: int) -> Trainer:
        with PartialState(cpu=args.device == "cpu").main_process_first():
            data = load(args.data, size, args.work, scale.counts, scale.area)
        precision = args.precision or scale.precision
        return Trainer(data, args.work, args.device, precision, deadline, watch)

    return lambda pair: of_size(PAIRS[pair].size(scale))


def answer(
    question: Question, pair: str, seed: int, trainer: Trainer, args: argparse.Namespace
) -> None:
    """Run a question for one pair and seed, and write its record."""
    start, worked = time.perf_counter(), time.process_time()
    lab = Lab(PAIRS[pair], SCALES[args.scale], seed, trainer, args.parents)
    rows = question.rows(lab)
    if not lab.trainer.accelerator.is_main_process:
        return
    record = {
        "question": question.name,
        "pair": pair,
        "scale": args.scale,
        "seed": seed,
        "rows": rows,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time() - worked, 1),
    }
    record |= _circumstances(lab)
    path = args.results / record_name(question, pair, args.scale, seed)
    write_text(path, json.dumps(record, indent=1) + "\n")
    print(f"{path.name}: {record['wall_seconds']} s", flush=True)


def record_name(question: Question, pair: str, scale: str, seed: int) -> str:
    """Return the file of a record."""
    return f"{question.name}-{pair}-{scale}-seed{seed}.json"


def show(question: Question, folder: Path) -> None:
    """Write and print the tables of all records of a question."""
    if not PartialState().is_main_process:
        return
    asked = question.name, question.title, question.table, question.picture
    for path in results.render(folder, *asked):
        print(path.read_text() if path.suffix == ".md" else path)


def _run_all(question: Question, args: argparse.Namespace, watch: Watch) -> None:
    trainer_of = trainers(args, watch)
    for pair in args.pairs:
        for seed in args.seeds:
            answer(question, pair, seed, trainer_of(pair), args)
    show(question, args.results)
