"""Fuse trained CIFAR-10 ResNets of different depth without training, and compare.

The networks are He et al.'s CIFAR ResNets with padded shortcuts (checkpoints and images: see the
READMEs of ../shared). Calibration images come from the training set, without labels; accuracy is
measured on test images that nothing was chosen on.

    python examples/cifar_resnet.py [--images FOLDER] [--draws 3] [--groups 32+20 56+32+20]
                                    [--methods best c2m3] [--picture alignment.png]
"""

from __future__ import annotations

import argparse
import statistics
import tarfile
import tempfile
from pathlib import Path

import torch
from networks import SHARED, accuracy, cifar_resnet, predict
from torch import Tensor
from torchvision import datasets, transforms

import fxfuse

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GROUPS = ((32, 20), (56, 32), (56, 20), (56, 32, 20))
PRESETS = [
    "average",
    "otfusion",
    "clafusion",
    "hmt",
    "git_rebasin",
    "zipit",
    "elastic_zip",
    "c2m3",
    "best",
]


def images(folder: Path, split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw labelled images of one split, normalised as the networks were trained."""
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    dataset = datasets.ImageFolder(folder / split, steps)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    pairs = [dataset[i] for i in order[:count].tolist()]
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


def unpacked(folder: Path) -> Path:
    """Unpack the images into a folder if they are not there yet."""
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            with tarfile.open(SHARED / f"data/cifar10-jpeg-{split}.tar.gz") as archive:
                archive.extractall(folder, filter="data")
    return folder


def methods(count: int) -> dict[str, tuple]:
    """Return what is compared: every preset, and the default's options."""
    known = {name: (getattr(fxfuse.presets, name), {}) for name in PRESETS}
    if count == 2:
        transfers = {
            "hmt + average": fxfuse.presets.average,
            "hmt + otfusion": fxfuse.presets.otfusion,
        }
        for label, then in transfers.items():
            known[label] = (fxfuse.presets.Transfer(then=then), {})
        known["hmt + alignment + otfusion"] = (
            fxfuse.presets.Transfer(aligned=True, then=fxfuse.presets.otfusion),
            {},
        )
        known["best, weights 0.7 / 0.3"] = (fxfuse.presets.best, {"weights": [0.7, 0.3]})
    else:
        del known["hmt"]  # it is for two
    return known


def compare(depths: tuple[int, ...], args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Fuse one group of networks by every method; return the accuracies in words."""
    nets = [cifar_resnet(d) for d in depths]
    x, y = images(folder, "test", args.test_images, 0)
    logits = [predict(n, x) for n in nets]
    rows: dict[str, list[float]] = {}
    rows["ensemble"] = [accuracy(sum(z.softmax(1) for z in logits), y)]
    for draw in range(args.draws):
        calibration, _ = images(folder, "train", args.samples, draw + 1)
        for name, (method, options) in methods(len(nets)).items():
            if args.methods and name not in args.methods:
                continue
            fused = method(nets, calibration, **options)
            twin = cifar_resnet(depths[0], checkpoint=False)
            twin.load_state_dict(fused.state_dict(), strict=True)
            rows.setdefault(name, []).append(accuracy(predict(twin, x), y))
    if args.picture is not None and depths == GROUPS[0]:
        fxfuse.draw(fxfuse.align(nets, calibration), args.picture)
    shown = {"parents": ", ".join(f"{accuracy(z, y):.1f}" for z in logits)}
    for name, found in rows.items():
        spread = f" +- {statistics.pstdev(found):.1f}" if len(found) > 1 else ""
        shown[name] = f"{statistics.mean(found):.1f}{spread}"
    return shown


def table(columns: dict[str, dict[str, str]]) -> str:
    """Return one table, a column for each group of networks."""
    names = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    lines = ["| accuracy in % | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name in names:
        cells = [rows.get(name, "") for rows in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, help="where train/ and test/ are, or are to go")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=3000)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--groups", nargs="*", default=["+".join(map(str, g)) for g in GROUPS])
    parser.add_argument("--methods", nargs="*", help="of the table's rows; all if not given")
    args = parser.parse_args()
    print(
        f"Before any training: {args.test_images} test images (seed 0), {args.samples} unlabelled"
    )
    print(f"training images, mean of {args.draws} draws, equal weights unless given\n")
    columns = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = unpacked(args.images or Path(temporary))
        for group in args.groups:
            depths = tuple(int(d) for d in group.split("+"))
            columns[" + ".join(f"ResNet-{d}" for d in depths)] = compare(depths, args, folder)
            print(table(columns), flush=True)


if __name__ == "__main__":
    main()
