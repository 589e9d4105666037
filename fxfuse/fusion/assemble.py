"""From balanced networks to the fused one: measure, couple, make room, emit, refit.

What a fusion did, in plain facts, and how to see them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from scipy.sparse import csr_array
from torch import fx

from .._progress import Clock, unheard
from ..calibration.data import Calibration
from ..coupling.measure import Measurements, measure
from ..coupling.mixing import Mixer
from ..coupling.plans import CouplingMethod
from ..errors import ModelError
from ..graph.trace import run_once
from ..graph.verify import lint
from ..ir import Alignment, Coupling
from ..refit.emit import emit
from ..refit.moments import Outcome, Refit, finite, rescale
from ..report.report import CouplingReport, Report, SpaceReport
from ..spaces.network import Network
from ..width.budget import Room, deepest_first, distances, widened
from .selection import CLEARLY, Way, nearest

KEPT = 1 << 20  # entries of all maps together that a report keeps for pictures: 8 MiB


def assemble(
    mixer: Mixer,
    data: Calibration,
    coupling: CouplingMethod,
    refit: Refit,
    clock: Clock,
    *,
    width: float = 1.0,
    room: Room = deepest_first,
    weigh: bool = False,
    leads: Sequence[int] = (),
) -> tuple[fx.GraphModule, Mixer, Outcome, dict[str, str]]:
    """Make the fused network.

    Args:
        mixer: The balanced networks; their couplings are filled in.
        data: Calibration inputs.
        coupling: How the units of the networks find each other.
        refit: How the fused network is corrected.
        clock: Told what is being done.
        width: Of the fused network, relative to its anchor's.
        room: Which spaces get how much of it.
        weigh: Choose the weights of the units, and the variant of the refit, by how near the
            outputs come to the ensemble's.
        leads: Other networks whose units the fused ones may be instead, if that is chosen, too.

    Returns:
        The network, the maps it was made with, how near it came, and the spaces that kept their
        width though more was asked for, with the reason.
    """
    mixer, measured, kept = _coupled(mixer, data, coupling, refit, clock, width, room)
    if weigh:
        ways = [(mixer, refit)]
        if width == 1:
            ways += [(mixer, variant) for variant in getattr(refit, "variants", ())]
            for match in filter(None, (mixer.match.led_by(k) for k in leads)):
                other = replace(mixer, match=match, couplings={})
                ways.append((_coupled(other, data, coupling, refit, clock)[0], refit))
        found = [
            Way(m, partial(_network, measured, r), CLEARLY if m is not mixer else 1.0)
            for m, r in ways
        ]
        with clock.stage("choose weights"):
            chosen, mixer = nearest(found, data)
        refit = ways[chosen][1]
    fused, outcome = _made(mixer, measured, data, refit, clock)
    rescale(fused, mixer)
    require_sound(fused)
    return fused.module, mixer, outcome, kept


def _coupled(
    mixer: Mixer,
    data: Calibration,
    coupling: CouplingMethod,
    refit: Refit,
    clock: Clock,
    width: float = 1.0,
    room: Room = deepest_first,
) -> tuple[Mixer, Measurements, dict[str, str]]:
    """Couple the units and make room; return what was measured, too, and what kept its width."""
    with clock.stage("measure units"):
        samples = min(data.samples, refit.samples(mixer.balanced.networks))
        outputs = refit.settles(mixer)
        measured = measure(mixer.balanced, mixer.match, data, coupling.view, outputs, samples)
    with clock.stage("couple units"):
        with unheard():
            apart = distances(mixer, measured) if width > 1 else {}
        coupling(mixer, measured)
    if width > 1:
        with clock.stage("make room"):
            mixer, kept = widened(mixer, width, apart, room)
        return mixer, measured, kept
    return mixer, measured, {}


def _made(
    mixer: Mixer, measured: Measurements, data: Calibration, refit: Refit, clock: Clock
) -> tuple[Network, Outcome]:
    """Emit and refit."""
    base = mixer.balanced.networks[mixer.anchor]
    samples = min(data.samples, refit.samples(mixer.balanced.networks))
    more = len(mixer.weights) - max((len(m) for m in measured.outputs.values()), default=0)
    outputs = {node: [*found, *[None] * more] for node, found in measured.outputs.items()}
    with clock.stage("emit"):
        module, plans = emit(mixer, outputs)
    fused = replace(base, name=f"the fusion of {base.name}", module=module)
    with clock.stage("refit"):
        return fused, refit(fused, mixer, plans, data, samples)


def _network(measured: Measurements, refit: Refit, mixer: Mixer, data: Calibration) -> Network:
    return _made(mixer, measured, data, refit, Clock(None))[0]


def require_sound(fused: Network) -> None:
    """Refuse a network that cannot be handed out.

    Raises:
        ModelError: If weights are not finite.
        PassError: If modules and parameters disagree.
    """
    if not finite(fused.module):
        raise ModelError(
            "fused weights that are NaN or infinite",
            where=fused.name,
            expected="finite weights",
            do="check the activations of the models on the calibration data for overflow",
        )
    lint(fused.module)
    run_once(fused.module, fused.example, fused.name)


def report_on(
    mixer: Mixer,
    anchor: int,
    alignment: Alignment,
    outcome: Outcome,
    clock: Clock,
    heads: tuple[str, ...] = (),
    seeds: dict[str, int] | None = None,
    kept: dict[str, str] | None = None,
) -> Report:
    """Sum up a fusion, without the network that only gave its structure, if there was one."""
    base, count = mixer.balanced.networks[mixer.anchor].spaces, len(alignment.names)
    spaces = []
    for space in base:
        found = [mixer.couplings[space.name, k] for k in range(count)]
        here = mixer.match.present[space.name][:count]
        sure = tuple(c.confidence if p else None for c, p in zip(found, here))
        sizes = tuple(s.size for s in mixer.match.spaces[space.name][:count])
        costs, described = tuple(c.cost for c in found), tuple(map(describe, found))
        spaces.append(SpaceReport(space.name, space.size, costs, sure, sizes, described))
    return Report(
        alignment=alignment,
        anchor=anchor,
        weights=tuple(mixer.weights[:count]),
        spaces=tuple(spaces),
        frozen=base.frozen,
        errors=mixer.balanced.errors[:count],
        seconds=dict(clock.seconds),
        heads=heads,
        layers=outcome.layers,
        divergence=outcome.divergence,
        seeds=seeds or {},
        removed=mixer.balanced.removed,
        memory=dict(clock.memory),
        maps=_kept({key: c for key, c in mixer.couplings.items() if key[1] < count}),
        narrow=kept or {},
        lead=mixer.match.lead,
        mixed=outcome.mixed,
    )


def describe(coupling: Coupling) -> CouplingReport:
    """Say in a word and two numbers what a coupling does."""
    matrix = csr_array(coupling.project, copy=True)
    matrix.eliminate_zeros()
    mass = float(matrix.sum())
    if not mass:
        return CouplingReport("absent", 0.0, 0.0)
    rows, columns = matrix.shape
    stays = float(matrix.diagonal().sum()) / mass
    used = np.bincount(matrix.indices, minlength=columns)
    if (np.diff(matrix.indptr) <= 1).all() and (used <= 1).all():
        whole = matrix.nnz == rows == columns
        kind = ("identity" if stays == 1.0 else "permutation") if whole else "one to one"
    else:
        kind = "merging" if (used <= 1).all() else "soft"
    return CouplingReport(kind, mass / max(rows, 1), stays)


def _kept(couplings: Mapping[tuple[str, int], Coupling]) -> dict[tuple[str, int], csr_array]:
    """Return the maps with the fewest entries, in single precision, up to a limit in all."""
    found: dict[tuple[str, int], csr_array] = {}
    left = KEPT
    for key, coupling in sorted(couplings.items(), key=lambda item: item[1].project.nnz):
        left -= coupling.project.nnz
        if left < 0:
            break
        matrix = csr_array(coupling.project)
        found[key] = csr_array(
            (
                matrix.data.astype(np.float32),
                matrix.indices.astype(np.int32),
                matrix.indptr.astype(np.int32),
            ),
            shape=matrix.shape,
        )
    return found
