"""What a fusion did, in plain facts."""

from __future__ import annotations

from dataclasses import dataclass

from .ir import Alignment, Frozen
from .mixing import Mixer


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
    """

    alignment: Alignment
    anchor: int
    weights: tuple[float, ...]
    spaces: tuple[SpaceReport, ...]
    frozen: tuple[Frozen, ...]
    errors: tuple[float, ...]
    seconds: dict[str, float]
    heads: tuple[str, ...] = ()


def report_on(
    mixer: Mixer, alignment: Alignment, seconds: dict[str, float], heads: tuple[str, ...] = ()
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
    return Report(
        alignment, mixer.anchor, shares, tuple(spaces), base.frozen, errors, seconds, heads
    )
