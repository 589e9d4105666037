"""The page of laws: which preset keeps which identity, measured on small networks.

    python docs/laws.py [NETWORK ...] [--presets NAME ...] [--seconds 600]    # writes docs/laws.md

Networks are those of the tests' zoo, or of the coverage (`transformers/bert`), every number drawn
at random. A law holds if outputs differ by no more than 1e-4 of the largest, on inputs that nothing
was measured on. What is measured joins the record `examples/results/laws.json`, and the page is
made from all of it; with `--seconds`, what the record has is left as it is, and so is the rest when
the time is up.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import fxfuse  # noqa: E402
from fxfuse._files import write_text  # noqa: E402
from fxfuse.errors import FuseError, FusionWarning  # noqa: E402
from fxfuse.fusion import Method  # noqa: E402
from fxfuse.graph.compare import tensors_in  # noqa: E402
from fxfuse.mixers import Slerp  # noqa: E402
from fxfuse.presets import NAMED  # noqa: E402
from fxfuse.version import versions  # noqa: E402
from tests.support.coverage import coverage  # noqa: E402
from tests.support.nets import randomise  # noqa: E402
from tests.support.zoo import ZOO  # noqa: E402

RECORD = HERE.parent / "examples/results/laws.json"
TOLERANCE = 1e-4
MARKS = {True: "+", False: "-", None: "."}  # held, broken, refused: a mark for each law in turn
NAMED_AT_MOST = 4  # networks that break a law, in one cell
LAWS = ("weight 1", "copies", "order", "permuted")
PRESETS = {name: method for name, method in NAMED.items() if isinstance(method, Method)}
HEAD = """# Laws

What must hold for every method, whatever the networks, measured for each preset on {count} small
networks of every kind (listed below), with every number drawn at random. An entry says on how many
of them a law holds: outputs differ by no more than 1e-4 of the largest. Networks that a method
refuses do not count, nor do those that were not measured.

- **weight 1**: all the weight on the first of two networks gives it back.
- **copies**: three copies of a network (two, for `slerp`) give it back.
- **order**: the same networks in another order, with the same anchor and checkpoint, give the same.
- **permuted**: a network whose units are given in another order changes nothing.

"""
TAIL = """
Where a law does not hold, it follows from what the method is:

{reasons}

Measured on all presets: {whole}.

On some: {partly}.

Written by `python docs/laws.py`.
"""
# Laws that a method breaks by what it is.
_DEAD = "units that never fire on the data are alike; which of them match is left to chance"
_TIES = "of groups that correlate equally, to four digits, the first is merged first"
MEANT = {
    ("average", "permuted"): "units stay where they are",
    ("dare", "order"): "what is dropped of a network is drawn by its place among them",
    **{(name, "permuted"): _DEAD for name in ("zipit", "elastic_zip", "cca_merge", "repair")},
    **{(name, "order"): _TIES for name in ("zipit", "elastic_zip")},
}

Inputs = Callable[[int, int], Any]  # samples and a seed to inputs


class Case:
    """A kind of network, and what the laws compare.

    Args:
        build: A seed to a network.
        inputs: Samples and a seed to what its forward takes.
    """

    def __init__(self, build: Callable[[int], nn.Module], inputs: Inputs) -> None:
        self.inputs = inputs
        self.nets = [build(seed) for seed in (1, 2, 3)]
        x = inputs(40, 3)
        self.data = [x if isinstance(x, dict) else (x,)]
        self.moved = fxfuse.permute(self.nets[1], inputs(6, 1), seed=5)

    @classmethod
    def of_zoo(cls, name: str) -> Case:
        """Return a case of the tests' zoo."""

        def build(seed: int) -> nn.Module:
            net = ZOO[name].build(2, 8)
            tables = {n: b.clone() for n, b in net.named_buffers() if n not in net.state_dict()}
            randomise(net, seed)
            for path, table in tables.items():
                net.get_buffer(path).copy_(table)
            return net

        return cls(build, lambda n, seed: ZOO[name].inputs(n, torch.Generator().manual_seed(seed)))

    @classmethod
    def of_coverage(cls, name: str) -> Case:
        """Return a case of a network of `examples/coverage.py`."""
        known = coverage.build(name, 1)

        def inputs(samples: int, seed: int) -> Any:
            torch.manual_seed(seed)
            return coverage.example(name, known, samples)

        return cls(lambda seed: coverage.build(name, seed), inputs)

    @classmethod
    def of(cls, name: str) -> Case:
        """Return the case of a name."""
        return cls.of_zoo(name) if name in ZOO else cls.of_coverage(name)

    def gap(self, one: nn.Module, other: nn.Module) -> float:
        """Return the largest difference of any output, relative to the largest output."""
        x = self.inputs(5, 9)
        with torch.no_grad():
            pair = [tensors_in(_called(m, x)) for m in (one, other)]
        return max(_difference(a, b) for a, b in zip(*pair))

    def fused(self, method: Method, nets: Sequence[nn.Module], **options: Any) -> nn.Module:
        """Fuse networks by a method."""
        return fxfuse.fuse(nets, self.data, method=method, **options)

    def gaps(self, method: Method, laws: Sequence[str] = LAWS) -> dict[str, float]:
        """Return, by law, how far a method is from keeping it; NaN where it refuses."""
        a, b, c = self.nets
        two = isinstance(method.mixer, Slerp)
        orders = [([a, b], 0), ([b, a], 1)] if two else [([a, b, c], 0), ([a, c, b], 0)]

        def one() -> float:
            return self.gap(a, self.fused(method, [a, b], weights=[1, 0]))

        def copies() -> float:
            return self.gap(a, self.fused(method, [a] * (2 if two else 3)))

        def order() -> float:
            return self.gap(*(self.fused(method, nets, anchor=k) for nets, k in orders))

        def permuted() -> float:
            pairs = ([a, b], [a, self.moved])
            return self.gap(*(self.fused(method, nets, anchor=0) for nets in pairs))

        measures = dict(zip(LAWS, (one, copies, order, permuted)))
        return {law: _or_nan(measures[law]) for law in laws}


def _called(model: nn.Module, x: Any) -> Any:
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def _or_nan(measure: Callable[[], float]) -> float:
    try:
        return measure()
    except FuseError:
        return math.nan


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-3))


def _of(reason: str) -> str:
    """Return the presets and the law that a reason is for."""
    keys = [key for key, other in MEANT.items() if other == reason]
    return f"**{keys[0][1]}**, " + ", ".join(f"`{name}`" for name, _ in keys)


Held = dict[str, dict[str, str]]  # by network and preset, a mark for each law


def page(held: Held) -> str:
    """Return the page: a row of each preset, a column of each law."""
    lines = [f"| preset | {' | '.join(LAWS)} |", "|" + " --- |" * (len(LAWS) + 1)]
    for name in PRESETS:
        cells = [
            _cell({n: marks[name][i] for n, marks in held.items() if name in marks})
            for i in range(len(LAWS))
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    reasons = "\n".join(f"- {_of(reason)}: {reason}." for reason in dict.fromkeys(MEANT.values()))
    whole = [n for n, marks in held.items() if marks.keys() == PRESETS.keys()]
    parts = {"whole": _names(whole), "partly": _names([n for n in held if n not in whole])}
    tail = TAIL.format(reasons=reasons, **parts)
    return HEAD.format(count=len(held)) + "\n".join(lines) + "\n" + tail


def _cell(marks: dict[str, str]) -> str:
    """Return on how many networks a law holds, and on which it does not, if they are few."""
    count = sum(mark != MARKS[None] for mark in marks.values())
    broken = [name for name, mark in marks.items() if mark == MARKS[False]]
    but = f", not {_names(broken)}" if 0 < len(broken) <= NAMED_AT_MOST else ""
    return f"{count - len(broken)} of {count}{but}" if count else "-"


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def marks_of(gaps: dict[str, float]) -> str:
    """Return a mark for each law, in order.

    Example:
        >>> marks_of({"weight 1": 1e-7, "copies": 0.1, "order": math.nan, "permuted": 0.0})
        '+-.+'
    """
    found = [None if math.isnan(gaps[law]) else gaps[law] <= TOLERANCE for law in LAWS]
    return "".join(MARKS[held] for held in found)


def main() -> None:
    """Measure the laws on the named networks, add them to the record, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--seconds", type=float)
    args = parser.parse_args()
    warnings.simplefilter("ignore", FusionWarning)
    torch.set_num_threads(1)
    start = time.perf_counter()
    held: Held = json.loads(RECORD.read_text())["held"] if RECORD.exists() else {}
    for network in args.networks:
        known = held.setdefault(network, {})
        left = [p for p in args.presets if args.seconds is None or p not in known]
        case = Case.of(network) if left else None
        for name in left:
            if case and time.perf_counter() - start < (args.seconds or math.inf):
                known[name] = marks_of(case.gaps(PRESETS[name]))
                print(network, name, known[name], file=sys.stderr, flush=True)
    known_ones = {network: held[network] for network in sorted(held) if held[network]}
    record = {"question": "laws", "laws": LAWS, "tolerance": TOLERANCE, "held": known_ones}
    write_text(RECORD, json.dumps({**record, "versions": versions()}, indent=1) + "\n")
    write_text(HERE / "laws.md", page(known_ones))


if __name__ == "__main__":
    main()
