"""Train two small networks on real images, fuse them, and compare the result with both.

scikit-learn's 1,797 handwritten digits (8x8 pixels) are split once: 1,000 to train on, of which 500
without labels to fuse on; 200 to tell which parent is better; 597 to test on. Nothing is chosen on
the test images.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from .._progress import Progress, counted, heard_by
from ..fusion.fuse import align, fuse
from ..ir import Alignment
from ..report import draw

TEST, CHOICE, CALIBRATION = 597, 200, 500  # images to test on, to choose with, to fuse on
PARENTS = ((4, 16), (3, 12))  # blocks per stage, width
N = TypeVar("N", bound=nn.Module)
EPOCHS, TUNING = 12, 3  # of training and of fine-tuning


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        change = stride > 1 or inner != outer
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if change else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return `relu(shortcut(x) + branch(x))`."""
        branch = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(branch + self.shortcut(x))


class DigitNet(nn.Module):
    """A small residual network for 8x8 digits.

    Args:
        depth: Blocks in each of the two stages.
        width: Channels of the first stage; the second has twice as many.
    """

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.stage1 = nn.Sequential(*(Block(width, width, 1) for _ in range(depth)))
        wide = [Block(2 * width, 2 * width, 1) for _ in range(depth - 1)]
        self.stage2 = nn.Sequential(Block(width, 2 * width, 2), *wide)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(n, 10)` of images `(n, 1, 8, 8)`."""
        x = torch.relu(self.norm(self.stem(x)))
        x = self.stage2(self.stage1(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class DemoResult:
    """What the demo did and measured.

    Attributes:
        rows: Name, number of parameters and test accuracy in percent of each network.
        alignment: The alignment of the two parents.
        test_images: Size of the test set.
        picture: Where the alignment was drawn.
        fused: The fused network, before fine-tuning.
    """

    rows: tuple[tuple[str, int, float], ...]
    alignment: Alignment
    test_images: int
    picture: Path
    fused: nn.Module


def run_demo(picture: Path, seed: int = 0, progress: Progress | None = None) -> DemoResult:
    """Train, align, fuse and compare.

    Args:
        picture: Where to draw the alignment.
        seed: Of the split, the training and the order of samples.
        progress: Called with the name of a stage and the share of it that is done.
    """
    progress = progress or (lambda stage, share: None)
    images, labels = digits(seed)
    sizes = [TEST, CHOICE, len(images) - TEST - CHOICE]
    test, choice, training = zip(images.split(sizes), labels.split(sizes))
    parents: list[nn.Module] = []
    for i, (depth, width) in enumerate(PARENTS):
        torch.manual_seed(seed + 1 + i)
        parent = DigitNet(depth, width)
        with heard_by(partial(progress, f"train parent {i + 1} of {len(PARENTS)}")):
            train(parent, *training, EPOCHS)
        parents.append(parent)
    calibration = training[0][:CALIBRATION]
    progress("align and fuse", 0.0)
    alignment = align(parents, calibration)
    progress("align and fuse", 0.5)
    fused = fuse(parents, calibration, alignment=alignment)
    progress("align and fuse", 1.0)
    rows = [
        (f"{name} parent, {depth} + {depth} blocks, width {width}", _size(parent), score)
        for name, (depth, width), parent, score in zip(
            ("deeper", "shallower"), PARENTS, parents, (_accuracy(p, *test) for p in parents)
        )
    ]
    rows.append(("ensemble of both", sum(map(_size, parents)), _ensemble(parents, *test)))
    rows.append(("fused, no training", _size(fused), _accuracy(fused, *test)))
    better = max(parents, key=lambda parent: _accuracy(parent, *choice))
    for name, net in (("fused, fine-tuned", fused), ("better parent, fine-tuned", better)):
        tuned = copy.deepcopy(net)
        torch.manual_seed(seed + 10)
        with heard_by(partial(progress, name)):
            train(tuned, *training, TUNING, 0.02)
        rows.append((name, _size(tuned), _accuracy(tuned, *test)))
    draw(alignment, picture)
    return DemoResult(tuple(rows), alignment, TEST, picture, fused)


def trained(depth: int, width: int, epochs: int | None = None, seed: int = 0) -> DigitNet:
    """Return a network that was trained on the demo's images; for references of the command line.

    Args:
        depth: Blocks in each stage.
        width: Channels of the first stage.
        epochs: Passes over the images; as many as in the demo if not given.
        seed: Of the weights and the order of the images; the generator of the caller stays.
    """
    images, labels = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        known = images[TEST + CHOICE :], labels[TEST + CHOICE :]
        return train(DigitNet(depth, width), *known, EPOCHS if epochs is None else epochs)


def unseen() -> list[tuple[Tensor, Tensor]]:
    """Return batches of images that no network of `trained` has seen, with labels."""
    images, labels = digits()
    return list(zip(images[:TEST].split(100), labels[:TEST].split(100)))


def train(
    net: N,
    images: Tensor,
    labels: Tensor,
    epochs: int = EPOCHS,
    rate: float = 0.05,
    batch: int = 64,
) -> N:
    """Train a classifier in place by SGD with momentum and a cosine schedule, and return it.

    Args:
        net: Left in eval mode.
        images: `(n, ...)`.
        labels: `(n,)`.
        epochs: Passes over the images.
        rate: Highest learning rate.
        batch: Images per step.
    """
    optimiser = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    net.train()
    for _ in counted(range(epochs)):
        for rows in torch.randperm(len(images)).split(batch):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimiser.step()
        schedule.step()
    return net.eval()


def digits(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images `(1797, 1, 8, 8)` and labels `(1797,)` in an order drawn with the seed."""
    known = load_digits()
    images = (torch.tensor(known.images, dtype=torch.float32)[:, None] - 4.9) / 6.0
    labels = torch.tensor(known.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order], labels[order]


def _accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return percent_right(net(images), labels)


def _ensemble(nets: list[nn.Module], images: Tensor, labels: Tensor) -> float:
    """Return the accuracy of the mean of the networks' probabilities."""
    with torch.no_grad():
        mean = torch.stack([net(images).softmax(1) for net in nets]).mean(0)
    return percent_right(mean, labels)


def percent_right(scores: Tensor, labels: Tensor) -> float:
    """Return the share of labels that have the highest score, in percent."""
    return 100.0 * float((scores.argmax(1) == labels).float().mean())


def _size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
