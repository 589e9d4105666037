"""Fuse trained CIFAR-10 ResNets of different depth without training, and compare.

The networks are He et al.'s CIFAR ResNets with padded shortcuts (checkpoints and images: see the
READMEs of ../shared). Calibration images come from the training set, without labels; accuracy is
measured on test images that nothing was chosen on.

    python examples/cifar_resnet.py [--images FOLDER] [--draws 3] [--picture alignment.png]
"""

from __future__ import annotations

import argparse
import statistics
import tarfile
import tempfile
from pathlib import Path

import torch
from networks import SHARED, accuracy, cifar_resnet, predict
from torch import Tensor, nn
from torchvision import datasets, transforms

import fxfuse
from fxfuse.refit import MatchMoments

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAIRS = ((32, 20), (56, 20))


def naive(nets: list[nn.Module]) -> nn.Module:
    """Average weights of equal names, block i with block i; blocks one network lacks stay."""
    deep, shallow = nets
    state, other = deep.state_dict(), shallow.state_dict()
    for name, tensor in state.items():
        if name in other and tensor.is_floating_point():
            state[name] = (tensor + other[name]) / 2
    blocks = len(deep.layer1)
    fused = cifar_resnet(6 * blocks + 2, checkpoint=False)
    fused.load_state_dict(state)
    return fused


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


def compare(depths: tuple[int, int], args: argparse.Namespace, folder: Path) -> None:
    nets = [cifar_resnet(d) for d in depths]
    x, y = images(folder, "test", args.test_images, 0)
    logits = [predict(n, x) for n in nets]
    rows: dict[str, list[float]] = {f"ResNet-{d}": [accuracy(z, y)] for d, z in zip(depths, logits)}
    rows["ensemble"] = [accuracy(sum(z.softmax(1) for z in logits), y)]
    rows["naive: same index averaged"] = [accuracy(predict(naive(nets), x), y)]
    methods = {
        "fused (clafusion preset)": {"method": fxfuse.presets.clafusion},
        "fused, moments matched only": {"method": fxfuse.Method(refit=MatchMoments())},
        "fused": {},
        "fused, weights 0.7 / 0.3": {"weights": [0.7, 0.3]},
    }
    for draw in range(args.draws):
        calibration, _ = images(folder, "train", args.samples, draw + 1)
        for name, options in methods.items():
            fused = fxfuse.fuse(nets, calibration, anchor=0, **options)
            twin = cifar_resnet(depths[0], checkpoint=False)
            twin.load_state_dict(fused.state_dict(), strict=True)
            rows.setdefault(name, []).append(accuracy(predict(twin, x), y))
    print(f"\nResNet-{depths[0]} + ResNet-{depths[1]}, {len(y)} test images (seed 0), ", end="")
    print(f"{args.samples} unlabelled images, {args.draws} draws, before any training")
    for name, found in rows.items():
        spread = f" +- {statistics.pstdev(found):.1f}" if len(found) > 1 else ""
        print(f"  {name:28s} {statistics.mean(found):5.1f} %{spread}")
    alignment = fused.meta["fxfuse"].alignment
    print("  aligned blocks:", [pair for segment in alignment.pairs for pair in segment])
    if args.picture is not None and depths == PAIRS[0]:
        alignment = fxfuse.align(nets, calibration)
        fxfuse.draw(alignment, args.picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, help="where train/ and test/ are, or are to go")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=3000)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = unpacked(args.images or Path(temporary))
        for depths in PAIRS:
            compare(depths, args, folder)


if __name__ == "__main__":
    main()
