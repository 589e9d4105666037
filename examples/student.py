"""A wide teacher fused into the widths of a narrow student that was trained itself.

The images are scikit-learn's digits, split as `fxfuse demo` splits them: 1,000 to train on, 500 of
them without labels to fuse on, 597 to test on. Nothing is chosen on the test images. A fusion that
ends in a descent (`finish=`) is compared with the student distilled from the same outputs for the
time that the fusion took, descent included: Adam at the same rate, without flips.

    python examples/student.py [FOLDER] [--seeds 3]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from digits import row
from records import write_record
from torch import Tensor, nn
from training import distil

import fxfuse
from fxfuse.cli.demo import CALIBRATION, CHOICE, TEST, digits, percent_right, train
from fxfuse.errors import FusionWarning
from fxfuse.refit import Finish


def mlp(width: int) -> nn.Module:
    first, second = nn.Linear(64, width), nn.Linear(width, width)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), nn.Linear(width, 10))


def conv(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inner, outer, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
        layers += [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)]
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


KINDS: dict[str, tuple[Callable[[int], nn.Module], int, int, int]] = {  # widths, epochs
    "mlp": (mlp, 128, 16, 30),
    "conv": (conv, 24, 6, 12),
}


WAYS: dict[str, dict[str, Any]] = {
    "equal weights": {},
    "0.9 teacher": {"weights": [0.9, 0.1]},
    "auto": {"weights": "auto"},
}
FINISH = Finish(seconds=2.0)
AIMS = {"equal weights": 0.5, "teacher alone": 1.0}  # the teacher's share in what is wanted


def rows(kind: str, seed: int) -> list[dict[str, Any]]:
    """Return the accuracies of teacher, student and what is fused of them."""
    make, *widths, epochs = KINDS[kind]
    images, labels = digits(seed)
    x, y = images[TEST + CHOICE :], labels[TEST + CHOICE :]
    nets = []
    for i, width in enumerate(widths):
        torch.manual_seed(100 * seed + i + 1)
        nets.append(train(make(width), x, y, epochs))
    test, data = (images[:TEST], labels[:TEST]), x[:CALIBRATION]
    found = [row("teacher", nets[0], *test), row("student", nets[1], *test)]
    with torch.no_grad():
        together = [net(test[0]) for net in nets]
    score = round(percent_right(sum(together), test[1]), 2)
    found.append({"name": "ensemble", "accuracy": score})

    def add(name: str, net: nn.Module, share: float) -> None:
        aim = _mean(together, share)
        with torch.no_grad():
            pairs = {"divergence": net(test[0]), "of_student": together[1]}
        apart = {key: round(_divergence(aim, q), 4) for key, q in pairs.items()}
        found.append(row(name, net, *test) | apart)

    for name, options in WAYS.items():
        fused = fxfuse.fuse(nets, data, anchor=1, **options)
        add(name, fused, 0.9 if name == "0.9 teacher" else 0.5)
    for name, share in AIMS.items():
        start = time.perf_counter()
        fused = fxfuse.fuse(nets, data, anchor=1, weights=[share, 1 - share], finish=FINISH)
        seconds = time.perf_counter() - start
        add(f"{name}, `finish=`", fused, share)
        found[-1]["seconds"] = round(seconds, 1)
        teachers = nets if share < 1 else nets[:1]
        tuned = distil(teachers, nets[1], data, seconds, False, seed, rate=FINISH.rate)
        add(f"{name}, student distilled in the same time", tuned, share)
    return found


def _mean(outputs: list[Tensor], share: float) -> Tensor:
    return share * outputs[0] + (1 - share) * outputs[1]


def _divergence(wanted: Tensor, outputs: Tensor) -> float:
    """Return the mean divergence (nats) of class probabilities from those wanted."""
    p, q = wanted.log_softmax(1), outputs.log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("folder", type=Path, nargs="?", default=results)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore", FusionWarning)
    for kind in KINDS:
        for seed in range(args.seeds):
            path = args.folder / f"student-{kind}-seed{seed}.json"
            facts = {"seed": seed, "test_images": TEST, "samples": CALIBRATION}
            write_record(path, f"student-{kind}", rows(kind, seed), **facts)


if __name__ == "__main__":
    main()
