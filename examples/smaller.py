"""One network made smaller, before any training: pruned, merged by transport, refitted.

The network is He et al.'s CIFAR ResNet-20. Nothing but unlabelled training images is read; accuracy
is measured on test images that nothing was chosen on. Units are scored by each importance, and all
rows of one importance keep the same number of multiply-adds. "Torch-Pruning", if it is installed,
is plain structured pruning by its own dependency graph, by magnitudes.

    python examples/smaller.py [--images FOLDER] [--to 0.75 0.5 0.25] [--samples 1000]
                               [--test-images 3000] [--seed 0] [--records FILE.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import cifar_resnet as cifar
import torch
from networks import accuracy, cifar_resnet, predict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxfuse
from fxfuse.refit import LeastSquares
from fxfuse.width import activation, magnitude, taylor

WAYS = {
    "pruned": {"merge": False, "refit": None},
    "merged": {"merge": True, "refit": None},
    "pruned, refitted": {"merge": False, "refit": LeastSquares()},
    "merged, refitted": {"merge": True, "refit": LeastSquares()},
}
SCORES = {
    "magnitude": {"importance": magnitude},
    "activation": {"importance": activation},
    "Taylor": {"importance": taylor},
    "Taylor, units compete": {"importance": taylor, "even": False},
}


def operations(model: nn.Module, x: Tensor) -> float:
    """Return the multiply-adds of one sample."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[:1])
    return counter.get_total_flops() / 2


def peer(model: nn.Module, x: Tensor, to: float) -> nn.Module | None:
    """Return the network pruned by Torch-Pruning to a share of its multiply-adds, if installed.

    The share of units that it drops everywhere is the smallest hundredth that is enough. None, too,
    if what it returns does not run.
    """
    try:
        import torch_pruning
    except ImportError:
        return None
    whole = operations(model, x)
    for hundredth in range(1, 100):
        small = copy.deepcopy(model).eval()
        last = [m for m in small.modules() if isinstance(m, nn.Linear)][-1]
        options = {"importance": torch_pruning.importance.MagnitudeImportance(p=2)}
        options |= {"pruning_ratio": hundredth / 100, "ignored_layers": [last]}
        torch_pruning.pruner.MagnitudePruner(small, x[:2], **options).step()
        try:
            left = operations(small, x)
        except RuntimeError as error:
            print(f"Torch-Pruning, {hundredth} % of the units dropped, does not run: {error}")
            continue
        if left <= to * whole:
            return small
    return None


def rows(model: nn.Module, x: Tensor, test: tuple[Tensor, Tensor], to: float) -> list[dict]:
    """Return what every way and importance reaches at a share of the multiply-adds."""
    whole, found = operations(model, x), []

    def add(scores: str, way: str, small: nn.Module, seconds: float) -> None:
        found.append(
            {
                "to": to,
                "scores": scores,
                "way": way,
                "accuracy": accuracy(predict(small, test[0]), test[1]),
                "left": operations(small, x) / whole,
                "seconds": seconds,
            }
        )
        row = found[-1]
        print(f"{to:5.0%} {scores:22} {way:17} {row['accuracy']:5.1f} %", flush=True)

    for scores, chosen in SCORES.items():
        for way, options in WAYS.items():
            start = time.perf_counter()
            small = fxfuse.narrow(model, x, to=to, of="multiply_adds", **chosen, **options)
            add(scores, way, small, time.perf_counter() - start)
    start = time.perf_counter()
    if (small := peer(model, x, to)) is not None:
        add("magnitude", "Torch-Pruning", small, time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=Path(tempfile.gettempdir()) / "cifar10-jpeg")
    parser.add_argument("--to", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    folder, model = cifar.unpacked(args.images), cifar_resnet(20)
    x, _ = cifar.images(folder, "train", args.samples, args.seed)
    test = cifar.images(folder, "test", args.test_images, args.seed)
    print(f"ResNet-20: {accuracy(predict(model, test[0]), test[1]):.1f} %")
    found = [row for to in args.to for row in rows(model, x, test, to)]
    if args.records is not None:
        args.records.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
