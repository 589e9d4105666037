"""Time and memory of `fuse`, stage by stage, against plain forward passes.

Each number of images is fused in a process of its own, so that peak memory is its own. Times are
also given as ratios to a forward pass of all images through both networks, in batches of 64, the
smallest of three. Images are random: what is measured does not depend on them.

    python examples/benchmark.py [--case 32+20] [--images 200 1000 10000] [--threads 1]
    python examples/benchmark.py --case plain vgg --images 200 --record after.json
    python examples/benchmark.py --compare before.json after.json

Cases: CIFAR's ResNet-32 + ResNet-20 (`32+20`); ResNet-34 + ResNet-18 on 32x32 images, of `--width`
64, with BatchNorm (`34+18`) or without any norm, the networks of the CLAFusion paper (`plain`); its
VGG-13, of twice the width, + VGG-11 of half of it (`vgg`). ResNet-34 + ResNet-18 has a single
possible alignment, so `fuse` measures no layer costs there.

Two records are compared by ratios to the forward passes, which other jobs and machines change less.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from networks import CifarResNet, Vgg, cifar_resnet, predict

CASES = ("32+20", "34+18", "plain", "vgg")
SLOWER = 1.1  # times the forward passes of before: what is named in a comparison
VGG_13 = (1, 1, 0, 2, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0)  # channels, in those of the first layer
VGG_11 = (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0)


def parents_of(case: str, width: int) -> list[torch.nn.Module]:
    """Return the two networks of a case, untrained where there is no checkpoint."""
    if case == "32+20":
        return [cifar_resnet(32), cifar_resnet(20)]
    torch.manual_seed(0)
    if case == "vgg":
        plans = [[2 * width * c for c in VGG_13], [width // 2 * c for c in VGG_11]]
        return [Vgg(plan, norm=False).eval() for plan in plans]
    blocks = [3, 4, 6, 3], [2, 2, 2, 2]
    return [CifarResNet(b, width, "conv", case == "34+18").eval() for b in blocks]


def run_case(case: str, images: int, threads: int, width: int, refit: str) -> dict:
    """Fuse one pair and return seconds by stage, peak memory over the start, and a yardstick."""
    import fxfuse
    from fxfuse.refit import LeastSquares, MatchMoments

    torch.set_num_threads(threads)
    parents, x = parents_of(case, width), torch.randn(images, 3, 32, 32)
    method = fxfuse.Method(refit=MatchMoments() if refit == "moments" else LeastSquares())
    fxfuse.fuse(parents, x[:4], method=method)  # what is imported and built once
    before, start, used = _peak(), time.perf_counter(), time.process_time()
    fused = fxfuse.fuse(parents, x, method=method)
    total, used, peak = time.perf_counter() - start, time.process_time() - used, _peak() - before
    return {
        "total": total,
        "used": used,
        "forward": _forward(parents, x),
        "with fused": _forward([*parents, fused.eval()], x),
        "peak": peak,
        "before": before,
        "stages": fused.meta["fxfuse"].seconds,
    }


def _forward(nets: list[torch.nn.Module], x: torch.Tensor) -> list[float]:
    """Return the seconds of forward passes, and of the processor for them."""
    found = []
    for _ in range(3):
        start, used = time.perf_counter(), time.process_time()
        for net in nets:
            predict(net, x, 64)
        found.append((time.perf_counter() - start, time.process_time() - used))
    return [min(seconds) for seconds in zip(*found)]


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=CASES, nargs="+", default=["32+20"])
    parser.add_argument("--images", type=int, nargs="+", default=[200, 1000, 10000])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="the fastest counts")
    parser.add_argument("--refit", choices=["least-squares", "moments"], default="least-squares")
    parser.add_argument("--record", type=Path, help="a file to write what was measured to")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        options = args.images[0], args.threads, args.width, args.refit
        print(json.dumps(run_case(args.case[0], *options)))
        return
    if args.compare:
        before, after = (json.loads(path.read_text()) for path in args.compare)
        print("\n".join(slower(before, after)) or "nothing became slower")
        return
    measured = {}
    for case in args.case:
        print(f"\n{case}, {args.threads} thread(s), {args.refit}; seconds (forward passes)")
        for images in args.images:
            runs = [_in_process(case, images, args) for _ in range(args.repeats)]
            best = min(runs, key=lambda r: r["used"])
            key = f"{case}, {images} images, {args.threads} thread(s), width {args.width}"
            measured[f"{key}, {args.refit}"] = best
            _show(images, best)
    if args.record:
        args.record.write_text(json.dumps(measured, indent=1) + "\n")


def slower(before: dict[str, dict], after: dict[str, dict]) -> Iterator[str]:
    """Say what takes more forward passes, or more memory, than in another record."""
    for case in sorted(before.keys() & after.keys()):
        old, new = (_figures(record[case]) for record in (before, after))
        for name in sorted(old.keys() & new.keys()):
            if new[name] > SLOWER * old[name]:
                yield f"{case}: {name} {old[name]:.2f} -> {new[name]:.2f}"


def _figures(run: dict) -> dict[str, float]:
    """Return what is compared: seconds as multiples of the forward passes, and memory."""
    wall, used = run["forward"]
    figures = {f"{name}, in forwards": s / wall for name, s in run["stages"].items()}
    figures["processor time, in forwards"] = run["used"] / used
    return figures | {"peak memory, MB": run["peak"]}


def _in_process(case: str, images: int, args: argparse.Namespace) -> dict:
    options = [f"--{k}={getattr(args, k)}" for k in ("threads", "width", "refit")]
    command = [sys.executable, __file__, *options, "--case", case, "--images", str(images)]
    done = subprocess.run([*command, "--here"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _show(images: int, run: dict) -> None:
    (wall, used), three = run["forward"], run["with fused"][1]
    print(f"  {images} images")
    for name, seconds in [*run["stages"].items(), ("all of fuse", run["total"])]:
        print(f"    {name:22s} {seconds:7.2f} ({seconds / wall:.2f})")
    print(f"    {'processor time':22s} {run['used']:7.2f} ({run['used'] / used:.2f}), ", end="")
    print(f"{run['used'] / three:.2f} with the fused network's forward pass")
    print(f"    {'forward, both networks':22s} {wall:7.2f}")
    print(
        f"    peak memory {run['peak']:.0f} MB over the start's {run['before']:.0f} MB", flush=True
    )


if __name__ == "__main__":
    main()
