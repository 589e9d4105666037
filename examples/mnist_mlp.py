"""The CLAFusion paper's MNIST networks: its tables 9, 10 and 13 beside its own code's figures.

Table 9 aligns networks of five and three hidden layers by three layer representations under four
constraint settings; table 10 fuses them along each of the ten increasing maps by three ways of
balancing; table 13 transfers a skill between a specialist for one digit and a generalist, at eleven
weights. The given networks are those that the paper's code was run on (see the READMEs of
../shared); `--train` trains others by its recipe and compares with the paper's means instead.

    python examples/mnist_mlp.py [--train SEEDS] [--data FOLDER] [--tables 9 10 13]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from networks import SHARED, accuracy, mlp, predict
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.datasets import MNIST

import fxfuse
from fxfuse.alignment import Wasserstein, linear_cka, neuron_counts
from fxfuse.alignment.aligners import Monotone
from fxfuse.coupling import LayerByLayer, View
from fxfuse.depth import Deepen, Shorten, average_of_signs, sign_of_sum
from fxfuse.presets import best, clafusion

FOLDER = SHARED / "checkpoints/mnist_mlp"
DEEP, SHALLOW = (784, 400, 200, 100, 50, 25, 10), (784, 400, 200, 100, 10)
SPECIALIST, GENERALIST = (784, 400, 200, 100, 10), (784, 400, 200, 100, 50, 10)
OFFICIAL = json.loads(Path(__file__).with_name("official_mnist.json").read_text())
COSTS = {"neurons": neuron_counts, "1 - CKA": linear_cka, "Wasserstein": Wasserstein()}
CONSTRAINTS = {
    "both": Monotone(),
    "last": Monotone(first=False),
    "first": Monotone(last=False),
    "none": Monotone(first=False, last=False),
}
METHODS = {  # the inserted identity in front of an unmatched first layer clips its input
    "add": replace(clafusion, balancing=Deepen(approximate=True)),
    "merge_sum": replace(clafusion, balancing=Shorten(gate=sign_of_sum)),
    "merge_avg": replace(clafusion, balancing=Shorten(gate=average_of_signs)),
}
WEIGHTS = [w / 10 for w in range(11)]


# --- networks and images ----------------------------------------------------------------------


def pixels(images: Tensor) -> Tensor:
    """Return images as the networks of tables 9 and 10 take them: normalised and flat."""
    return ((images.float() / 255 - 0.1307) / 0.3081).flatten(1)


@dataclass(frozen=True)
class Pair:
    """Two networks, the samples they are fused on, and which of the published seeds they are."""

    nets: list[nn.Module]
    samples: Tensor
    seed: int | None


def given(kind: str, sizes: tuple, train: MNIST) -> Iterator[Pair]:
    """Yield the networks and samples that the paper's code was run on."""
    known = np.load(FOLDER / "samples_and_splits.npz")
    for seed in range(3):
        nets = [mlp(*s) for s in sizes]
        for net, letter in zip(nets, "AB"):
            net.load_state_dict(load_file(FOLDER / f"{kind}_seed{seed}_{letter}.safetensors"))
        if kind == "depth":
            yield Pair(nets, pixels(train.data[known["depth_samples"]]), seed)
        else:  # these were trained on raw pixels
            own = known[f"skill_seed{seed}_personal_train_idx"][known["skill_sample_positions"]]
            yield Pair(nets, train.data[own].float().flatten(1), seed)


def fresh(kind: str, sizes: tuple, train: MNIST, seeds: int) -> Iterator[Pair]:
    """Train pairs by the recipe of the paper's code, both networks from one seed.

    Its specialists and generalists take raw pixels, 0 to 255, on which some seeds diverge. Here
    they take a 255th of that, the same function of a network without biases, at a larger rate.
    """
    for seed in range(seeds):
        depth = kind == "depth"
        x, rate = (pixels(train.data), 0.01) if depth else (train.data.flatten(1) / 255, 0.05)
        parts = [torch.arange(len(x))] * 2
        if kind == "skill":
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            digits = train.targets[order]
            four, rest = order[digits == 4], order[digits != 4]
            tenth = -(-len(rest) // 10)
            parts = [torch.cat([four, rest[:tenth]]), rest[tenth:]]
        nets = [trained(s, x[p], train.targets[p], seed, rate) for s, p in zip(sizes, parts)]
        count = 200 if depth else 400
        chosen = torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(21))[:count]
        yield Pair(nets, x[parts[0][chosen]], None)


def trained(
    sizes: tuple, x: Tensor, y: Tensor, seed: int, rate: float, epochs: int = 10
) -> nn.Module:
    torch.manual_seed(seed)
    net = mlp(*sizes)
    optimiser = torch.optim.SGD(net.parameters(), rate, 0.5)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()
    return net


# --- tables -----------------------------------------------------------------------------------


def table9(pairs: list[Pair]) -> None:
    print("\nTable 9: the layers of the deep network that the shallow one's take")
    print("(from the code's run on the given networks in brackets; the paper: 1,2,5 / 1,2,3)\n")
    print("| representation | constraints | " + " | ".join(map(name, pairs)) + " |")
    print("| --- | --- |" + " --- |" * len(pairs))
    for label, cost in COSTS.items():
        shown = [
            fxfuse.align(p.nets, p.samples, method=replace(best, layer_cost=cost)) for p in pairs
        ]
        for which, aligner in CONSTRAINTS.items():
            cells = []
            for pair, alignment in zip(pairs, shown):
                rows = aligner(np.array(alignment.segments[0].costs[1]))
                cell = ",".join(str(r + 1) for r in rows)
                known = OFFICIAL["table9"][label][which]
                cells.append(cell if pair.seed is None else f"{cell} ({known[pair.seed]})")
            print(f"| {label} | {which} | " + " | ".join(cells) + " |")


def name(pair: Pair) -> str:
    return "trained" if pair.seed is None else f"seed {pair.seed}"


def table10(pairs: list[Pair], x: Tensor, y: Tensor) -> None:
    print("\nTable 10: accuracy of the fused network, weights 0.5, 200 samples, no training")
    print(f"({len(y)} test images; the code's figure on the same network in brackets)\n")
    print("| mapping | balancing | " + " | ".join(map(name, pairs)) + " | mean | paper |")
    print("| --- | --- |" + " --- |" * (len(pairs) + 2))
    for rows in combinations(range(1, 6), 3):
        for label, method in METHODS.items():
            key = ",".join(map(str, rows))
            known, found = OFFICIAL["table10"][key][label], []
            for pair in pairs:
                mapping = [[(f"fc{r}", f"fc{i + 1}") for i, r in enumerate(rows)]]
                alignment = fxfuse.align(pair.nets, pair.samples, pairs=mapping)
                fused = method(pair.nets, pair.samples, alignment=alignment)
                found.append(accuracy(predict(fused, x), y))
            print(f"| {key} | {label} | {line(pairs, found, known['seeds'])} | {known['paper']} |")
    for label, method in {"best": best}.items():
        found = [accuracy(predict(method(p.nets, p.samples), x), y) for p in pairs]
        print(f"| found | {label} | {line(pairs, found, None)} | |")
    parents(pairs, x, y)


def line(pairs: list[Pair], found: list[float], known: list[float] | None) -> str:
    cells = []
    for pair, value in zip(pairs, found):
        official = "" if known is None or pair.seed is None else f" ({known[pair.seed]:.2f})"
        cells.append(f"{value:.2f}{official}")
    return " | ".join([*cells, f"{statistics.mean(found):.2f}"])


def parents(pairs: list[Pair], x: Tensor, y: Tensor) -> None:
    logits = [[predict(n, x) for n in p.nets] for p in pairs]
    for i, label in enumerate(("A", "B")):
        found = [accuracy(z[i], y) for z in logits]
        print(f"| | network {label} | {line(pairs, found, None)} | |")
    found = [accuracy(sum(v.softmax(1) for v in z), y) for z in logits]
    print(f"| | ensemble | {line(pairs, found, None)} | |")


def table13(pairs: list[Pair], x: Tensor, y: Tensor) -> None:
    print(
        "\nTable 13: skill transfer; accuracy by the weight of the generalist, mean over networks"
    )
    print("(the networks know raw pixels and are tested on normalised ones, as in the code)\n")
    print("| balancing | whose | " + " | ".join(f"{w:.1f}" for w in WEIGHTS) + " |")
    print("| --- | --- |" + " --- |" * len(WEIGHTS))
    skip_last = LayerByLayer(*_choices(clafusion.coupling), view=View(singly=True))
    for label, method in METHODS.items():
        method = replace(method, coupling=skip_last, layer_cost=neuron_counts)
        ours = [transfer(method, p, x, y) for p in pairs]
        known = OFFICIAL["table13"][label]
        seeds = [p.seed for p in pairs if p.seed is not None]
        print(row(label, "ours", np.mean(ours, 0)))
        if seeds:
            official = np.array(known["seeds"])[seeds]
            print(row(label, "code, same networks", official.mean(0)))
            print(row(label, "largest difference", np.abs(np.array(ours) - official).max(0)))
        print(row(label, "paper", known["paper"]))
    print(row("best", "ours", np.mean([transfer(best, p, x, y) for p in pairs], 0)))
    ensembles = [[ensemble(p, w, x, y) for w in WEIGHTS] for p in pairs]
    print(row("ensemble", "", np.mean(ensembles, 0)))


def _choices(coupling: LayerByLayer) -> tuple:
    return coupling.ground_cost, coupling.solver, coupling.maps


def transfer(method: fxfuse.Method, pair: Pair, x: Tensor, y: Tensor) -> list[float]:
    nets = pair.nets[::-1]
    fused = [method(nets, pair.samples, weights=[w, 1 - w]) for w in WEIGHTS]
    return [accuracy(predict(f, x), y) for f in fused]


def ensemble(pair: Pair, weight: float, x: Tensor, y: Tensor) -> float:
    specialist, generalist = (predict(n, x).softmax(1) for n in pair.nets)
    return accuracy((1 - weight) * specialist + weight * generalist, y)


def row(label: str, whose: str, values: np.ndarray) -> str:
    return f"| {label} | {whose} | " + " | ".join(f"{v:.2f}" for v in values) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=int, metavar="SEEDS", help="train pairs of this many seeds")
    parser.add_argument("--data", type=Path, help="where MNIST is, or is to go")
    parser.add_argument("--tables", nargs="*", type=int, default=[9, 10, 13])
    args = parser.parse_args()
    folder, load = args.data or SHARED / "data", args.data is not None
    train, test = (MNIST(folder, train=t, download=load) for t in (True, False))
    x, y = pixels(test.data), test.targets

    def networks(kind: str, *sizes: tuple) -> list[Pair]:
        found = fresh(kind, sizes, train, args.train) if args.train else given(kind, sizes, train)
        return list(found)

    if {9, 10} & set(args.tables):
        depth = networks("depth", DEEP, SHALLOW)
        if 9 in args.tables:
            table9(depth)
        if 10 in args.tables:
            table10(depth, x, y)
    if 13 in args.tables:
        table13(networks("skill", SPECIALIST, GENERALIST), x, y)


if __name__ == "__main__":
    main()
