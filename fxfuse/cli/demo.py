"""The main job on real images that come with a dependency: train two small networks, fuse, compare.

scikit-learn's 1,797 handwritten digits (8x8 pixels) are split once: 1,000 to train on, of which 500
without labels to fuse on; 200 to tell which parent is better; 597 to test on. Nothing is chosen on
the test images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ..fusion.fuse import align, fuse
from ..ir import Alignment
from ..report.alignment_picture import draw

Progress = Callable[[str, int, int], None]


TEST, CHOICE, CALIBRATION = 597, 200, 500  # images to test on, to choose with, to fuse on


PARENTS = ((4, 16), (3, 12))  # blocks per stage, width


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
    """What the demo found.

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
        progress: Called with a task, the steps done and the steps in all.
    """
    report = progress or (lambda task, done, steps: None)
    test_x, choice_x, train_x = _digits(seed)[0].split([TEST, CHOICE, 1797 - TEST - CHOICE])
    test_y, choice_y, train_y = _digits(seed)[1].split([TEST, CHOICE, 1797 - TEST - CHOICE])
    parents: list[nn.Module] = []
    for i, (depth, width) in enumerate(PARENTS):
        torch.manual_seed(seed + 1 + i)
        parent = DigitNet(depth, width)
        name = f"train parent {i + 1} of 2"
        train(parent, train_x, train_y, EPOCHS, 0.05, partial(report, name))
        parents.append(parent.eval())
    calibration = train_x[:CALIBRATION]
    report("align and fuse", 0, 2)
    alignment = align(parents, calibration)
    report("align and fuse", 1, 2)
    fused = fuse(parents, calibration, alignment=alignment)
    report("align and fuse", 2, 2)
    scores = [_accuracy(p, test_x, test_y) for p in parents]
    better = max(parents, key=lambda net: _accuracy(net, choice_x, choice_y))
    rows = [
        (_describe("deeper", *PARENTS[0]), _size(parents[0]), scores[0]),
        (_describe("shallower", *PARENTS[1]), _size(parents[1]), scores[1]),
        ("ensemble of both", sum(map(_size, parents)), _ensemble(parents, test_x, test_y)),
        ("fused, no training", _size(fused), _accuracy(fused, test_x, test_y)),
    ]
    for name, net in (("fused, fine-tuned", fused), ("better parent, fine-tuned", better)):
        tuned = copy.deepcopy(net)
        torch.manual_seed(seed + 10)
        train(tuned, train_x, train_y, TUNING, 0.02, partial(report, name))
        rows.append((name, _size(tuned), _accuracy(tuned, test_x, test_y)))
    draw(alignment, picture)
    return DemoResult(tuple(rows), alignment, len(test_y), picture, fused)


def train(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    rate: float,
    progress: Callable[[int, int], None],
    batch: int = 64,
) -> None:
    """Train a classifier in place by SGD with momentum and a cosine schedule.

    Args:
        net: Left in eval mode.
        x: Images `(n, ...)`.
        y: Labels `(n,)`.
        epochs: Passes over the images.
        rate: Highest learning rate.
        progress: Called with the epochs done and in all.
        batch: Images per step.
    """
    optimiser = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    net.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
        schedule.step()
        progress(epoch + 1, epochs)
    net.eval()


def _digits(seed: int) -> tuple[Tensor, Tensor]:
    digits = load_digits()
    x = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6.0
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order], y[order]


def _accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100.0 * float((net(x).argmax(1) == y).float().mean())


def _ensemble(nets: list[nn.Module], x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        mean = torch.stack([net(x).softmax(1) for net in nets]).mean(0)
    return 100.0 * float((mean.argmax(1) == y).float().mean())


def _describe(name: str, depth: int, width: int) -> str:
    return f"{name} parent, {depth} + {depth} blocks, width {width}"


def _size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
