"""Networks of unlike kinds: a residual network and a plain one, fused into the structure of one.

Both are trained on 10,000 CIFAR-10 images at 16x16 (../shared/data), from seeds of their own. They
are fused on 1,000 other training images without labels, and tested on 3,000 test images. Which
features are targets was chosen with the networks of seed 0, on 3,000 other test images; so neither
is among what is reported. Beside it: the anchor distilled from the ensemble, on the same images and
for the time that the fusion took.

    python examples/across.py [FOLDER] [--seeds 1 2 3] [--images FOLDER] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import cifar_resnet as cifar
import torch
import torch.nn.functional as F
from networks import CifarResNet, Vgg, accuracy, predict
from records import write_record
from torch import Tensor, nn
from training import cached, distil, train

import fxfuse
from fxfuse.errors import FusionWarning

TRAIN, CALIBRATION, TEST, EPOCHS = 10_000, 1_000, 3_000, 12
KINDS = {"residual": lambda: CifarResNet([2, 2, 2]), "plain": lambda: Vgg()}
WAYS: dict[str, dict[str, Any]] = {"across": {}, "across, auto": {"weights": "auto"}}


def halved(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return images at half their size, and their labels."""
    return F.avg_pool2d(pair[0], 2), pair[1]


def parents(seed: int, x: Tensor, y: Tensor, work: Path) -> dict[str, nn.Module]:
    """Return a trained network of each kind."""
    nets = {}
    for i, (kind, make) in enumerate(KINDS.items()):
        torch.manual_seed(100 * seed + i)
        net = make()
        path = work / f"across-{kind}-seed{seed}.safetensors"
        nets[kind] = cached(path, net, lambda net=net, i=i: train(net, x, y, EPOCHS, 10 * seed + i))
    return nets


def rows(nets: dict[str, nn.Module], data: Tensor, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """Return the accuracies of the networks, and of what is fused and distilled of them."""
    logits = [predict(net, x) for net in nets.values()]
    wanted = sum(logits) / len(logits)

    def row(name: str, net: nn.Module, **facts: Any) -> dict[str, Any]:
        given = predict(net, x)
        far = F.kl_div(given.log_softmax(1), wanted.softmax(1), reduction="batchmean")
        size = sum(p.numel() for p in net.parameters())
        score = {"accuracy": round(accuracy(given, y), 2), "divergence": round(float(far), 4)}
        return {"name": name, "parameters": size, **score, **facts}

    found = [row(kind, net) for kind, net in nets.items()]
    found.append({"name": "ensemble", "accuracy": round(accuracy(wanted, y), 2)})
    for k, (kind, anchor) in enumerate(nets.items()):
        for way, options in WAYS.items():
            start = time.perf_counter()
            fused = fxfuse.fuse([*nets.values()], data, across=True, anchor=k, **options)
            seconds = time.perf_counter() - start
            facts = {"seconds": round(seconds, 1), "verdict": fused.meta["fxfuse"].verdict}
            found.append(row(f"{way}, {kind} anchor", fused, **facts))
            if not options:
                tuned = distil([*nets.values()], anchor, data, seconds, False, 0)
                found.append(row(f"{kind} distilled in the same time", tuned))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("folder", type=Path, nargs="?", default=results)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--images", type=Path, help="where train/ and test/ are, or are to go")
    parser.add_argument("--work", type=Path, help="where trained networks are kept")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FusionWarning)
    with tempfile.TemporaryDirectory() as temporary:
        folder = cifar.unpacked(args.images or Path(temporary))
        x, y = halved(cifar.images(folder, "train", TRAIN + CALIBRATION, 0))
        test = [t[TEST:] for t in halved(cifar.images(folder, "test", 2 * TEST, 0))]
        for seed in args.seeds:
            nets = parents(seed, x[:TRAIN], y[:TRAIN], args.work or Path(temporary))
            found = rows(nets, x[TRAIN:], *test)
            path = args.folder / f"across-cifar16-seed{seed}.json"
            facts = {"seed": seed, "test_images": TEST, "samples": CALIBRATION}
            write_record(path, "across-cifar16", found, **facts)


if __name__ == "__main__":
    main()
