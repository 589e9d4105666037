"""Records of what runs in seconds: the demo, and networks fine-tuned from one checkpoint.

    python examples/digits.py [FOLDER] [--seeds 3]

The images are scikit-learn's 8x8 digits, split as `fxfuse demo` splits them. Siblings: a network is
trained on 300 images; one copy of it is fine-tuned on zeros to fours, another on fives to nines.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from records import write_record
from torch import Tensor, nn

import fxfuse
from fxfuse.cli.demo import (
    CALIBRATION,
    CHOICE,
    TEST,
    DigitNet,
    digits,
    percent_right,
    run_demo,
    train,
)


def siblings(seed: int) -> list[dict[str, Any]]:
    """Return the accuracies of a network, of two specialists made from it, and of their fusions."""
    images, labels = digits(seed)
    test = images[:TEST], labels[:TEST]
    x, y = images[TEST + CHOICE :], labels[TEST + CHOICE :]
    torch.manual_seed(seed)
    base = DigitNet(2, 12)
    train(base, x[:300], y[:300], 6, 0.05)
    rows = [row("the checkpoint", base, *test)]
    tuned = []
    for name, part in {"0 to 4": y < 5, "5 to 9": y >= 5}.items():
        torch.manual_seed(seed + 1)
        tuned.append(copy.deepcopy(base))
        train(tuned[-1], x[part], y[part], 1, 0.005)
        rows.append(row(f"fine-tuned on {name}", tuned[-1], *test))
    rows.append({"name": "ensemble of both", **scores(ensemble(tuned, test[0]), test[1])})
    for name in ("average", "best"):
        fused = getattr(fxfuse.presets, name)(tuned, x[:CALIBRATION])
        rows.append(row(name, fused, *test))
    return rows


def demo(seed: int) -> list[dict[str, Any]]:
    """Return the rows of `fxfuse demo`."""
    with tempfile.TemporaryDirectory() as folder:
        result = run_demo(Path(folder) / "alignment.png", seed)
    return [
        {"name": name, "parameters": size, "accuracy": round(score, 2)}
        for name, size, score in result.rows
    ]


def row(name: str, net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return a row of a record: a network and its accuracies."""
    with torch.no_grad():
        found = scores(net(images), labels)
    return {"name": name, "parameters": sum(p.numel() for p in net.parameters()), **found}


def scores(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the accuracy in percent on all digits, and on each half of them."""
    parts = {"accuracy": labels >= 0, "low": labels < 5, "high": labels >= 5}
    return {k: round(percent_right(outputs[part], labels[part]), 2) for k, part in parts.items()}


def ensemble(nets: list[DigitNet], images: Tensor) -> Tensor:
    """Return the mean of the networks' probabilities."""
    with torch.no_grad():
        return torch.stack([net(images).softmax(1) for net in nets]).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("folder", type=Path, nargs="?", default=results)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    for question in (siblings, demo):
        for seed in range(args.seeds):
            name = f"digits-{question.__name__}"
            facts = {"seed": seed, "test_images": TEST, "samples": CALIBRATION}
            path = args.folder / f"{name}-seed{seed}.json"
            write_record(path, name, question(seed), **facts)


if __name__ == "__main__":
    main()
