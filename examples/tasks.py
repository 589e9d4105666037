"""Fuse networks of different tasks: accuracy by multiply-adds, from all fused to all apart.

Two CIFAR-10 ResNet-20, one of labels 0 to 4, one of labels 5 to 9 (../shared/checkpoints). They are
fused on unlabelled training images of all labels. Joint: the softmax inside each head, then the
largest of all; beside it, each network's accuracy on its own labels. Means and spreads of several
draws.

    python examples/tasks.py [--images FOLDER] [--draws 3] [--samples 1000] [--test-images 3000]
                             [--test-seed 0] [--rows NAME ...] [--curve curve.png]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cifar_resnet as cifar
import torch
from networks import SHARED, CifarResNet
from one_shot import lines, multiply_adds, words
from safetensors.torch import load_file
from torch import Tensor, nn

import fxfuse

OWN = range(5), range(5, 10)  # the labels of each network
CUTS = {
    "before the last layer": None,
    "after layer3.1": "layer3.1",
    "after layer3.0": "layer3.0",
    "after layer2": "layer2",
    "after layer1": "layer1",
    "after layer1.0": "layer1.0",
}
CURVE = {
    f"cut {name}": {"heads": fxfuse.heads.Separate(after=after)} for name, after in CUTS.items()
}
OTHERS = {
    "cut by a budget of 1.3": {"heads": fxfuse.heads.Separate(after="auto", multiply_adds=1.3)},
    "`width=1.25`": {"heads": fxfuse.heads.Separate(), "width": 1.25},
    "`width=1.5`": {"heads": fxfuse.heads.Separate(), "width": 1.5},
    "`width=1.5`, cut after layer2": {"heads": fxfuse.heads.Separate(after="layer2"), "width": 1.5},
    '`width=float("inf")`': {"heads": fxfuse.heads.Separate(), "width": math.inf},
    "`zipit`": {"heads": fxfuse.heads.Separate(), "method": fxfuse.presets.zipit},
    "`git_rebasin`": {"heads": fxfuse.heads.Separate(), "method": fxfuse.presets.git_rebasin},
    "`otfusion`": {"heads": fxfuse.heads.Separate(), "method": fxfuse.presets.otfusion},
    "weight average": {"heads": fxfuse.heads.Separate(), "method": fxfuse.presets.average},
}
APART = "both networks, the ensemble"
ONE_TASK = "cut before the last layer, images of labels 0 to 4 only"

Scores = tuple[float, float, float]  # joint accuracy, and on the labels of each network, in percent


def networks() -> list[nn.Module]:
    """Return the two networks."""
    loaded = []
    for name in ("0to4", "5to9"):
        path = SHARED / f"checkpoints/cifar10_disjoint/resnet20_labels{name}.safetensors"
        net = CifarResNet([3, 3, 3], classes=5)
        net.load_state_dict(load_file(path))
        loaded.append(net.eval())
    return loaded


@torch.no_grad()
def scores(run: Callable[[Tensor], Sequence[Tensor]], x: Tensor, y: Tensor) -> Scores:
    """Return the joint accuracy and that of each head on its own labels."""
    parts = [[logits.softmax(1) for logits in run(part)] for part in x.split(250)]
    heads = [torch.cat(column) for column in zip(*parts)]
    joint = float((torch.cat(heads, 1).argmax(1) == y).float().mean())
    found = [joint]
    for head, labels in zip(heads, OWN):
        known = (y >= labels[0]) & (y <= labels[-1])
        right = head[known].argmax(1) + labels[0] == y[known]
        found.append(float(right.float().mean()))
    return tuple(100 * value for value in found)


def measured(
    nets: list[nn.Module], draws: Sequence[Tensor], options: dict, x: Tensor, y: Tensor
) -> tuple[nn.Module, list[Scores]]:
    """Fuse on each draw; return the last result and what all of them score."""
    found = []
    for draw in draws:
        fused = fxfuse.fuse(nets, draw, **options).eval()
        found.append(scores(fused, x, y))
    return fused, found


def row(name: str, cost: float, parameters: int, found: Sequence[Scores]) -> list[str]:
    columns = [words(column) for column in zip(*found)]
    return [name, f"{cost:.1f}", f"{parameters:,}", *columns]


def draw_curve(table: Sequence[Sequence[str]], path: Path) -> None:
    """Draw joint accuracy against multiply-adds, of the rows of the printed table."""
    from matplotlib.figure import Figure

    points = {}
    for name, cost, _, joint, *_ in table:
        mean, _, spread = joint.partition(" +- ")
        points[name] = float(cost), float(mean), float(spread or 0)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    cuts = {name: at for name, at in points.items() if name in (*CURVE, APART)}
    axes.errorbar(*zip(*sorted(cuts.values())), marker="o", capsize=3, label="cut at a layer")
    for name, (cost, mean, _) in cuts.items():
        short, at = name.removeprefix("cut ").removeprefix("both networks, "), (4, -6)
        how = {"fontsize": 8, "rotation": -30, "rotation_mode": "anchor", "va": "top"}
        axes.annotate(short, (cost, mean), at, textcoords="offset points", **how)
    wider = {name.replace("`", ""): at for name, at in points.items() if name.startswith("`width")}
    for (name, (cost, mean, spread)), marker in zip(wider.items(), "svD^"):
        axes.errorbar(cost, mean, spread, marker=marker, linestyle="", capsize=3, label=name)
    axes.margins(x=0.2, y=0.25)
    axes.set_xlabel("multiply-adds per image, millions")
    axes.set_ylabel("joint accuracy in %")
    axes.set_title("Two tasks, from all fused to all apart, no training")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, help="where train/ and test/ are, or are to go")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=3000)
    parser.add_argument("--test-seed", type=int, default=0)
    parser.add_argument("--rows", nargs="*", help="names of rows; all if not given")
    parser.add_argument("--curve", type=Path, help="a file for the picture")
    args = parser.parse_args()
    nets = networks()
    with tempfile.TemporaryDirectory() as temporary:
        folder = cifar.unpacked(args.images or Path(temporary))
        x, y = cifar.images(folder, "test", args.test_images, args.test_seed)
        drawn = [cifar.images(folder, "train", args.samples, 1 + i) for i in range(args.draws)]
    both = [scores(lambda part: [net(part) for net in nets], x, y)]
    single = multiply_adds(nets[0], x), sum(p.numel() for p in nets[0].parameters())
    table = [row(APART, 2 * single[0], 2 * single[1], both)]
    all_labels = [images for images, _ in drawn]
    wanted = {name: (options, all_labels) for name, options in (CURVE | OTHERS).items()}
    few = [images[labels < 5] for images, labels in drawn]
    wanted[ONE_TASK] = ({"heads": fxfuse.heads.Separate()}, few)
    head = ["", "multiply-adds, millions", "parameters", "joint", "labels 0 to 4", "labels 5 to 9"]
    for name, (options, draws) in wanted.items():
        if args.rows and name not in args.rows:
            continue
        fused, found = measured(nets, draws, options, x, y)
        size = sum(p.numel() for p in fused.parameters())
        table.append(row(name, multiply_adds(fused, x), size, found))
        print(*table[-1], flush=True)
        if args.curve is not None:  # what is there is drawn, should the rest be interrupted
            draw_curve(table, args.curve)
    print(
        f"\n{args.test_images:,} test images (seed {args.test_seed}), {args.samples:,} unlabelled"
    )
    print("training images; accuracy in %\n")
    print(lines(head, table))


if __name__ == "__main__":
    main()
