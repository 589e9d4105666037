"""Networks and data that the examples share."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

SHARED = Path(__file__).resolve().parents[2] / "shared"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a skip; the skip is `pad` (no weights) or a 1x1 `conv`."""

    def __init__(self, inner: int, outer: int, stride: int, shortcut: str, norm: bool):
        super().__init__()
        layer = nn.BatchNorm2d if norm else nn.Identity
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = layer(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = layer(outer)
        self.pad = outer // 4 if shortcut == "pad" and inner != outer else None
        self.shortcut = nn.Identity()
        if shortcut == "conv" and (inner != outer or stride > 1):
            self.shortcut = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), layer(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad is not None:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """A ResNet for 32x32 images.

    Args:
        blocks: Blocks per stage.
        width: Channels of the first stage, doubled at each next one.
        shortcut: `pad` as in He et al.'s CIFAR networks, or `conv`.
        norm: With BatchNorm or without.
        classes: Number of outputs.
    """

    def __init__(self, blocks, width=16, shortcut="pad", norm=True, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width) if norm else nn.Identity()
        inner = width
        for i, depth in enumerate(blocks):
            outer = width * 2**i
            stage = []
            for j in range(depth):
                stride = 2 if i and not j else 1
                stage.append(BasicBlock(inner, outer, stride, shortcut, norm))
                inner = outer
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.stages = len(blocks)
        self.linear = nn.Linear(inner, classes, bias=norm)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.linear(F.avg_pool2d(x, x.size(3)).flatten(1))


class Vgg(nn.Module):
    """3x3 convolutions and ReLU, with max-pools between, the mean over positions at the end.

    Args:
        plan: Channels of each convolution in order, 0 for a max-pool.
        norm: With BatchNorm, or without and drawn so that values keep their size (He et al.).
        classes: Number of outputs.
    """

    def __init__(self, plan=(16, 16, 0, 32, 32, 0, 64, 64, 0), norm=True, classes=10):
        super().__init__()
        layers: list[nn.Module] = []
        inner = 3
        for outer in plan:
            if not outer:
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(inner, outer, 3, 1, 1, bias=False))
            if norm:
                layers.append(nn.BatchNorm2d(outer))
            else:
                nn.init.kaiming_normal_(layers[-1].weight)
            layers.append(nn.ReLU())
            inner = outer
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inner, classes, bias=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def cifar_resnet(depth: int, checkpoint: bool = True) -> nn.Module:
    """Return ResNet-20, 32 or 56 for CIFAR-10, trained if the checkpoint is there."""
    net = CifarResNet([(depth - 2) // 6] * 3)
    if checkpoint:
        net.load_state_dict(load_file(SHARED / f"checkpoints/cifar10_resnet{depth}.safetensors"))
    return net.eval()


def mlp(*widths: int) -> nn.Module:
    """Return a fully connected network without biases, `fc1` to `fcN`, ReLU between."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (inner, outer) in enumerate(zip(widths, widths[1:])):
        layers[f"fc{i + 1}"] = nn.Linear(inner, outer, bias=False)
        if i < len(widths) - 2:
            layers[f"relu{i + 1}"] = nn.ReLU()
    return nn.Sequential(layers)


@torch.no_grad()
def predict(net: nn.Module, x: Tensor, batch: int = 250) -> Tensor:
    """Return logits in eval mode, batch by batch."""
    net.eval()
    return torch.cat([net(part) for part in x.split(batch)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of right answers in percent."""
    return 100.0 * float((logits.argmax(1) == labels).float().mean())
