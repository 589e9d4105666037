"""Networks tuned from one checkpoint: their average, the default, and what the default was before.

Small networks are trained on CIFAR-10 images of ../shared, and two copies are tuned: on halves of
other images, on noise against low contrast, or on labels 0 to 4 against 5 to 9 (tested on all ten).

    python examples/siblings.py [FOLDER] [--images FOLDER] [--cache FOLDER] [--seeds 3]
                                [--networks resnet vgg vit] [--tunings halves corruptions labels]
                                [--train 6000] [--tune 3000] [--test-images 3000]

One record for each kind of network and tuning goes to FOLDER (`examples/results` if not given).
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cifar_resnet as cifar
import torch
import torch.nn.functional as F
from networks import CifarResNet, Vgg, accuracy, predict
from one_shot import lines, words
from records import write_record
from torch import Tensor, nn
from training import cached, distil

import fxfuse
from fxfuse.coupling import Transport
from fxfuse.errors import FusionWarning


class Block(nn.Module):
    """Attention and two layers, each behind a norm and beside a skip."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(samples, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(mixed.reshape(samples, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Vit(nn.Module):
    """Patches of 4 pixels, three blocks, the mean over tokens."""

    def __init__(self, width: int = 48, depth: int = 3, heads: int = 4):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


PLAN = (16, 0, 32, 0, 64, 64, 0)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], float, int]] = {  # rate and epochs of training
    "resnet": (lambda: CifarResNet([1, 1, 1]), 0.1, 4),
    "vgg": (lambda: Vgg(PLAN, norm=False), 0.02, 4),
    "vgg with norms": (lambda: Vgg(PLAN), 0.1, 4),
    "vit": (Vit, 0.002, 6),
}


def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.5 * torch.randn(x.shape, generator=generator)


def pale(x: Tensor, generator: torch.Generator) -> Tensor:
    contrast = 0.25 + 0.5 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return (x - x.mean((1, 2, 3), keepdim=True)) * contrast


def same(x: Tensor, generator: torch.Generator) -> Tensor:
    return x


TUNINGS: dict[str, tuple[Callable[[Tensor, torch.Generator], Tensor], ...]] = {
    "halves": (same, same),
    "corruptions": (noisy, pale),
    "labels": (same, same),
}


def part(tuning: str, k: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return what copy `k` is tuned on."""
    if tuning == "halves":
        return x[k::2], y[k::2]
    own = (y < 5) == (k == 0) if tuning == "labels" else torch.ones_like(y, dtype=torch.bool)
    return x[own], y[own]


def train(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    rate: float,
    seed: int,
    change: Callable[[Tensor, torch.Generator], Tensor] = same,
) -> nn.Module:
    """Train with mirrored images and one cycle of the rate; transformers by AdamW."""
    generator = torch.Generator().manual_seed(seed)
    parameters = list(net.train().parameters())
    optimiser: torch.optim.Optimizer = torch.optim.SGD(parameters, rate, 0.9, weight_decay=5e-4)
    if isinstance(net, Vit):
        optimiser = torch.optim.AdamW(parameters, rate)
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.2)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            mirrored = torch.rand(len(rows), generator=generator) < 0.5
            batch = torch.where(mirrored[:, None, None, None], x[rows].flip(-1), x[rows])
            optimiser.zero_grad()
            F.cross_entropy(net(change(batch, generator)), y[rows]).backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimiser.step()
            schedule.step()
    return net.eval()


def siblings(name: str, tuning: str, seed: int, args: argparse.Namespace) -> list[nn.Module]:
    """Return a checkpoint and two networks tuned from it; kept in the cache."""
    make, rate, epochs = NETWORKS[name]
    x, y = args.training
    first, rest = slice(args.train), slice(args.train, args.train + args.tune)

    def base() -> nn.Module:
        torch.manual_seed(seed)
        return train(make(), x[first], y[first], epochs, rate, seed)

    start = cached(args.cache / f"{name}-{seed}.safetensors", make(), base)
    found = [start]
    for k, change in enumerate(TUNINGS[tuning]):
        own = part(tuning, k, x[rest], y[rest])
        copied = copy.deepcopy(start)
        further = partial(train, copied, *own, 2, rate / 5, 10 * seed + k, change)
        path = args.cache / f"{name}-{seed}-{tuning}{k}.safetensors"
        found.append(cached(path, make(), further))
    return found


def tested(nets: Sequence[nn.Module], tuning: str, x: Tensor, y: Tensor) -> float:
    """Return the accuracy of networks together; images are changed as in tuning."""
    generator = torch.Generator().manual_seed(0)
    changes = dict.fromkeys(TUNINGS[tuning])
    found = []
    for change in changes:
        changed = change(x, generator)
        logits = sum(predict(net, changed).log_softmax(1) for net in nets)
        found.append(accuracy(logits, y))
    return sum(found) / len(found)


def calibration(tuning: str, seed: int, args: argparse.Namespace) -> Tensor:
    """Draw unlabelled training images, as many of each kind of change."""
    generator = torch.Generator().manual_seed(100 + seed)
    x = args.training[0]
    rows = torch.randperm(len(x), generator=generator)[: args.samples]
    changes = list(dict.fromkeys(TUNINGS[tuning]))
    parts = [f(p, generator) for f, p in zip(changes, x[rows].chunk(len(changes)))]
    return torch.cat(parts)[torch.randperm(len(rows), generator=generator)]


METHODS: dict[str, Callable[..., nn.Module]] = {
    "average": fxfuse.presets.average,
    "default": fxfuse.presets.best,
    "default, auto": partial(fxfuse.presets.best, weights="auto"),
    "default, fitted": fxfuse.Method(coupling=Transport(agreement=4.0)),
}
#: These are told the checkpoint, as the first of the networks.
OF_CHANGES = {
    "task arithmetic": fxfuse.presets.task_arithmetic,
    "TIES": fxfuse.presets.ties,
}
DISTILLED = "average, distilled"
COLUMNS = ("checkpoint", "better parent", "ensemble", *METHODS, *OF_CHANGES, DISTILLED)


def scored(name: str, tuning: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Return the accuracies of one checkpoint, its siblings, and what is made of them."""
    start, *nets = siblings(name, tuning, seed, args)
    test = partial(tested, tuning=tuning, x=args.test[0], y=args.test[1])
    found = {"checkpoint": test([start]), "better parent": max(test([net]) for net in nets)}
    found["ensemble"] = test(nets)
    data = calibration(tuning, seed, args)
    for label, method in METHODS.items():
        begin = time.perf_counter()
        found[label] = test([method(nets, data)])
        if label == "default":
            seconds = time.perf_counter() - begin
    for label, method in OF_CHANGES.items():
        found[label] = test([method([start, *nets], data)])
    averaged = METHODS["average"](nets, data)
    found[DISTILLED] = test([distil(nets, averaged, data, seconds, flips=True, seed=seed)])
    return found


def record(name: str, tuning: str, args: argparse.Namespace) -> list[str]:
    """Write the record of one kind of network and tuning; return a row of the table."""
    draws = [scored(name, tuning, seed, args) for seed in range(args.seeds)]
    columns = {label: [round(draw[label], 2) for draw in draws] for label in draws[0]}
    rows = [{"name": label, "values": values} for label, values in columns.items()]
    facts = {"network": name, "tuning": tuning, "draws": args.seeds, "samples": args.samples}
    path = args.folder / f"siblings-{name.replace(' ', '_')}-{tuning}.json"
    write_record(path, "siblings", rows, test_images=args.test_images, **facts)
    return [f"{name}, {tuning}", *(words(values) for values in columns.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("folder", type=Path, nargs="?", default=results)
    parser.add_argument("--images", type=Path, help="where train/ and test/ are, or are to go")
    parser.add_argument("--cache", type=Path, help="where trained networks are kept")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--tunings", nargs="*", default=list(TUNINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--tune", type=int, default=3000)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=3000)
    args = parser.parse_args()
    warnings.simplefilter("ignore", FusionWarning)
    with tempfile.TemporaryDirectory() as temporary:
        folder = cifar.unpacked(args.images or Path(temporary))
        args.cache = args.cache or Path(temporary) / "trained"
        args.cache.mkdir(parents=True, exist_ok=True)
        args.training = cifar.images(folder, "train", args.train + args.tune, 0)
        args.test = cifar.images(folder, "test", args.test_images, 1)
        rows = []
        for name in args.networks:
            for tuning in args.tunings:
                rows.append(record(name, tuning, args))
                print(*rows[-1], sep="  ", flush=True)
    print(f"\nAccuracy in %, {args.test_images:,} test images, {args.seeds} seeds\n")
    print(lines(["", *COLUMNS], rows))


if __name__ == "__main__":
    main()
