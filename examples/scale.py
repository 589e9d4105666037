"""Seconds and memory of `fuse` against the number of parameters, and the exponents that fit them.

Untrained ResNets without norm on random 32x32 images, ResNet-18 with ResNet-10 of the same width:
widths from 20 to 160 give parents of 2 million to 100 million parameters together. Each is fused in
a process of its own, so that peak memory is its own; it is compared with what the parents and the
fused network take.

    python examples/scale.py [--widths 20 40 80 160] [--images 64] [--record scale.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from networks import CifarResNet, predict

BLOCKS = [2, 2, 2, 2], [1, 1, 1, 1]


def run_width(width: int, images: int, method: str) -> dict[str, float]:
    """Fuse one pair; return parameters, processor seconds and mebibytes."""
    import fxfuse

    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = [CifarResNet(blocks, 4, "conv", False).eval() for blocks in BLOCKS]
    x = torch.randn(images, 3, 32, 32)
    fxfuse.fuse(small, x[:4], method=method)  # what is imported and built once
    start = _peak()
    parents = [CifarResNet(blocks, width, "conv", False).eval() for blocks in BLOCKS]
    used = time.process_time()
    for parent in parents:
        predict(parent, x, 64)
    forward, used = time.process_time() - used, time.process_time()
    fused = fxfuse.fuse(parents, x, method=method)
    used, sizes = time.process_time() - used, [_parameters(net) for net in (*parents, fused)]
    return {
        "parameters of the parents": sum(sizes[:-1]),
        "parameters of all": sum(sizes),
        "seconds": used,
        "forward": forward,
        "peak": _peak() - start,
        "weights": 4 * sum(sizes) / 2**20,
    }


def _parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Return the power of the sizes with which costs grow, by least squares of logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[20, 40, 80, 160])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--method", default="best", help="a preset")
    parser.add_argument("--record", type=Path, help="a file to write what was measured to")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(run_width(args.widths[0], args.images, args.method)))
        return
    runs = {}
    print("| parents, M | processor s | forward passes | peak MiB over the start | of it weights |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for width in args.widths:
        options = ["--images", str(args.images), "--method", args.method, "--here"]
        command = [sys.executable, __file__, "--widths", str(width), *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        run = runs[f"width {width}"] = json.loads(done.stdout)
        size, ratio = run["parameters of the parents"] / 1e6, run["seconds"] / run["forward"]
        cells = f"{size:.1f}", f"{run['seconds']:.1f}", f"{ratio:.1f}"
        print(f"| {' | '.join(cells)} | {run['peak']:.0f} | {run['weights']:.0f} |", flush=True)
    fitted = {}
    if len(runs) > 1:
        sizes = [run["parameters of the parents"] for run in runs.values()]
        fitted = {k: exponent(sizes, [r[k] for r in runs.values()]) for k in ("seconds", "peak")}
        print("exponents: " + ", ".join(f"{k} {power:.2f}" for k, power in fitted.items()))
    if args.record:
        facts = {"images": args.images, "method": args.method, "exponents": fitted}
        args.record.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
