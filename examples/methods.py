"""Every preset in seven situations: accuracy, how far from the ensemble, seconds.

    python examples/methods.py [FOLDER] [--seeds 3] [--situations tuned apart ...]
                               [--presets NAME ...] [--first-seed 0]
                               [--cifar [--images FOLDER] [--samples 500] [--test-images 2000]]

The images are scikit-learn's 8x8 digits, split as `fxfuse demo` splits them; networks are trained
anew for each seed. With `--cifar`, ResNet-32 and ResNet-20, and two ResNet-20 of disjoint labels,
of ../shared. Nothing is chosen on the test images. Records go to the folder; with
`--presets`, only these rows of them are made anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cifar_resnet as cifar
import tasks
import torch
from networks import cifar_resnet, predict
from records import write_record
from torch import Tensor, nn

import fxfuse
from fxfuse import Method, solvers
from fxfuse.calibration.distance import divergence
from fxfuse.cli.demo import CALIBRATION, CHOICE, TEST, DigitNet, digits, percent_right, train
from fxfuse.coupling import View, Window, reading_map, weighted_matrix, weighted_scalar
from fxfuse.errors import FuseError, FusionWarning
from fxfuse.presets import NAMED, transformer_ot

STEPS, BATCH, RATE = 800, 50, 2e-3  # of training a transformer
TUNED_ONLY = ("task_arithmetic", "ties", "dare")  # the first network is the checkpoint
WIDER = {"pleas": 1.5}  # partial merging: also with so much width

FLOWS = {  # the paper's other choices, for transformers
    "weighted scalar": {"residual": weighted_scalar},
    "weighted matrix": {"residual": weighted_matrix},
    "centre patches": {"view": View(summands=True, tokens=Window(2))},
    "hard": {"solver": solvers.Exact()},
    "one map": {"maps": reading_map},
}


@dataclass(frozen=True)
class Situation:
    """Networks, and the images to fuse and to test on.

    Attributes:
        nets: The networks.
        data: Unlabelled images.
        x: Test images.
        y: Their labels.
        checkpoint: What the networks were tuned from, if anything.
        heads: Options of `fuse` for networks of different labels.
        flows: Other choices for `transformer_ot`, by name.
    """

    nets: Sequence[nn.Module]
    data: Tensor
    x: Tensor
    y: Tensor
    checkpoint: nn.Module | None = None
    heads: bool = False
    flows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Attention(nn.Module):
    """Attention of four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class Layer(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm2, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class DigitTransformer(nn.Module):
    """A vision transformer for 8x8 digits: a class token, 4 x 4 patches, three layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(1, width, 2, 2), nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.layers = nn.Sequential(*(Layer(width) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


def transformer(seed: int, width: int, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(seed)
    net = DigitTransformer(width).train()
    optimiser = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,))
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimiser.step()
        rate.step()
    return net.eval()


def trained(seed: int, depth: int, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(seed)
    return train(DigitNet(depth, 12), x, y)


def situations(seed: int) -> dict[str, Callable[[], Situation]]:
    """Return the situations on digits, each made when it is called."""
    images, labels = digits(seed)
    x, y = images[TEST + CHOICE :], labels[TEST + CHOICE :]
    low, first = y < 5, 10 * seed
    rest: tuple[Tensor, Tensor, Tensor] = (x[:CALIBRATION], images[:TEST], labels[:TEST])

    def tuned() -> Situation:
        torch.manual_seed(seed)
        base, nets = train(DigitNet(2, 12), x[:300], y[:300], 6, 0.05), []
        for part in (low, ~low):
            torch.manual_seed(seed + 1)
            nets.append(train(copy.deepcopy(base), x[part], y[part], 1, 0.005))
        return Situation(nets, *rest, checkpoint=base)

    def alike(*depths: int) -> Situation:
        return Situation([trained(first + i, d, x, y) for i, d in enumerate(depths)], *rest)

    def disjoint() -> Situation:
        nets = [trained(first + i, 2, x[p], y[p]) for i, p in enumerate((low, ~low))]
        return Situation(nets, *rest)

    def transformers(*widths: int) -> Situation:
        nets = [transformer(first + i, width, x, y) for i, width in enumerate(widths)]
        return Situation(nets, *rest, flows=FLOWS)

    return {
        "tuned": tuned,
        "apart": lambda: alike(2, 2),
        "disjoint": disjoint,
        "depth": lambda: alike(3, 2),
        "three": lambda: alike(2, 2, 2),
        "vit": lambda: transformers(32, 32),
        "vit-widths": lambda: transformers(32, 48),
    }


def on_cifar(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Situation]]:
    """Return the situations on CIFAR-10, with trained networks."""
    x, y = cifar.images(folder, "test", args.test_images, 0)
    data = cifar.images(folder, "train", args.samples, 1)[0]
    return {
        "cifar-depth": lambda: Situation([cifar_resnet(d) for d in (32, 20)], data, x, y),
        "cifar-disjoint": lambda: Situation(tasks.networks(), data, x, y, heads=True),
    }


def rows(given: Situation, presets: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield what each network, their ensemble, and the fusion by each preset reaches."""
    logits = [predict(net, given.x) for net in given.nets]
    wanted = torch.stack(logits).mean(0)
    if given.heads:
        yield {"name": "ensemble", "accuracy": joint(lambda x: [n(x) for n in given.nets], given)}
    else:
        for k, each in enumerate(logits):
            yield {"name": f"parent {k + 1}", **scores(each, wanted, given.y)}
        yield {"name": "ensemble", **scores(wanted, wanted, given.y)}
    for name in presets:
        for width in (1.0, WIDER.get(name, 1.0)) if name in WIDER else (1.0,):
            label = name if width == 1 else f"{name}, width {width:g}"
            yield {"name": label, **fused_by(name, width, given, wanted)}
    for name, choices in given.flows.items() if "transformer_ot" in presets else ():
        method = replace(transformer_ot, coupling=replace(transformer_ot.coupling, **choices))
        yield {"name": f"transformer_ot, {name}", **fused_by(method, 1.0, given, wanted)}


def fused_by(name: str | Method, width: float, given: Situation, wanted: Tensor) -> dict[str, Any]:
    """Fuse by a preset and measure; what it refuses is named."""
    nets, options = list(given.nets), {} if width == 1 else {"width": width}
    if name in TUNED_ONLY:
        if given.checkpoint is None:
            return {"refused": "there is no checkpoint"}
        nets = [given.checkpoint, *nets]
    if given.heads:
        options["heads"] = fxfuse.heads.Separate()
    start = time.perf_counter()
    try:
        fused = fxfuse.fuse(nets, given.data, method=name, **options).eval()
    except FuseError as error:
        return {"refused": str(error).split("\n")[0]}
    seconds = {"seconds": round(time.perf_counter() - start, 2)}
    if given.heads:
        return {"accuracy": joint(fused, given), **seconds}
    return {**scores(predict(fused, given.x), wanted, given.y), **seconds}


def joint(run: Callable[[Tensor], Sequence[Tensor]], given: Situation) -> float:
    """Return the joint accuracy of two heads."""
    return round(tasks.scores(run, given.x, given.y)[0], 2)


def scores(logits: Tensor, wanted: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy in percent, and the mean divergence from the ensemble in nats."""
    apart = divergence(wanted.double(), logits.double()) / len(labels)
    return {"accuracy": round(percent_right(logits, labels), 2), "divergence": round(apart, 4)}


def write(
    folder: Path, name: str, seed: int, made: Callable[[], Situation], presets: Sequence[str]
) -> None:
    """Measure a situation, print it and write its record, or some rows of it."""
    given, path = made(), folder / f"methods-{name}-seed{seed}.json"
    before = json.loads(path.read_text())["rows"] if {*presets} != {*NAMED} else []
    found = {row["name"]: row for row in before}
    for row in rows(given, presets):
        found[row["name"]] = row
        print(name, seed, *(f"{k} {v}" for k, v in row.items()), sep="  ", flush=True)
    facts = {"seed": seed, "test_images": len(given.y), "samples": len(given.data)}
    write_record(path, f"methods-{name}", [*found.values()], **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("folder", type=Path, nargs="?", default=results)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--situations", nargs="*")
    parser.add_argument("--presets", nargs="*", default=list(NAMED), choices=list(NAMED))
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--cifar", action="store_true", help="the networks of ../shared instead")
    parser.add_argument("--images", type=Path, help="where train/ and test/ are, or are to go")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--test-images", type=int, default=2000)
    args = parser.parse_args()
    warnings.simplefilter("ignore", FusionWarning)
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(args.first_seed, 1 if args.cifar else args.seeds):
            if args.cifar:
                made = on_cifar(args, cifar.unpacked(args.images or Path(temporary)))
            else:
                made = situations(seed)
            for name in args.situations or made:
                write(args.folder, name, seed, made[name], args.presets)


if __name__ == "__main__":
    main()
