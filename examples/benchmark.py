"""Time and memory of `fuse`, stage by stage, for ResNet-34 + ResNet-18 on 32x32 images.

The constraints leave this pair a single alignment, so `fuse` measures no layer costs; `align`,
which always does, is timed beside it. Each case runs in a process of its own.
Times are in seconds and as ratios to a plain forward pass of all samples through both networks.

    python examples/benchmark.py [--samples 200] [--threads 2] [--width 64] [--refit moments]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from networks import CifarResNet, predict

CASES = {"without norms (the paper's networks)": False, "with BatchNorm": True}


def run_case(norm: bool, samples: int, threads: int, width: int, refit: str) -> dict:
    """Fuse one pair and return seconds by stage, peak memory over the start, and a yardstick."""
    import fxfuse
    from fxfuse.refit import MatchMoments

    method = fxfuse.Method(refit=MatchMoments()) if refit == "moments" else fxfuse.presets.best

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    parents = [
        CifarResNet(blocks, width, "conv", norm).eval() for blocks in ([3, 4, 6, 3], [2, 2, 2, 2])
    ]
    x = torch.randn(samples, 3, 32, 32)
    before = _peak()
    start = time.perf_counter()
    fused = fxfuse.fuse(parents, x, method=method)
    total = time.perf_counter() - start
    peak = _peak() - before
    start = time.perf_counter()
    fxfuse.align(parents, x)
    alone = time.perf_counter() - start
    start = time.perf_counter()
    for net in parents:
        predict(net, x, 50)
    forward = time.perf_counter() - start
    seconds = fused.meta["fxfuse"].seconds
    return {
        "align": alone,
        "total": total,
        "forward": forward,
        "peak": peak,
        "before": before,
        "stages": seconds,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--refit", choices=["least-squares", "moments"], default="least-squares")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        options = args.samples, args.threads, args.width, args.refit
        print(json.dumps(run_case(CASES[args.case], *options)))
        return
    for case in CASES:
        runs = [_in_process(case, args) for _ in range(args.repeats)]
        _show(case, sorted(runs, key=lambda r: r["total"])[len(runs) // 2], args)


def _in_process(case: str, args: argparse.Namespace) -> dict:
    options = [f"--{k}={getattr(args, k)}" for k in ("samples", "threads", "width", "refit")]
    command = [sys.executable, __file__, *options, "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _show(case: str, run: dict, args: argparse.Namespace) -> None:
    print(f"\nResNet-34 + ResNet-18 {case}, width {args.width}, {args.samples} samples, ", end="")
    print(f"{args.threads} threads, {args.refit}, median of {args.repeats}")
    print(f"  {'stage':28s} seconds   forward passes")
    for stage, seconds in [*run["stages"].items(), ("all of fuse", run["total"])]:
        print(f"  {stage:28s} {seconds:7.2f}   {seconds / run['forward']:7.2f}")
    print(f"  {'align alone, costs measured':28s} {run['align']:7.2f}   ", end="")
    print(f"{run['align'] / run['forward']:7.2f}")
    print(f"  one forward pass of both     {run['forward']:7.2f}")
    print(f"  peak memory over the start   {run['peak']:7.0f} MB (start: {run['before']:.0f} MB)")


if __name__ == "__main__":
    main()
