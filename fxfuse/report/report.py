"""What a fusion did, in plain facts, and how to see them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape

from scipy.sparse import csr_array

from .._checked import checked
from ..errors import ArgumentError
from ..ir import Alignment, Cost, Finished, Frozen, LayerFit
from ..version import versions
from ._shared import amount, clipped, short_number

Accuracy = float | tuple[float, float]  # in percent; or that and the loss
SHOWN = 5  # poor layers at most, in print
DEAREST = 10  # layers that are named as those that took longest, at most
POOR = 0.5  # a layer that explains a smaller share of its target is named in the report


@dataclass(frozen=True)
class CouplingReport:
    """How the units of one network in a space correspond to the fused ones.

    Attributes:
        kind: `identity`, `permutation`, `one to one` (some units have no partner), `merging`
            (several whole units go to one), `soft`, or `absent` if the network gives nothing.
        mass: What the network gives a fused unit on average; 1 if it gives to every one.
        identity: Share of the mass that keeps its index.
    """

    kind: str
    mass: float
    identity: float


@dataclass(frozen=True)
class SpaceReport:
    """One space of the fused network, and how well each network's units matched.

    Attributes:
        name: The first tensor that writes it.
        size: Its units.
        costs: Per network, the mean ground cost per unit of mass; None where nothing was measured.
        confidences: Per network, how much of its part in a fused unit comes from one unit, on
            average: 1 if every unit has one partner. None if the network does not have the space.
        sizes: Per network, its units in the space.
        couplings: Per network, how they correspond.
    """

    name: str
    size: int
    costs: tuple[float | None, ...]
    confidences: tuple[float | None, ...]
    sizes: tuple[int, ...] = ()
    couplings: tuple[CouplingReport, ...] = ()


@dataclass(frozen=True)
class Heard:
    """A network of another kind, which gave targets and no weights.

    Attributes:
        name: The network.
        features: By a node of the fused network, the node of this one whose features counted there.
    """

    name: str
    features: dict[str, str]


@dataclass(frozen=True)
class Nearness:
    """How far the outputs of the fused network, and of each network, are from their ensemble's.

    Attributes:
        in_nats: Whether distances are mean Kullback-Leibler divergences of class probabilities; if
            not, they are root mean square errors relative to the ensemble's outputs.
        samples: How many samples they were measured on.
        held_out: Whether nothing was fitted to these.
        fused: The distance of the fused network.
        networks: Those of the networks.
        clear: Per network, whether it is nearer than the fused one by more than chance and
            rounding.
    """

    in_nats: bool
    samples: int
    held_out: bool
    fused: float
    networks: tuple[float, ...]
    clear: tuple[bool, ...]

    @property
    def judges(self) -> str:
        """The samples in words."""
        return amount(self.samples, "held-out sample" if self.held_out else "sample")

    def shown(self, distance: float) -> str:
        """Return a distance in words."""
        return f"{distance:.3g} nats" if self.in_nats else f"{100 * distance:.3g} %"


@dataclass(frozen=True)
class Report:
    """What a fusion did, kept in `fused.meta["fxfuse"]`.

    Attributes:
        alignment: The layers that were matched.
        anchor: Index of the network whose depth and widths the result has.
        weights: Share of each network.
        spaces: The spaces of the fused network, and how they were coupled.
        frozen: What stayed in place, and why.
        errors: Relative error of each network's outputs after its depth was changed; 0 if it was
            not, or if that kept the function.
        seconds: Wall time of each stage.
        heads: How each network's own head reads the fused network, if heads were kept apart.
        apart: Mean divergence (nats) of each head's class probabilities from its own network's, on
            the calibration data; None of outputs that are not 2-D, or if heads were not refitted.
        layers: How the contractions were refitted, in order.
        divergence: Mean Kullback-Leibler divergence (nats) of the fused network's class
            probabilities from those of the parents' mean logits, on the calibration data; None if
            outputs are not 2-D.
        versions: Of Python, of this package and of those that it computes with.
        files: SHA-256 of each file that a network came from, by its path.
        seeds: Seeds of what was drawn at random, by the name of what was drawn.
        removed: Per network, the layers that it lost when depths were made equal; empty if no
            network lost any.
        narrow: The spaces that kept their width though a larger one was asked for, by name, with
            the reason.
        memory: Peak resident bytes of the process so far, at the end of each stage.
        lead: Index of the network whose units keep their places in the fused network; None stands
            for the anchor.
        mixed: Whether `weights="auto"` left the layers that write the outputs as they were mixed.
        nearness: How far the outputs are from the ensemble's, and how far those of each network;
            None with heads for several tasks, which have no ensemble.
        candidates: What `weights="auto"` chose from: how far each candidate is from the ensemble,
            in the unit of `nearness` and on the same samples; the nearest was taken.
        warnings: What was warned of, a sentence each.
        costs: What each network costs for one sample; empty if that is not known.
        cost: What the fused network costs for one sample.
        configuration: Where widths differ from the anchor's, the numbers of its `config` with which
            its class has those of the fused network: by name, before and after.
        finished: What a finish by descent came to, in the unit of `nearness` and on its samples.
        guests: With `across=True`, the networks that gave targets and no weights.
        maps: By `(space, network)`, what its units give, `(fused units, units)`: those with the
            fewest entries, up to a million entries in all. They are not saved with the network.
    """

    alignment: Alignment
    anchor: int
    weights: tuple[float, ...]
    spaces: tuple[SpaceReport, ...]
    frozen: tuple[Frozen, ...]
    errors: tuple[float, ...]
    seconds: dict[str, float] = field(compare=False)
    heads: tuple[str, ...] = ()
    apart: tuple[float | None, ...] = ()
    layers: tuple[LayerFit, ...] = ()
    divergence: float | None = None
    versions: dict[str, str] = field(default_factory=versions)
    files: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    removed: tuple[frozenset[str], ...] = ()
    narrow: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict, compare=False)
    lead: int | None = None
    mixed: bool = False
    nearness: Nearness | None = None
    candidates: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    costs: tuple[Cost, ...] = ()
    cost: Cost | None = None
    configuration: dict[str, tuple[int, int]] = field(default_factory=dict)
    finished: Finished | None = None
    guests: tuple[Heard, ...] = ()
    maps: dict[tuple[str, int], csr_array] = field(
        default_factory=dict, compare=False, repr=False, metadata={"written": False}
    )

    @property
    def poor(self) -> tuple[LayerFit, ...]:
        """The layers that explain less than half of their target."""
        return tuple(layer for layer in self.layers if layer.explained < POOR)

    @property
    def dearest(self) -> tuple[LayerFit, ...]:
        """The layers whose refit took longest, ten at most."""
        timed = (layer for layer in self.layers if layer.seconds)
        return tuple(sorted(timed, key=lambda layer: -layer.seconds)[:DEAREST])

    @property
    def advice(self) -> str:
        """What to do next, in one sentence."""
        if self.warnings:
            return "try what the warning says, and compare with fxfuse.compare(...)"
        if self.poor:
            return "fuse on more samples; see these layers in .save_html('report.html')"
        return "compare it on labelled data with fxfuse.compare(...), then fxfuse.save(...) it"

    @property
    def verdict(self) -> str:
        """Whether it is nearer to the ensemble than its networks; empty if not measured."""
        near = self.nearness
        if near is None or not near.networks:
            return ""
        others = ", ".join(map(near.shown, near.networks))
        if self.candidates:
            first, *rest = sorted(self.candidates.items(), key=lambda item: item[1])
            listed = "; ".join(f"{name} {near.shown(distance)}" for name, distance in rest)
            chosen = f"of {amount(len(self.candidates), 'candidate')}, {first[0]} is nearest to the"
            than = f", before {listed}" if rest else ""
            return f"{chosen} ensemble: {near.shown(first[1])}{than}; alone {others}"
        better = sum(near.fused < distance for distance in near.networks)
        every = better == len(near.networks)
        which = "every network" if every else f"{better} of {len(near.networks)} networks"
        return f"nearer to the ensemble than {which}: {near.shown(near.fused)}; alone {others}"

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """Each network, their ensemble and the fused one, as a table shows them.

        Name, parameters, multiply-adds of one sample, and how far the outputs are from the
        ensemble's. What is not known is empty; there is no ensemble of one network, or of several
        tasks.
        """
        near, names = self.nearness, self.alignment.names
        costs = self.costs or (None,) * len(names)
        alone = near.networks if near is not None else ()
        away = [near.shown(d) for d in alone] if near is not None else [""] * len(names)
        rows = [(clipped(name), *_shown(cost), d) for name, cost, d in zip(names, costs, away)]
        if near is not None and len(names) > 1:
            used = [cost for cost, weight in zip(self.costs, self.weights) if weight]
            together = sum(used[1:], used[0]) if used else None
            rows.append(("ensemble", *_shown(together), near.shown(0.0)))
        fused = "" if near is None else near.shown(near.fused)
        return [*rows, ("fused", *_shown(self.cost), fused)]

    @property
    def table(self) -> str:
        """The rows as text, with a head; columns of which nothing is known are left out."""
        away = "" if self.nearness is None else f"from the ensemble, on {self.nearness.judges}"
        head = ("network", "parameters", "multiply-adds", away)
        columns = []
        for side, cells in zip("<>><", zip(head, *self.rows)):
            width = max(map(len, cells))
            if any(cells[1:]):
                columns.append([f"{cell:{side}{width}}" for cell in cells])
        return "\n".join("  ".join(line).rstrip() for line in zip(*columns))

    @checked()
    def draw_coupling(
        self, space: str, path: str | os.PathLike[str], network: int | None = None
    ) -> None:
        """Write heat maps of the coupling of a space, as it is and with its rows ordered.

        Args:
            space: Its name, one of `spaces`.
            path: A file ending in .png, .svg or .pdf.
            network: Index of the network; the first whose units are not those of the fused one if
                not given.

        Raises:
            ArgumentError: If the coupling is not known or was too large to keep, or the ending is
                of no known format.
        """
        from .plots import draw_coupling

        lead = self.anchor if self.lead is None else self.lead
        others = (k for k in range(len(self.weights)) if k != lead)
        k = next(others, lead) if network is None else network
        coupling = self.maps.get((space, k))
        if coupling is None:
            kept = sorted({name for name, other in self.maps if other == k})
            raise ArgumentError(
                f"the coupling of '{space}' and network {k}, which is not kept",
                where="Report.draw_coupling",
                expected=f"one of {', '.join(kept) or 'no space'}",
                do="choose one of these; of very large ones nothing is kept",
            )
        draw_coupling(coupling, path, f"{space}: {self.alignment.names[k]} to the fused network")

    @checked()
    def draw_fits(self, path: str | os.PathLike[str]) -> None:
        """Write a bar chart of how much of its target each refitted layer explains.

        Raises:
            ArgumentError: If nothing was refitted, or the ending is of no known format.
        """
        from .plots import draw_fits

        draw_fits(self.layers, path, POOR)

    @checked()
    def save_html(
        self,
        path: str | os.PathLike[str],
        accuracy: Mapping[str, Accuracy] | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        """Write everything as one self-contained web page, which asks the network for nothing.

        Args:
            path: The file to write.
            accuracy: Accuracy in percent of each network that is to be compared, by name, or
                accuracy and loss.
            facts: Other facts about the run, by name: file hashes, the command line.
        """
        from .html import save_page

        save_page(self, path, accuracy or {}, facts or {})

    def _repr_html_(self) -> str:
        """Return the text and the alignment, for a notebook."""
        from .alignment_picture import inline_svg

        return f"<pre>{escape(str(self))}</pre>{inline_svg(self.alignment, self.removed)}"

    def __str__(self) -> str:
        known = [self.table] if self.costs or self.nearness is not None else []
        return "\n".join([*self.summary, *known, *self.cautions])

    @property
    def summary(self) -> list[str]:
        """What was done, a line each."""
        units = "" if self.lead in (None, self.anchor) else f", units of network {self.lead}"
        spaces = amount(len(self.spaces), "space")
        lines = [f"widths of network {self.anchor}{units}, {spaces}"]
        if self.narrow:
            reasons = "; ".join(dict.fromkeys(self.narrow.values()))
            lines.append(f"{amount(len(self.narrow), 'space')} not wider: {reasons}")
        if self.configuration:
            changes = (f"{key} {old} -> {new}" for key, (old, new) in self.configuration.items())
            lines.append(f"configuration: {', '.join(changes)}")
        for guest in self.guests:
            places = ", ".join(guest.features) or "no features"
            lines.append(f"{guest.name} is of another kind: heard at {places}, and in the outputs")
        if self.layers:
            mean = sum(layer.explained for layer in self.layers) / len(self.layers)
            refitted = f"{amount(len(self.layers), 'layer')} refitted"
            mixed = "; outputs as mixed" if self.mixed else ""
            lines.append(f"{refitted}, mean R^2 {mean:.2f} on held-out data{mixed}")
        if self.finished is not None:
            lines.append(str(self.finished))
        if self.divergence is not None:
            lines.append(f"divergence from the ensemble {self.divergence:.3f} nats")
        if any(distance is not None for distance in self.apart):
            pairs = zip(self.alignment.names, self.apart)
            each = (f"{name} {d:.3f} nats" for name, d in pairs if d is not None)
            lines.append(f"heads apart from their networks: {', '.join(each)}")
        return lines

    @property
    def cautions(self) -> list[str]:
        """What was warned of, the poorest layers, and what to do next, a line each."""
        lines = [f"warning: {sentence}" for sentence in self.warnings]
        if self.poor:
            verb = "explains" if len(self.poor) == 1 else "explain"
            layers = f"{amount(len(self.poor), 'layer')} {verb}"
            lines.append(f"warning: {layers} less than {POOR:g} of the target's variance:")
            worst = sorted(self.poor, key=lambda layer: layer.explained)
            lines += [f"  {layer}" for layer in worst[:SHOWN]]
            lines += [f"  and {len(worst) - SHOWN} more"] * (len(worst) > SHOWN)
        return [*lines, f"next: {self.advice}"]


def _shown(cost: Cost | None) -> tuple[str, str]:
    """Return parameters and multiply-adds as a table shows them; empty if they are not known."""
    if cost is None:
        return "", ""
    return short_number(int(cost.parameters)), short_number(round(cost.multiply_adds))
