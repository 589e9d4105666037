"""The papers' methods against what the papers' own code gives on the same networks and samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from nets import mlp, outputs, residual
from safetensors.torch import load_file

import fxfuse

SHARED = Path(__file__).resolve().parents[2] / "shared"
FOLDER = SHARED / "checkpoints" / "mnist_mlp"
needs_networks = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="needs ../shared/checkpoints/mnist_mlp"
)


def test_clafusion_takes_the_shallow_networks_widths_and_one_map():
    nets = [mlp(6, 8, 7, 5, 3), mlp(6, 6, 4, 3)]
    fused = fxfuse.presets.clafusion(nets, torch.randn(50, 6))
    assert [p.shape[0] for p in fused.parameters() if p.dim() == 2] == [6, 6, 4, 3]


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


@needs_networks
@pytest.mark.parametrize(("seed", "accuracy"), [(0, 89.76), (1, 94.09), (2, 93.82)])
def test_clafusion_reaches_the_accuracies_of_the_papers_code(seed, accuracy):
    chosen = np.load(FOLDER / "samples_and_splits.npz")["depth_samples"]
    samples = mnist(True)[0][torch.from_numpy(chosen)]
    x, y = mnist(False)
    nets = parents(seed)
    alignment = fxfuse.align(nets, samples)
    # fc1, fc2, fc5 of the deep network are modules 0, 2, 8 of the sequence
    assert alignment.pairs[0] == [("0", "0"), ("2", "2"), ("8", "4")]
    fused = fxfuse.presets.clafusion(nets, samples, alignment=alignment)
    found = 100 * float((outputs(fused, x).argmax(1) == y).float().mean())
    assert found == pytest.approx(accuracy, abs=0.02)
    if seed == 0:
        golden = load_file(SHARED / "golden" / "mlp_depth_seed0_add.safetensors")
        for ours, theirs in zip(fused.state_dict().values(), golden.values()):
            assert torch.allclose(ours, theirs, atol=1e-6)


def test_residual_stages_of_34_and_18_layers_align_as_in_the_papers_code():
    deep, shallow = (
        residual((4, n[0]), (6, n[1]), (8, n[2]), (10, n[3]), stem=4)
        for n in ((3, 4, 6, 3), (2, 2, 2, 2))
    )
    pairs = fxfuse.align([deep, shallow], torch.randn(20, 3, 16, 16)).pairs
    blocks = [[int(a.split(".")[1]) for a, _ in stage] for stage in pairs[1:5]]
    assert blocks == [[0, 2], [0, 3], [0, 5], [0, 2]]
