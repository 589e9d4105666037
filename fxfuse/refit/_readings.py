"""The inputs and outputs of the networks' own layers, contraction by contraction, in fused units.

Fits of one layer at a time need no run of the fused network: the networks run over the data once,
and stop at each contraction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._progress import tell
from ..calibration.affine import Producer
from ..calibration.data import Calibration
from ..calibration.positions import Positions
from ..calibration.rows import input_rows, output_rows
from ..calibration.run import Track, working_batch
from ..calibration.spill import SpillStore
from ..coupling.mixing import Couplings
from ..spaces.network import Network
from ._targets import Aim, Draw, Targets, aims_of, in_units

FRONTIER = 1 << 29  # bytes of values that wait in memory


@dataclass(frozen=True, eq=False)
class Reading:
    """A contraction in all networks, at a sample of its positions.

    Attributes:
        producer: The contraction.
        sample: The positions.
        shares: Of each network in what the contraction is to give; 0 where it has none.
        inputs: `(groups, positions, inputs)` what each network's contraction reads, in the fused
            network's units; None without a share.
        outputs: `(positions, units)` what it gives, behind its norm, in the fused network's units.
        read: `(groups, 1, inputs)` the shares of the networks that have each input.
        given: `(units,)` those of the networks that have each unit of the outputs.
    """

    producer: Producer
    sample: Positions
    shares: Sequence[float]
    inputs: Sequence[Tensor | None]
    outputs: Sequence[Tensor | None]
    read: Tensor
    given: Tensor

    @property
    def mean_input(self) -> Tensor:
        """`(groups, positions, inputs)`, of the networks that have each input."""
        return self._mean(self.inputs) / self.read

    @property
    def mean_output(self) -> Tensor:
        """`(positions, units)`, of the networks that have each unit."""
        return self._mean(self.outputs) / self.given

    def _mean(self, parts: Sequence[Tensor | None]) -> Tensor:
        having = [w * part for w, part in zip(self.shares, parts) if part is not None]
        return torch.stack(having).sum(0)


def readings(
    fused: Network, couplings: Couplings, data: Calibration, samples: int, draw: Draw
) -> Iterator[Reading]:
    """Show each contraction of one weight that is used once, in the order of the network.

    Args:
        fused: The fused network; only its structure counts.
        couplings: The maps of the networks that it is made of.
        data: Calibration inputs.
        samples: How many of the first ones.
        draw: Chooses positions of a contraction.
    """
    targets = Targets(couplings)
    order, aims = aims_of(fused)
    place = {node.name: i for i, node in enumerate(order)}
    given = data.everywhere(), samples, working_batch([fused, *targets.problem.networks])
    with torch.no_grad(), SpillStore(FRONTIER) as store:
        tracks = []
        for network, bypass in zip(targets.problem.networks, targets.bypasses):
            nodes = sorted(network.module.graph.nodes, key=lambda n: place[n.name])
            tracks.append(Track(network, *given, nodes, store, bypass))
        for done, node in enumerate(order):
            aim = aims.get(node.name)
            if aim is not None and not aim.shared and not aim.beside:
                reading = _reading(fused, targets, aim, tracks, place, draw)
                if reading is not None:
                    yield reading
            tell((done + 1) / len(order))


def _reading(
    fused: Network,
    targets: Targets,
    aim: Aim,
    tracks: Sequence[Track],
    place: dict[str, int],
    draw: Draw,
) -> Reading | None:
    """Take all networks to a contraction; None if what they read or give does not correspond.

    Args:
        fused: The fused network.
        targets: Carries values into its units.
        aim: The contraction.
        tracks: The networks on their way over the data.
        place: The place of each node in the order of the way.
        draw: Chooses positions of a contraction.
    """
    producer, sizes = aim.producer, tracks[0].sizes
    source = fused.inputs_of(fused.nodes[producer.node])[0].name
    reads = 1 if producer.affine.kernel else len(fused.shapes[source]) - 1
    gives = aim.axis_in(fused)
    ends = (source, reads), (producer.joint, gives)
    if not all(targets.fits(*end) for end in ends):
        return None
    inputs: list[list[Tensor]] = [[] for _ in tracks]
    outputs: list[list[Tensor]] = [[] for _ in tracks]
    sample, shares = None, [0.0] * len(tracks)
    maps = [[targets.map_of(*end, k) for k in range(len(tracks))] for end in ends]
    for batch, size in enumerate(sizes):
        values = [_values(producer, source, track, batch, place) for track in tracks]
        shares = targets.shares(producer.joint, producer.weight, [z for _, z in values])
        for k, (x, z) in enumerate(values):
            if not shares[k] or x is None or z is None:
                continue
            if sample is None:
                sample = draw(aim, z.numel() // (z.shape[gives] * size), tracks[0])
            sample.keep_below(batch, z.numel() // z.shape[gives])
            x, z = in_units(maps[0][k], x, reads), in_units(maps[1][k], z, gives)
            inputs[k].append(input_rows(x, producer.affine, sample.at[batch]))
            outputs[k].append(output_rows(z, gives, sample.at[batch]))
    if sample is None or {len(x) for x in inputs} - {0, len(sizes)}:
        return None
    having = [w if x else 0.0 for w, x in zip(shares, inputs)]
    rows, goals = (
        [sample.joined(parts) if parts else None for parts in side] for side in (inputs, outputs)
    )
    device = next(part.device for part in rows if part is not None)
    masses = [torch.as_tensor(targets.mass(*end, having)).float() for end in ends]
    masses = [mass.to(device) for mass in masses]
    taps = math.prod(producer.affine.kernel)
    read = masses[0].view(producer.affine.groups, 1, -1).repeat(1, 1, taps)
    return Reading(producer, sample, having, rows, goals, read, masses[1])


def _values(
    producer: Producer, source: str, track: Track, batch: int, place: dict[str, int]
) -> tuple[Any, Any]:
    """Take one network to where a contraction is complete; return what it reads and gives."""
    run, _ = track.go(batch, place[producer.node])
    x = run.value_of(source)
    x = x.clone() if x is not None else None
    _, z = track.go(batch, place[producer.joint] + 1)
    track.rest(batch)
    return x, z
