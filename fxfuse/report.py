"""What a fusion did, in plain facts."""

from __future__ import annotations

from dataclasses import dataclass, field

from .ir import Alignment, Frozen, LayerFit
from .mixing import Mixer
from .refit import Outcome
from .version import versions

POOR = 0.5


@dataclass(frozen=True)
class SpaceReport:
    """One space of the fused network: its size, and how well each network's units matched.

    A network that does not have the space has no cost and no confidence.
    """

    name: str
    size: int
    costs: tuple[float | None, ...]
    confidences: tuple[float | None, ...]


@dataclass(frozen=True)
class Report:
    """What a fusion did, kept in `fused.meta["fxfuse"]`.

    Attributes:
        alignment: The layers that were matched.
        anchor: Index of the network whose widths and coordinates the result has.
        weights: Share of each network.
        spaces: Sizes, coupling costs and confidences.
        frozen: What stayed in place, and why.
        errors: Relative error of each network once depths were equal, zero if its layers stayed.
        seconds: Wall time of each stage.
        heads: How each network's own head reads the fused network, if there are such.
        layers: How the contractions were refitted, in order.
        divergence: Mean Kullback-Leibler divergence (nats) of the fused network's class
            probabilities from those of the parents' mean logits, on the calibration data; None if
            outputs are not 2-D.
        versions: Of Python, this package and what it computes with.
        files: SHA-256 of each file that a network came from, by its path.
        seeds: Of what was drawn at random, by the choice that drew it.
    """

    alignment: Alignment
    anchor: int
    weights: tuple[float, ...]
    spaces: tuple[SpaceReport, ...]
    frozen: tuple[Frozen, ...]
    errors: tuple[float, ...]
    seconds: dict[str, float]
    heads: tuple[str, ...] = ()
    layers: tuple[LayerFit, ...] = ()
    divergence: float | None = None
    versions: dict[str, str] = field(default_factory=versions)
    files: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)

    @property
    def poor(self) -> tuple[LayerFit, ...]:
        """The layers that explain less than half of their target."""
        return tuple(layer for layer in self.layers if layer.explained < POOR)

    def __str__(self) -> str:
        lines = [f"widths of network {self.anchor}, {len(self.spaces)} spaces"]
        if self.layers:
            mean = sum(layer.explained for layer in self.layers) / len(self.layers)
            lines.append(
                f"{len(self.layers)} layers refitted, mean R^2 {mean:.2f} on held-out data"
            )
        if self.divergence is not None:
            lines.append(f"divergence from the ensemble {self.divergence:.3f} nats")
        if self.poor:
            lines.append(f"warning: {len(self.poor)} layers explain less than {POOR:g} of theirs:")
            lines += [f"  {layer}" for layer in self.poor]
        return "\n".join(lines)


def report_on(
    mixer: Mixer,
    alignment: Alignment,
    outcome: Outcome,
    seconds: dict[str, float],
    heads: tuple[str, ...] = (),
    seeds: dict[str, int] | None = None,
) -> Report:
    """Sum up a fusion."""
    base = mixer.balanced.networks[mixer.anchor].spaces
    spaces = []
    for space in base:
        found = [mixer.couplings[space.name, k] for k in range(len(mixer.weights))]
        here = mixer.match.present[space.name]
        sure = tuple(c.confidence if p else None for c, p in zip(found, here))
        spaces.append(SpaceReport(space.name, space.size, tuple(c.cost for c in found), sure))
    shares, errors = tuple(mixer.weights), mixer.balanced.errors
    facts = alignment, mixer.anchor, shares, tuple(spaces), base.frozen, errors, seconds
    return Report(*facts, heads, outcome.layers, outcome.divergence, seeds=seeds or {})
