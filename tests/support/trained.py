"""The trained networks beside the project; tests that need them skip where they are absent."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.nets import mlp

SHARED = Path(__file__).resolve().parents[3] / "shared"
FOLDER = SHARED / "checkpoints" / "mnist_mlp"


needs_networks = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="needs ../shared/checkpoints/mnist_mlp"
)


def mnist(train):
    from torchvision.datasets import MNIST

    data = MNIST(SHARED / "data", train=train)
    return ((data.data.float() / 255 - 0.1307) / 0.3081).flatten(1), data.targets


def parents(seed):
    pair = [
        mlp(784, 400, 200, 100, 50, 25, 10, bias=False),
        mlp(784, 400, 200, 100, 10, bias=False),
    ]
    for net, letter in zip(pair, "AB"):
        state = load_file(FOLDER / f"depth_seed{seed}_{letter}.safetensors")
        linear = [m for m in net if isinstance(m, torch.nn.Linear)]
        linear[-1].bias = None
        for module, weight in zip(linear, state.values()):
            module.weight.data.copy_(weight)
    return pair
