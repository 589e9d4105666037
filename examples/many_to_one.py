"""Accuracy, memory and seconds of fusing more and more networks in one call, and one by one.

Fully connected networks of two hidden layers of 256 units, trained apart on scikit-learn's digits,
fused with unlabelled images and tested on others, on which nothing is chosen. Each fusion runs in a
process of its own; memory is the most that it held, less what it held before it fused.

    python examples/many_to_one.py [FOLDER] [--counts 4 8 16] [--methods zipit fedma ...]

With `--methods`, only these rows of the record are made anew.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from records import write_record
from torch import nn

from fxfuse import presets
from fxfuse.cli.demo import CALIBRATION, TEST, digits, percent_right, train
from fxfuse.errors import FusionWarning

WIDTH, EPOCHS, MIB = 256, 10, 1 << 20
ONE_BY_ONE = ", one by one"
METHODS = ["zipit", f"zipit{ONE_BY_ONE}", "best", "transformer_ot", "c2m3", "fedma"]


def network() -> nn.Module:
    hidden = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(WIDTH, 10))


def largest() -> float:
    """Return the most memory that this process held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def measured(name: str, count: int, states: Path) -> dict[str, float]:
    """Fuse once, in this process."""
    images, labels = digits(0)
    data, test = images[TEST:][:CALIBRATION], (images[:TEST], labels[:TEST])
    nets = [network() for _ in range(count)]
    for net, state in zip(nets, torch.load(states)):
        net.load_state_dict(state)
    method = getattr(presets, name.removesuffix(ONE_BY_ONE))
    method = presets.OneByOne(method) if name.endswith(ONE_BY_ONE) else method
    method([nn.Linear(4, 4), nn.Linear(4, 4)], torch.randn(8, 4))  # whatever is loaded late
    before, start = largest(), time.perf_counter()
    fused = method(nets, data)
    found = {"mebibytes": largest() - before, "seconds": time.perf_counter() - start}
    with torch.no_grad():
        return {**found, "accuracy": percent_right(fused(test[0]), test[1])}


def trained(count: int) -> list[dict[str, torch.Tensor]]:
    """Return the states of networks, each trained from a start of its own on all other images."""
    images, labels = digits(0)
    states = []
    for seed in range(count):
        torch.manual_seed(seed)
        x, y = images[TEST + CALIBRATION :], labels[TEST + CALIBRATION :]
        states.append(train(network(), x, y, EPOCHS).state_dict())
    return states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("folder", type=Path, nargs="?", default=results)
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--once", type=Path, help="one fusion of these networks, in this process")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FusionWarning)
    torch.set_num_threads(1)
    if args.once is not None:
        print(json.dumps(measured(args.methods[0], args.counts[0], args.once)))
        return
    path = args.folder / "many_to_one.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    found = {name: {} for name in METHODS} | {row["name"]: row for row in rows}
    facts = {"counts": args.counts, "test_images": TEST, "samples": CALIBRATION}
    with tempfile.TemporaryDirectory() as folder:
        states = Path(folder) / "states.pt"
        torch.save(trained(max(args.counts)), states)
        for name in args.methods:
            found[name] = {"name": name}
            for count in args.counts:
                command = [sys.executable, __file__, "--once", str(states), "--counts", str(count)]
                ran = subprocess.run(
                    [*command, "--methods", name], stdout=subprocess.PIPE, text=True, check=True
                )
                figures = json.loads(ran.stdout.splitlines()[-1])
                found[name] |= {f"{k} of {count}": round(v, 1) for k, v in figures.items()}
            print(found[name], flush=True)
            write_record(path, "many_to_one", [r for r in found.values() if r], **facts)


if __name__ == "__main__":
    main()
