"""The page of laws: which preset keeps which identity, measured on small networks.

    python docs/laws.py [NETWORK ...]    # writes docs/laws.md

Networks are those of the tests' zoo, every number drawn at random. A law holds if outputs differ by
no more than 1e-4 of the largest, on inputs that nothing was measured on.
"""

from __future__ import annotations

import math
import sys
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
from tests.support.nets import randomise  # noqa: E402
from tests.support.zoo import ZOO  # noqa: E402

TOLERANCE = 1e-4
LAWS = ("weight 1", "copies", "order", "permuted")
PRESETS = {name: method for name, method in NAMED.items() if isinstance(method, Method)}
SHOWN = [
    *("SequentialMLP", "HighwayMLP", "LeNet", "SmallResNet", "DenseNet", "MobileNet"),
    *("SqueezeExciteNet", "GroupNormNet", "LSTMClassifier", "VisionTransformer"),
    *("EinsumAttention", "GraphConvolution"),
]
HEAD = """# Laws

What must hold for every method, whatever the networks, measured for each preset on {count} small
networks of the tests ({names}), with every number drawn at random. An entry says on how many of
them a law holds: outputs differ by no more than 1e-4 of the largest. Networks that a method refuses
do not count.

- **weight 1**: all the weight on the first of two networks gives it back.
- **copies**: three copies of a network (two, for `slerp`) give it back.
- **order**: the same networks in another order, with the same anchor and checkpoint, give the same.
- **permuted**: a network whose units are given in another order changes nothing.

"""
TAIL = """
Where a law does not hold, it follows from what the method is:

{reasons}

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
        self.data = [(inputs(40, 3),)]
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

    def gap(self, one: nn.Module, other: nn.Module) -> float:
        """Return the largest difference of any output, relative to the largest output."""
        x = self.inputs(5, 9)
        with torch.no_grad():
            pair = [tensors_in(m(*x) if isinstance(x, tuple) else m(x)) for m in (one, other)]
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


def page(cases: dict[str, Case]) -> str:
    """Return the page: a row of each preset, a column of each law."""
    lines = [f"| preset | {' | '.join(LAWS)} |", "|" + " --- |" * (len(LAWS) + 1)]
    for name, method in PRESETS.items():
        found = [case.gaps(method) for case in cases.values()]
        cells = []
        for law in LAWS:
            gaps = [g[law] for g in found if not math.isnan(g[law])]
            held = sum(gap <= TOLERANCE for gap in gaps)
            broken = [f"`{case}`" for case, g in zip(cases, found) if g[law] > TOLERANCE]
            but = f", not {' '.join(broken)}" if 0 < len(broken) < len(gaps) else ""
            cells.append(f"{held} of {len(gaps)}{but}" if gaps else "-")
            print(name, law, cells[-1], file=sys.stderr, flush=True)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    reasons = "\n".join(f"- {_of(reason)}: {reason}." for reason in dict.fromkeys(MEANT.values()))
    head = HEAD.format(count=len(cases), names=", ".join(f"`{name}`" for name in cases))
    return head + "\n".join(lines) + "\n" + TAIL.format(reasons=reasons)


def main() -> None:
    """Measure the laws on the named networks, and write the page."""
    warnings.simplefilter("ignore", FusionWarning)
    torch.set_num_threads(1)
    cases = {name: Case.of_zoo(name) for name in sys.argv[1:] or SHOWN}
    write_text(HERE / "laws.md", page(cases))


if __name__ == "__main__":
    main()
