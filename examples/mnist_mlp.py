"""The CLAFusion paper's MNIST networks: five and three hidden layers, fused on 200 samples.

Prints the alignment and the accuracies beside those of the paper's own code on the same networks
and the same samples (checkpoints and their READMEs: ../shared/checkpoints/mnist_mlp).

    python examples/mnist_mlp.py
"""

from __future__ import annotations

import numpy as np
import torch
from networks import SHARED, accuracy, mlp, predict
from safetensors.torch import load_file
from torch import Tensor
from torchvision.datasets import MNIST

import fxfuse

FOLDER = SHARED / "checkpoints/mnist_mlp"
DEEP, SHALLOW = (784, 400, 200, 100, 50, 25, 10), (784, 400, 200, 100, 10)
OFFICIAL = {0: 89.76, 1: 94.09, 2: 93.82}  # the paper's code, adding layers, weights 0.5


def pixels(images: Tensor) -> Tensor:
    """Return images as the networks take them: normalised and flat."""
    return ((images.float() / 255 - 0.1307) / 0.3081).flatten(1)


def main() -> None:
    train, test = (MNIST(SHARED / "data", train=t) for t in (True, False))
    x, y = pixels(test.data), test.targets
    chosen = np.load(FOLDER / "samples_and_splits.npz")["depth_samples"]
    samples = pixels(train.data[torch.from_numpy(chosen)])
    print(f"{len(y)} test images, {len(samples)} unlabelled samples, weights 0.5, no training\n")
    print("seed  deep   shallow ensemble  clafusion (official)  default  alignment")
    for seed, official in OFFICIAL.items():
        nets = [mlp(*DEEP), mlp(*SHALLOW)]
        for net, letter in zip(nets, "AB"):
            net.load_state_dict(load_file(FOLDER / f"depth_seed{seed}_{letter}.safetensors"))
        alignment = fxfuse.align(nets, samples)
        logits = [predict(n, x) for n in nets]
        deep, shallow = (accuracy(z, y) for z in logits)
        both = accuracy(sum(z.softmax(1) for z in logits), y)
        paper = accuracy(predict(fxfuse.presets.clafusion(nets, samples), x), y)
        default = accuracy(predict(fxfuse.fuse(nets, samples), x), y)
        rows = [int(a.removeprefix("fc")) for a, _ in alignment.pairs[0]]
        print(f"{seed:4d}  {deep:5.2f}  {shallow:5.2f}   {both:5.2f}     ", end="")
        print(f"{paper:5.2f} ({official:5.2f})         {default:5.2f}    {rows}")


if __name__ == "__main__":
    main()
