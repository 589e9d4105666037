"""One network made smaller, before any training: pruned, merged by transport, refitted.

The network is He et al.'s CIFAR ResNet-20. Nothing but unlabelled training images is read; accuracy
is measured on test images that nothing was chosen on. Units are scored by each importance, and all
rows of one importance keep the same number of multiply-adds. "Torch-Pruning", if it is installed,
is plain structured pruning by its own dependency graph and its own importance of the same name.

    python examples/smaller.py [FOLDER] [--images FOLDER] [--to 0.75 0.5 0.25] [--samples 1000]
                               [--test-images 3000] [--seed 0] [--scores NAME ...] [--ways NAME ...]

A record for each share goes to the folder; with `--scores` or `--ways`, only these rows of it are
made anew.
"""

from __future__ import annotations

import argparse
import bisect
import copy
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import cifar_resnet as cifar
import torch
from networks import accuracy, cifar_resnet, predict
from records import write_record
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
PEER = "Torch-Pruning"
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


def peer(model: nn.Module, x: Tensor, to: float, scores: str) -> nn.Module | None:
    """Return the network pruned by Torch-Pruning to a share of its multiply-adds, if installed.

    The share of units that it drops is the smallest hundredth that is enough. Its Taylor scores get
    labels drawn from the network's own predictions.
    """
    try:
        import torch_pruning as other
    except ImportError:
        return None
    whole, scored = operations(model, x), with_convolutions(model)
    importance = _peer_importance(other, scored, x, scores)
    last = [name for name, m in scored.named_modules() if isinstance(m, nn.Linear)][-1]

    def dropped(hundredth: int) -> nn.Module:
        small = copy.deepcopy(scored)
        for mine, its in zip(small.parameters(), scored.parameters()):
            mine.grad = its.grad
        options = {"importance": importance, "global_pruning": scores.endswith("compete")}
        options |= {"pruning_ratio": hundredth / 100, "ignored_layers": [small.get_submodule(last)]}
        other.pruner.BasePruner(small, x[:2], **options).step()
        return small

    shares = range(1, 100)
    chosen = bisect.bisect_left(shares, -to * whole, key=lambda h: -operations(dropped(h), x))
    return dropped(shares[chosen])


def with_convolutions(model: nn.Module) -> nn.Module:
    """Return a network of the same function whose padded shortcuts are 1x1 convolutions.

    Torch-Pruning does not know which channels a padding shifts: what it returns does not run.
    """
    model = copy.deepcopy(model).eval()
    for block in [m for m in model.modules() if getattr(m, "pad", None)]:
        inner, outer = block.conv1.in_channels, block.conv1.out_channels
        block.shortcut = nn.Conv2d(inner, outer, 1, block.conv1.stride, bias=False)
        weight = torch.zeros(outer, inner, 1, 1)
        weight[range(block.pad, block.pad + inner), range(inner)] = 1.0
        block.shortcut.weight = nn.Parameter(weight)
        block.pad = None
    return model


def _peer_importance(other: Any, model: nn.Module, x: Tensor, scores: str) -> Any:
    """Return Torch-Pruning's importance of a name, with what it looks at left in the model."""
    if scores == "magnitude":
        return other.importance.MagnitudeImportance(p=2)
    if scores == "activation":
        importance = other.pruner.importance.ActivationImportance()
        with importance.compute_importance(model), torch.no_grad():
            model(x)
        return importance
    for batch in x.split(100):
        logits = model(batch)
        drawn = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return other.importance.TaylorImportance()


def rows(
    model: nn.Module,
    x: Tensor,
    test: tuple[Tensor, Tensor],
    to: float,
    scores: str,
    ways: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Yield what ways reach by one importance at a share of the multiply-adds."""
    whole = operations(model, x)
    for way in ways:
        start = time.perf_counter()
        if way == PEER:
            small = peer(model, x, to, scores)
        else:
            chosen = {**SCORES[scores], **WAYS[way]}
            small = fxfuse.narrow(model, x, to=to, of="multiply_adds", **chosen)
        if small is not None:
            seconds = round(time.perf_counter() - start, 1)
            right = round(accuracy(predict(small, test[0]), test[1]), 2)
            left = round(operations(small, x) / whole, 4)
            known = {"scores": scores, "way": way, "accuracy": right, "left": left}
            yield known | {"seconds": seconds}


def peer_version() -> dict[str, str]:
    """Return the version of Torch-Pruning, if it is installed."""
    try:
        return {"torch-pruning": metadata.version("torch-pruning")}
    except metadata.PackageNotFoundError:
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("folder", type=Path, nargs="?", default=results)
    parser.add_argument("--images", type=Path, default=Path(tempfile.gettempdir()) / "cifar10-jpeg")
    parser.add_argument("--to", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=list(SCORES))
    every = [*WAYS, PEER]
    parser.add_argument("--ways", nargs="+", default=every, choices=every)
    args = parser.parse_args()
    folder, model = cifar.unpacked(args.images), cifar_resnet(20)
    x, _ = cifar.images(folder, "train", args.samples, args.seed)
    test = cifar.images(folder, "test", args.test_images, args.seed)
    whole = round(accuracy(predict(model, test[0]), test[1]), 2)
    facts = {"seed": args.seed, "whole": whole, "test_images": len(test[1]), "samples": len(x)}
    facts |= {"peer": peer_version()}
    print(f"ResNet-20: {whole:.1f} %")
    for to in args.to:
        path = args.folder / f"smaller-{100 * to:.0f}.json"
        before = json.loads(path.read_text())["rows"] if path.exists() else []
        found = {(row["scores"], row["way"]): row for row in before}
        for scores in args.scores:
            for row in rows(model, x, test, to, scores, args.ways):
                found[scores, row["way"]] = row
                print(f"{to:5.0%} {scores:22} {row['way']:17} {row['accuracy']:5.1f} %", flush=True)
                write_record(path, "smaller", [*found.values()], to=to, **facts)


if __name__ == "__main__":
    main()
