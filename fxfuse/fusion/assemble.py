"""From a problem to the fused network and its report: measure, couple, make room, emit, refit.

What was measured of the units is released once they are coupled: of wide networks it takes
gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array

from .._progress import Clock
from ..calibration.data import Calibration
from ..calibration.moments import Moments, correlation
from ..coupling.factors import factors_alike
from ..coupling.measure import Evidence, measure
from ..coupling.mixing import Couplings, Mixer
from ..coupling.plans import CouplingMethod
from ..coupling.problem import Problem
from ..coupling.sizes import sized_alike
from ..coupling.transport import GroundCosts
from ..depth.deepen import Balanced
from ..errors import ArgumentError, ModelError
from ..graph.state import not_finite
from ..graph.trace import run_once
from ..graph.verify import lint
from ..ir import Alignment, Coupling
from ..refit.emit import emit
from ..refit.moments import Outcome, Refit
from ..report.report import CouplingReport, Report, SpaceReport
from ..spaces.network import Network
from ..width.budget import Room, with_room
from ..width.growth import with_host, without_spare_units

OutputMoments = dict[str, list[Moments | None]]  # by node, of each network that has it


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen of the networks on the data, for the refit.

    Attributes:
        moments: Of their outputs at the nodes that the refit names.
        refit: The refit, which may have kept values of the networks.
    """

    moments: OutputMoments
    refit: Refit


def couple(
    problem: Problem,
    data: Calibration,
    coupling: CouplingMethod,
    mixer: Mixer | None,
    refit: Refit,
    clock: Clock,
    width: float,
    room: Room,
) -> tuple[Couplings, Seen, dict[str, str]]:
    """Measure and couple the units, and make room for those that are least alike.

    Args:
        problem: Networks of one structure.
        data: Calibration inputs.
        coupling: How the units of the networks are matched.
        mixer: What becomes of tensors in the same units; None for their weighted mean.
        refit: Says which moments it needs.
        clock: Times the stages.
        width: Of the fused network, relative to its anchor's.
        room: Which spaces get how much more width.

    Returns:
        The couplings; what the refit wanted to be seen of the networks; and the spaces that kept
        their width though more was asked for, with the reason.

    Raises:
        ArgumentError: If a width is given and the coupling chooses it.
    """
    if coupling.room is not None and width != 1:
        raise ArgumentError(
            f"width {width} and a coupling that says itself how many units there are",
            where="the argument `width`",
            expected="one of the two",
            do="leave the width out, and set the coupling's own limit",
        )
    problem = factors_alike(problem)
    with clock.stage("measure units"):
        samples = min(data.samples, refit.samples(problem.networks))
        same_width = width == 1 and coupling.room is None
        keeper = refit.keeps(problem, data, samples) if same_width else None
        settles = refit.settles(problem) if keeper is None else keeper.settles
        evidence = measure(problem, data, coupling.view, settles, samples, keeper)
    seen = Seen(evidence.outputs, refit if keeper is None else refit.using(keeper))
    with clock.stage("couple units"):
        couplings = replace(_coupled(problem, evidence, coupling), mixer=mixer)
    if width == 1:
        return couplings, seen, {}
    couplings = couplings.weighted(problem.weights)  # where there is room, all have a share
    with clock.stage("make room"):
        costs = GroundCosts(problem, evidence, correlation)
        couplings, narrow = with_room(couplings, width, costs, room)
    return couplings, seen, narrow


def _coupled(problem: Problem, evidence: Evidence, coupling: CouplingMethod) -> Couplings:
    """Couple the units, in a wider network if the coupling asks for room."""
    if coupling.room is None:
        return sized_alike(coupling(problem, evidence))
    couplings = sized_alike(coupling(with_host(problem, coupling.room), evidence))
    return without_spare_units(couplings, problem)


def make(
    couplings: Couplings, seen: Seen, data: Calibration, clock: Clock
) -> tuple[Network, Outcome]:
    """Emit the fused network and correct it on the data.

    Args:
        couplings: The maps of the networks.
        seen: What was seen of the networks, and how to correct the fused one.
        data: Calibration inputs.
        clock: Times the stages.
    """
    refit = seen.refit
    problem = couplings.problem
    samples = min(data.samples, refit.samples(problem.networks))
    count = len(problem.networks)  # one more than were measured, if the last is only a structure
    padded = {node: [*ms, *[None] * (count - len(ms))] for node, ms in seen.moments.items()}
    with clock.stage("emit"):
        module, plans = emit(couplings, padded)
    base = problem.structure
    fused = replace(base, name=f"the fusion of {base.name}", module=module)
    with clock.stage("refit"):
        return fused, refit(fused, couplings, plans, data, samples)


def require_sound(fused: Network) -> None:
    """Refuse a fused network that is broken.

    Raises:
        ModelError: If weights are not finite.
        PassError: If modules and parameters disagree.
    """
    if not_finite(fused.module):
        raise ModelError(
            "fused weights that are NaN or infinite",
            where=fused.name,
            expected="finite weights",
            do="check the activations of the models on the calibration data for overflow",
        )
    lint(fused.module)
    run_once(fused.module, fused.example, fused.name)


KEPT = 1 << 20  # entries of all maps together that a report keeps for pictures: 8 MiB


def report_on(
    alignment: Alignment,
    balanced: Balanced,
    anchor: int,
    couplings: Couplings,
    outcome: Outcome,
    clock: Clock,
    seeds: dict[str, int],
    narrow: dict[str, str],
) -> Report:
    """Sum up a fusion; a last network of the problem that only gives its structure is left out.

    Args:
        alignment: The layers that were matched.
        balanced: The networks once their depths were equal.
        anchor: Index of the network whose structure the fused network takes.
        couplings: The maps that it was made with.
        outcome: How near it came to the networks.
        clock: The time and memory that the stages took.
        seeds: Of what was drawn at random.
        narrow: The spaces that kept their width though more was asked for, with the reason.
    """
    problem, count = couplings.problem, len(alignment.names)
    maps = {key: c for key, c in couplings.maps.items() if key[1] < count}
    spaces = []
    for space in problem.structure.spaces:
        of_networks = [maps[space.name, k] for k in range(count)]
        present = problem.present[space.name]
        spaces.append(
            SpaceReport(
                name=space.name,
                size=space.size,
                costs=tuple(c.cost for c in of_networks),
                confidences=tuple(
                    c.confidence if has else None for c, has in zip(of_networks, present)
                ),
                sizes=tuple(s.size for s in problem.spaces[space.name][:count]),
                couplings=tuple(map(describe, of_networks)),
            )
        )
    return Report(
        alignment=alignment,
        anchor=anchor,
        weights=problem.weights[:count],
        spaces=tuple(spaces),
        frozen=problem.structure.spaces.frozen,
        errors=balanced.errors,
        seconds=dict(clock.seconds),
        layers=outcome.layers,
        divergence=outcome.divergence,
        seeds=seeds,
        removed=balanced.removed,
        narrow=narrow,
        memory=dict(clock.memory),
        lead=problem.lead,
        mixed=outcome.mixed,
        maps=_kept(maps),
    )


def describe(coupling: Coupling) -> CouplingReport:
    """Say in a word and two numbers what a coupling does."""
    matrix = csr_array(coupling.project, copy=True)
    matrix.eliminate_zeros()
    mass = float(coupling.given.sum())
    if not mass:
        return CouplingReport("absent", 0.0, 0.0)
    rows, columns = matrix.shape
    stays = float(matrix.diagonal().sum() / matrix.sum())
    whole = (np.bincount(matrix.indices, minlength=columns) <= 1).all()  # no unit is shared out
    if not whole or (np.diff(matrix.indptr) > 1).any():
        kind = "merging" if whole else "soft"
    elif matrix.nnz == rows == columns:
        kind = "identity" if stays == 1.0 else "permutation"
    else:
        kind = "one to one"
    return CouplingReport(kind, mass / max(rows, 1), stays)


def _kept(couplings: Mapping[tuple[str, int], Coupling]) -> dict[tuple[str, int], csr_array]:
    """Return the maps with the fewest entries, in single precision, up to a limit in all."""
    kept: dict[tuple[str, int], csr_array] = {}
    left = KEPT
    for key, coupling in sorted(couplings.items(), key=lambda item: item[1].project.nnz):
        left -= coupling.project.nnz
        if left < 0:
            break
        matrix = csr_array(coupling.project)
        indices = (x.astype(np.int32) for x in (matrix.indices, matrix.indptr))
        kept[key] = csr_array((matrix.data.astype(np.float32), *indices), shape=matrix.shape)
    return kept
