"""What fusion reaches before any training, beside the parents, their ensemble and distillation.

Nothing here sees a label before the test images are counted: fusion and distillation get the same
unlabelled training images, and distillation of the ensemble into the better parent as much wall
time as `fuse` with its defaults took (`training.distil` says how). Better is the parent that does
better on the test images, which favours this baseline.

    python examples/one_shot.py [--tables cifar width ablation presets trained mnist]
                                [--images FOLDER] [--cache FOLDER] [--curve curve.png]
                                [--groups 32+20 56+32+20] [--pair 32+20] [--methods best auto]
                                [--draws 3] [--samples 1000] [--test-images 3000]
                                [--train-mnist 5] [--records FOLDER]

Tables: `cifar`, He et al.'s ResNets (see cifar_resnet.py); `width`, accuracy against multiply-adds
of one pair, drawn too; `ablation` and `presets`, on that pair; `trained`, pairs of one depth that
are trained here on images of ../shared; `mnist`, the CLAFusion paper's networks (see mnist_mlp.py).
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cifar_resnet as cifar
import mnist_mlp as mnist
import numpy as np
import torch
from networks import SHARED, CifarResNet, Vgg, accuracy, cifar_resnet, predict
from records import write_record
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import MNIST
from training import cached, distil, train

import fxfuse
from fxfuse._files import write_atomically
from fxfuse.coupling import Transport, Zip
from fxfuse.presets import average, best
from fxfuse.refit import LeastSquares, MatchMoments
from fxfuse.solvers import Sinkhorn

GROUPS = ("32+20", "56+20", "56+32+20")
WIDTHS = (1.0, 1.25, 1.5, 1.75, math.inf)
ROWS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "average": ("`average`", average),
    "best": ("`best`, equal weights", best),
    "weighted": ("`best`, weights 0.7 / 0.3", partial(best, weights=[0.7, 0.3])),
    "auto": ('`weights="auto"`', partial(best, weights="auto")),
    "auto-wide": ('`weights="auto", width=1.5`', partial(best, weights="auto", width=1.5)),
    "wide": ("`width=1.5`, equal weights", partial(best, width=1.5)),
}
DISTILLED = "ensemble distilled into the better parent, same time"
ABLATION = {
    "`best`": best,
    "no least squares, moments matched": fxfuse.Method(refit=MatchMoments()),
    "`steps=0`, no corrections behind activations": fxfuse.Method(refit=LeastSquares(steps=0)),
    "`steps=2`": fxfuse.Method(refit=LeastSquares(steps=2)),
    "`ridges=(1e-2,)`, none chosen": fxfuse.Method(refit=LeastSquares(ridges=(1e-2,))),
    "`Transport()`, a full say also where units do not agree": fxfuse.Method(coupling=Transport()),
    "units coupled by `Zip()`": fxfuse.Method(coupling=Zip()),
    "units coupled by `Sinkhorn()`": fxfuse.Method(coupling=Transport(solver=Sinkhorn())),
}
FEWER = (100, 200)  # calibration images, of the draw's first ones
TRAINED: dict[str, Callable[[], nn.Module]] = {
    "vgg": Vgg,
    "resnet8": partial(CifarResNet, [1, 1, 1]),
}


# --- what is measured -------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Networks to fuse, unlabelled inputs of each draw, and test images with labels."""

    nets: list[nn.Module]
    draws: list[Tensor]
    x: Tensor
    y: Tensor
    flips: bool = True

    def score(self, net: nn.Module) -> float:
        return accuracy(predict(net, self.x), self.y)


def ensemble(nets: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Return the mean of the networks' logits."""
    return sum(predict(n, x) for n in nets) / len(nets)


def compare(case: Case, chosen: Sequence[str]) -> dict[str, str]:
    """Return accuracies in words: parents, ensemble, and every chosen row over the draws."""
    return in_words(measured(case, chosen))


def in_words(rows: dict[str, list[float]]) -> dict[str, str]:
    """Return what was measured, with one figure for each parent and one for all draws."""
    parents = ", ".join(f"{value:.1f}" for value in rows["parents"])
    return {name: parents if name == "parents" else words(v) for name, v in rows.items()}


def measured(case: Case, chosen: Sequence[str]) -> dict[str, list[float]]:
    """Return accuracies: of each parent, of the ensemble, and of every chosen row in each draw."""
    parents = [case.score(n) for n in case.nets]
    together = accuracy(ensemble(case.nets, case.x), case.y)
    better = case.nets[parents.index(max(parents))]
    rows = {"parents": parents, "ensemble, mean of logits": [together]}
    for draw, data in enumerate(case.draws):
        seconds: dict[str, float] = {}
        for name in [n for n in ROWS if n in chosen or (n == "best" and "distilled" in chosen)]:
            label, method = ROWS[name]
            if name == "weighted" and len(case.nets) > 2:
                continue
            fused, seconds[name] = timed(method, case.nets, data)
            rows.setdefault(label, []).append(math.nan if fused is None else case.score(fused))
        if "distilled" in chosen:
            student = distil(case.nets, better, data, seconds["best"], case.flips, draw)
            rows.setdefault(DISTILLED, []).append(case.score(student))
            rows.setdefault("that time: `best`, seconds", []).append(seconds["best"])
    return rows


def timed(method: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Return what a method makes, None if it refuses, and its seconds."""
    start = time.perf_counter()
    try:
        made = method(*args)
    except fxfuse.FuseError:  # averaging in place, say, where widths differ
        made = None
    return made, time.perf_counter() - start


def words(found: Sequence[float], digits: int = 1) -> str:
    """Return the mean and spread (population standard deviation) of all draws."""
    if any(map(math.isnan, found)):
        return "refused"
    spread = f" +- {statistics.pstdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{spread}"


def multiply_adds(net: nn.Module, x: Tensor) -> float:
    """Return the millions of multiply-adds of one input, in contractions and attention."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x[:1])
    return counter.get_total_flops() / 2e6


def divergence(logits: Tensor, aim: Tensor) -> float:
    """Return the mean KL divergence of predictions from those aimed at."""
    gap = aim.log_softmax(1) - logits.log_softmax(1)
    return float((aim.softmax(1) * gap).sum(1).mean())


def lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(r)} |" for r in [head, ["---"] * len(head), *rows])


# --- tables -----------------------------------------------------------------------------------


def resnets(group: str, args: argparse.Namespace) -> Case:
    """Return trained CIFAR ResNets of the depths in `32+20`, with all draws."""
    nets = [cifar_resnet(int(depth)) for depth in group.split("+")]
    return on_cifar(nets, args)


def on_cifar(nets: list[nn.Module], args: argparse.Namespace) -> Case:
    seeds = range(1, args.draws + 1)
    draws = [cifar.images(args.images, "train", args.samples, seed)[0] for seed in seeds]
    return Case(nets, draws, *cifar.images(args.images, "test", args.test_images, 0))


def cifar_table(args: argparse.Namespace) -> None:
    print("\n## CIFAR-10 ResNets\n")
    columns = {}
    for group in args.groups:
        rows = measured(resnets(group, args), args.methods)
        columns[named(group)] = in_words(rows)
        record(f"one_shot-cifar-{group}", named(group), [*map(row, rows, rows.values())], args)
    print(cifar.table(columns), flush=True)


def row(name: str, values: list[float], **more: Any) -> dict[str, Any]:
    """Return a row of a record: one value of each draw (of parents: of each)."""
    return {"name": name, **more, "values": [round(value, 2) for value in values]}


def record(name: str, title: str, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write what was measured, and what it depends on, if records are asked for."""
    if args.records is None:
        return
    facts = {"samples": args.samples, "test_images": args.test_images, "draws": args.draws}
    write_record(args.records / f"{name}.json", "one_shot", rows, title=title, **facts)


def named(group: str) -> str:
    return " + ".join(f"ResNet-{depth}" for depth in group.split("+"))


def width_table(args: argparse.Namespace) -> None:
    """Print and draw accuracy against multiply-adds; the parents and the ensemble as points."""
    print(f"\n## Width of {named(args.pair)}, equal weights\n")
    case = resnets(args.pair, args)
    names = [f"ResNet-{depth}" for depth in args.pair.split("+")]
    points = [(n, multiply_adds(p, case.x), case.score(p)) for n, p in zip(names, case.nets)]
    together = accuracy(ensemble(case.nets, case.x), case.y)
    points.append(("ensemble", sum(cost for _, cost, _ in points), together))
    curve = [(w, *at_width(case, w)) for w in args.widths]
    rows = [[name, f"{cost:.1f}", "", f"{value:.1f}"] for name, cost, value in points]
    for width, cost, parameters, found in curve:
        rows.append([f"`width={width}`", f"{cost:.1f}", f"{parameters:,}", words(found)])
    print(lines(["network", "multiply-adds, millions", "parameters", "accuracy in %"], rows))
    kept = [row(name, [value], multiply_adds=round(cost, 1)) for name, cost, value in points]
    for width, cost, parameters, found in curve:
        more = {"multiply_adds": round(cost, 1), "parameters": parameters}
        kept.append(row(f"width={width:g}", found, **more))
    record(f"one_shot-width-{args.pair}", f"Width of {named(args.pair)}", kept, args)
    if args.curve is not None:
        write_atomically(args.curve, partial(draw_curve, points, curve, case))
        print(f"\ndrawn in {args.curve}", flush=True)


def at_width(case: Case, width: float) -> tuple[float, int, list[float]]:
    """Return multiply-adds, parameters and the accuracies of all draws at one width."""
    found = []
    for data in case.draws:
        fused = best(case.nets, data, width=width)
        found.append(case.score(fused))
    return multiply_adds(fused, case.x), sum(p.numel() for p in fused.parameters()), found


def draw_curve(points: list[tuple], curve: list[tuple], case: Case, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    costs, means = [c[1] for c in curve], [statistics.mean(c[3]) for c in curve]
    axes.errorbar(costs, means, [statistics.pstdev(c[3]) for c in curve], marker="o", label="fused")
    for (width, *_), cost, mean, before in zip(curve, costs, means, [0.0, *means]):
        beside = (-5, 6 if mean >= before else -13)  # off the line that comes from the left
        axes.annotate(f"{width:g}", (cost, mean), beside, textcoords="offset points", ha="right")
    for (name, cost, value), marker in zip(points, "^vsDP"):
        axes.plot(cost, value, marker, label=name)
    axes.margins(0.08)
    axes.set_xlabel("multiply-adds per image, millions")
    axes.set_ylabel(f"accuracy in %, {len(case.y):,} test images")
    axes.set_title(f"Fused at widths, no training, {len(case.draws[0]):,} unlabelled images")
    axes.legend()
    figure.savefig(path, dpi=150)


def ablation_table(args: argparse.Namespace) -> None:
    print(f"\n## Ablation, {named(args.pair)}, equal weights\n")
    case = resnets(args.pair, args)
    aim = ensemble(case.nets, case.x)
    tried = [(label, method, args.samples) for label, method in ABLATION.items()]
    tried += [(f"`best`, {n} images", best, n) for n in FEWER if n < args.samples]
    rows = []
    for label, method, count in tried:
        found = []
        for data in case.draws:
            fused, seconds = timed(method, case.nets, data[:count])
            logits = predict(fused, case.x)
            found.append((accuracy(logits, case.y), divergence(logits, aim), seconds))
        values, gaps, seconds = zip(*found)
        rows.append([label, words(values), words(gaps, 3), words(seconds)])
    print(lines(["method", "accuracy in %", "KL to the ensemble", "seconds"], rows), flush=True)


def presets_table(args: argparse.Namespace) -> None:
    print("\n## Every preset, and what it may be followed by\n")
    depths = tuple(int(depth) for depth in args.pair.split("+"))
    options = argparse.Namespace(**{**vars(args), "methods": None, "picture": None})
    found = cifar.compare(depths, options, args.images)
    print(cifar.table({named(args.pair): found}), flush=True)


def trained_table(args: argparse.Namespace) -> None:
    print("\n## Two networks of one depth, trained here\n")
    print(
        f"({args.train_images:,} training images (seed 0), {args.epochs} epochs with flips, seeds"
    )
    print("0 and 1 of weights and order; convolutions of 16, 32 and 64 channels, BatchNorm)\n")
    columns = {}
    chosen = [name for name in args.methods if name != "weighted"]
    for kind in TRAINED:
        nets = [own_network(kind, seed, args) for seed in (0, 1)]
        columns[f"{kind} + {kind}"] = compare(on_cifar(nets, args), chosen)
    print(cifar.table(columns), flush=True)


def own_network(kind: str, seed: int, args: argparse.Namespace) -> nn.Module:
    """Return a network that is trained on CIFAR images unless it is in the cache."""

    def make() -> nn.Module:
        torch.manual_seed(seed)
        data = cifar.images(args.images, "train", args.train_images, 0)
        return train(TRAINED[kind](), *data, args.epochs, seed)

    name = f"{kind}_{args.train_images}_images_{args.epochs}_epochs_seed{seed}.safetensors"
    return cached(args.cache / name, TRAINED[kind](), make)


def mnist_table(args: argparse.Namespace) -> None:
    data = [MNIST(SHARED / "data", train=part) for part in (True, False)]
    depth_table(args, *data)
    skill_table(args, *data)


def depth_table(args: argparse.Namespace, training: MNIST, test: MNIST) -> None:
    print("\n## MNIST MLPs of five and three hidden layers\n")
    print(f"({len(test.data):,} test images; the code's figures: the same networks, 200 images)\n")
    draws = [
        mnist.pixels(training.data[drawn(torch.arange(len(training.data)), args, seed)])
        for seed in range(1, args.draws + 1)
    ]
    columns = {}
    chosen = [name for name in args.methods if name != "weighted"]
    kind = "depth", (mnist.DEEP, mnist.SHALLOW), training
    pairs = mnist.fresh(*kind, args.train_mnist) if args.train_mnist else mnist.given(*kind)
    for seed, pair in enumerate(pairs):
        case = Case(pair.nets, draws, mnist.pixels(test.data), test.targets, flips=False)
        found = compare(case, chosen)
        if pair.seed is None:
            columns[f"trained here, seed {seed}"] = found
        else:
            columns[mnist.name(pair)] = found | known_of(pair.seed)
    print(cifar.table(columns), flush=True)


def known_of(seed: int) -> dict[str, str]:
    """Return what the paper's code reaches on given networks, along the same alignment."""
    known = mnist.OFFICIAL["table10"]["1,2,5"]
    return {
        "the paper's code, adding layers": f"{known['add']['seeds'][seed]:.1f}",
        "the paper's code, merging them": f"{known['merge_sum']['seeds'][seed]:.1f}",
    }


def drawn(positions: Tensor, args: argparse.Namespace, seed: int) -> Tensor:
    """Return a draw of so many of the positions, without replacement."""
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))
    return positions[order[: args.samples]]


def skill_table(args: argparse.Namespace, training: MNIST, test: MNIST) -> None:
    """Print the transfer between a specialist and a generalist by the weight of the latter."""
    print("\n## MNIST skill transfer, mean over networks and draws\n")
    print(
        "(fused on raw pixels of the specialist's own images; the code tests on normalised ones)\n"
    )
    pairs = list(mnist.given("skill", (mnist.SPECIALIST, mnist.GENERALIST), training))
    inputs = {"normalised": mnist.pixels(test.data), "raw": test.data.float().flatten(1)}
    rows = []
    for kind, x in inputs.items():
        redrawn = list(with_samples(pairs, args, training))
        found = [mnist.transfer(best, p, x, test.targets) for p in redrawn]
        rows.append([kind, "`best`", *weighed(found)])
        found = [[mnist.ensemble(p, w, x, test.targets) for w in mnist.WEIGHTS] for p in pairs]
        rows.append([kind, "ensemble, mean of probabilities", *weighed(found)])
    for kind in ("add", "merge_sum", "merge_avg"):
        official = np.array(mnist.OFFICIAL["table13"][kind]["seeds"])[[p.seed for p in pairs]]
        rows.append(["normalised", f"the paper's code, {kind}, 400 images", *weighed(official)])
    head = ["tested on pixels", "method", *(f"{w:.1f}" for w in mnist.WEIGHTS), "mean of the bests"]
    print(lines(head, rows), flush=True)


def weighed(found: Sequence[Sequence[float]]) -> list[str]:
    """Return the mean at each weight, and that of what each pair of networks has at its best."""
    values = np.array(found)
    return [f"{v:.1f}" for v in [*values.mean(0), values.max(1).mean()]]


def with_samples(
    pairs: list[mnist.Pair], args: argparse.Namespace, training: MNIST
) -> Iterator[mnist.Pair]:
    """Yield each pair with every draw of the images that the specialist was trained on."""
    known = np.load(mnist.FOLDER / "samples_and_splits.npz")
    for pair in pairs:
        own = torch.from_numpy(known[f"skill_seed{pair.seed}_personal_train_idx"])
        for seed in range(1, args.draws + 1):
            x = training.data[drawn(own, args, seed)].float().flatten(1)
            yield replace(pair, samples=x)


TABLES = {
    "cifar": cifar_table,
    "width": width_table,
    "ablation": ablation_table,
    "presets": presets_table,
    "trained": trained_table,
    "mnist": mnist_table,
}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    add("--images", type=Path, help="where CIFAR's train/ and test/ are, or are to go")
    add("--cache", type=Path, help="where the networks trained here are kept")
    add("--curve", type=Path, help="a .png, .pdf or .svg for the width curve")
    add("--records", type=Path, help="a folder: write what was measured there, as JSON")
    add("--samples", type=int, default=1000, help="unlabelled images of a draw")
    add("--test-images", type=int, default=3000, help="of CIFAR")
    add("--draws", type=int, default=3)
    add("--groups", nargs="+", default=GROUPS, help="depths, of the table `cifar`")
    add("--pair", default="32+20", help="of the tables `width`, `ablation` and `presets`")
    add("--widths", nargs="+", type=float, default=WIDTHS)
    add("--methods", nargs="+", choices=[*ROWS, "distilled"], default=[*ROWS, "distilled"])
    add("--train-images", type=int, default=10_000, help="of the networks trained here")
    add("--epochs", type=int, default=12)
    add("--train-mnist", type=int, metavar="SEEDS", help="pairs of other depths trained here")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    seeds = ", ".join(map(str, range(1, args.draws + 1)))
    print("Before any training. Accuracy in %, mean +- spread over draws of unlabelled training")
    print(f"images: {args.samples:,} of each seed of {seeds}. Test images of CIFAR:")
    print(f"{args.test_images:,} (seed 0). Threads: {torch.get_num_threads()}")
    with tempfile.TemporaryDirectory() as temporary:
        args.images = args.images or Path(temporary)
        args.cache = args.cache or Path(temporary)
        if set(args.tables) != {"mnist"}:
            cifar.unpacked(args.images)
        for name in args.tables:
            TABLES[name](args)


if __name__ == "__main__":
    main()
