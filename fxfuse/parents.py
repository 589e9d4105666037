"""The networks that are fused, on their way over the data together, and what they ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from .data import Calibration
from .frontier import Frontier, Track
from .mixing import Mixer
from .sampling import Sample, rows_at
from .statistics import Run
from .targets import Aim, Targets

Draw = Callable[[Aim, int, Sequence[int]], Sample]


@dataclass(frozen=True, eq=False)
class Goal:
    """What a contraction of the fused network has to give, at a sample of its positions.

    Attributes:
        sample: Which positions.
        shapes: Of the value of each batch, without its units.
        values: `(positions, units)` of each batch: the mean of the networks' values where the
            contraction's effect is complete.
        acted: The same of what the activation behind it makes of them; empty unless it alone
            reads them.
    """

    sample: Sample
    shapes: list[tuple[int, ...]]
    values: list[Tensor]
    acted: list[Tensor]


class Parents:
    """The networks on their way, a step ahead of the fused one where its targets ask for it.

    Args:
        targets: Mixes their values.
        order: Of the fused network's nodes.
        aims: What is to be refitted.
        data: Calibration inputs.
        samples: How many of the first ones.
        size: How many of them are one batch.
        frontier: Where they rest between stops.
        draw: Chooses positions of a contraction, told how many one sample has, and the samples
            of each batch.
    """

    def __init__(
        self,
        targets: Targets,
        order: Sequence[fx.Node],
        aims: dict[str, Aim],
        data: Calibration,
        samples: int,
        size: int,
        frontier: Frontier,
        draw: Draw,
    ) -> None:
        self.targets, self.draw = targets, draw
        mixer = targets.mixer
        place = {node.name: i for i, node in enumerate(order)}
        self.tracks: list[Track | None] = []
        for k, (network, bypass) in enumerate(zip(mixer.balanced.networks, targets.bypasses)):
            nodes = sorted(network.module.graph.nodes, key=lambda n: place[n.name])
            given = network, data, samples, size, nodes, frontier, bypass
            self.tracks.append(None if _silent(mixer, k) else Track(*given))
        self.sizes = next(track.sizes for track in self.tracks if track is not None)
        self.place = place
        self.stops = sorted(aims.values(), key=lambda aim: place[aim.at])
        self.caught: dict[str, Goal] = {}

    def goal(self, aim: Aim) -> Goal:
        """Return what is wanted of a contraction; it is forgotten."""
        name = aim.producer.node
        while name not in self.caught:
            following = self.stops.pop(0)
            self.caught[following.producer.node] = self._go(following)
        return self.caught.pop(name)

    def _go(self, aim: Aim) -> Goal:
        """Go on to where a contraction meets its target."""
        values: list[Tensor] = []
        acted: list[Tensor] = []
        chosen: Sample | None = None
        shapes: list[tuple[int, ...]] = []
        axis = aim.axis_in(self.targets.mixer.balanced.networks[0])
        for batch, size in enumerate(self.sizes):
            found = [
                None if t is None else t.go(batch, self.place[aim.at] + 1) for t in self.tracks
            ]
            given = [None if f is None else f[1] for f in found]
            one = next(value for value in given if value is not None)
            if chosen is None:
                chosen = self.draw(aim, one.numel() // (one.shape[axis] * size), self.sizes)
            shapes.append(tuple(one.movedim(axis, -1).shape[:-1]))
            at = chosen.at[batch]
            rows = [None if value is None else rows_at(value, axis, at) for value in given]
            values.append(self._mixed(aim, rows))
            if aim.through is not None:
                runs = [None if f is None else f[0] for f in found]
                through = [self._act(aim, *pair) for pair in zip(runs, rows)]
                acted.append(self._mixed(aim, through))
            for track in self.tracks:
                if track is not None:
                    track.rest(batch)
        assert chosen is not None, "there is a batch"
        return Goal(chosen, shapes, values, acted)

    def _mixed(self, aim: Aim, rows: Sequence[Tensor | None]) -> Tensor:
        axis = aim.axis_in(self.targets.mixer.balanced.networks[0])
        return self.targets.mix(aim.at, aim.producer.weight, axis, rows, -1)

    def _act(self, aim: Aim, run: Run | None, rows: Tensor | None) -> Tensor | None:
        """Return what the activation behind a contraction makes of one network's values."""
        if run is None or rows is None:
            return None
        node = next(n for n in run.network.module.graph.nodes if n.name == aim.through)
        return run.apply(node, run.network.inputs_of(node)[0], rows)

    def outputs(self, batch: int) -> list[Any]:
        """Go to the end with a batch, and return what each network gives; None for a silent one."""
        ends = [None if t is None else t.go(batch, len(t.order)) for t in self.tracks]
        return [None if end is None else end[1] for end in ends]


def _silent(mixer: Mixer, k: int) -> bool:
    """Tell whether a network gives nothing, but a structure at most."""
    gives = any(c.given.any() for (_, j), c in mixer.couplings.items() if j == k)
    return not (mixer.weights[k] or mixer.output_weights[k] or gives)
