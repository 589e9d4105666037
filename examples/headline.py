"""Does a fused network, trained on, beat its parents trained on? Table 1 of the CLAFusion paper.

Every start that the paper and this package have to offer, and what each does along training: how
far it goes from A, how often it agrees with each parent. For small networks on one thread.

    python examples/headline.py [--pairs resnet14 resnet14-plain] [--scale cpu]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from experiment import FEW, MANY, Lab, Question, main, row
from harness import Run
from initialisation import PAPER
from results import starts_beside
from torch import Tensor, nn

import fxfuse
from fxfuse import presets
from fxfuse.fusion import FAIR

PROBED = 1000  # images held out that networks are compared on
WIDTH, NOISE = 1.5, 0.01
WIDER = f"`best`, `width={WIDTH}`"


def starts(lab: Lab) -> dict[str, Callable[[], nn.Module]]:
    """Return every start, made when it is asked for."""
    a, b = lab.first.network, lab.second.network
    inputs = lab.inputs(FEW).cpu()

    @cache
    def wider() -> nn.Module:
        return lab.fuse(presets.best, [a, b], MANY, width=WIDTH)

    return {
        "A": lambda: a,
        "B": lambda: b,
        "`best`": lambda: lab.fuse(presets.best, [a, b], MANY),
        "means of all units": lambda: lab.fuse(FAIR, [a, b], MANY),
        '`best`, `weights="auto"`': lambda: lab.fuse(presets.best, [a, b], MANY, weights="auto"),
        "`clafusion`": lambda: lab.fuse(presets.clafusion, [a, b]),
        "B, as deep as A": lambda: fxfuse.net2deeper(b, a, inputs),
        "random": lambda: lab.untrained(0, 100 + lab.seed),
        WIDER: wider,
        "A, as wide": lambda: fxfuse.net2wider(a, inputs, like=wider(), noise=NOISE, seed=lab.seed),
    }


@dataclass
class Probe:
    """How far a network is from its parents: in weights, in function, in its answers.

    Attributes:
        parents: A and B.
        inputs: Images held out `(n, c, h, w)`.
    """

    parents: tuple[nn.Module, nn.Module]
    inputs: Tensor

    @torch.no_grad()
    def __post_init__(self) -> None:
        self._logs = [net(self.inputs).log_softmax(1) for net in self.parents]
        self._weights = dict(self.parents[0].named_parameters())

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> dict[str, float]:
        """Return divergences and agreements, and the distance from A if weights have its shapes."""
        own = network(self.inputs.to(next(network.parameters()).device)).float().cpu()
        own = own.log_softmax(1)
        found = {}
        for name, log in zip("ab", self._logs):
            found[f"kl_{name}"] = float(F.kl_div(own, log, reduction="batchmean", log_target=True))
            found[f"agree_{name}"] = 100 * float((own.argmax(1) == log.argmax(1)).float().mean())
        distance = self._distance(dict(network.named_parameters()))
        return found if distance is None else found | {"weights_a": distance}

    def _distance(self, weights: dict[str, nn.Parameter]) -> float | None:
        """Return the distance from A's weights as they stand, in units of their norm."""
        if {k: v.shape for k, v in weights.items()} != {
            k: v.shape for k, v in self._weights.items()
        }:
            return None
        moved = sum(float((v.cpu() - self._weights[k]).square().sum()) for k, v in weights.items())
        norm = sum(float(v.square().sum()) for v in self._weights.values())
        return (moved / norm) ** 0.5


def probe(lab: Lab) -> Probe:
    """Return the probe of a pair, on images that nothing was trained on."""
    held = lab.data.inputs(lab.data.valid.images[:PROBED])
    return Probe((lab.first.network, lab.second.network), held)


def runs(lab: Lab) -> dict[str, tuple[nn.Module, Run]]:
    """Train on from every start; return each start with its run."""
    found, measure = {}, probe(lab)
    for name, make in starts(lab).items():
        start = make()
        found[name] = start, lab.tune(name, start, measure)
    return found


def rows(lab: Lab) -> list[dict[str, Any]]:
    """Train the parents, fuse, and fine-tune from every start."""
    both = lab.ensemble([lab.first.network, lab.second.network])
    found = [row(name, run) for name, (_, run) in runs(lab).items()]
    return [{"name": "ensemble of A and B", "before": both}, *found]


QUESTION = Question(
    "headline",
    ["resnet14", "resnet14-plain"],
    rows,
    "Is a fused network the better start? Each start trained on alike",
    starts_beside(PAPER),
)

if __name__ == "__main__":
    main(QUESTION)
