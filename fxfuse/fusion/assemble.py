"""From a problem to the fused network: measure, couple, make room, emit, refit.

What was measured of the units is released once they are coupled: of wide networks it takes
gigabytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .._progress import Clock
from ..calibration.data import Calibration
from ..calibration.moments import Moments, correlation
from ..coupling.measure import measure
from ..coupling.mixing import Couplings
from ..coupling.plans import CouplingMethod
from ..coupling.problem import Problem
from ..coupling.transport import GroundCosts
from ..errors import ModelError
from ..graph.state import not_finite
from ..graph.trace import run_once
from ..graph.verify import lint
from ..refit.emit import emit
from ..refit.moments import Outcome, Refit
from ..spaces.network import Network
from ..width.budget import Room, with_room
from .selection import nearest

OutputMoments = dict[str, list[Moments | None]]  # by node, of each network that has it


def couple(
    problem: Problem,
    data: Calibration,
    coupling: CouplingMethod,
    refit: Refit,
    clock: Clock,
    width: float,
    room: Room,
) -> tuple[Couplings, OutputMoments, dict[str, str]]:
    """Measure and couple the units, and make room for those that are least alike.

    Args:
        problem: Networks of one structure.
        data: Calibration inputs.
        coupling: How the units of the networks are matched.
        refit: Says which moments it needs.
        clock: Times the stages.
        width: Of the fused network, relative to its anchor's.
        room: Which spaces get how much more width.

    Returns:
        The couplings; the moments of the networks' outputs at the nodes that the refit names;
        and the spaces that kept their width though more was asked for, with the reason.
    """
    with clock.stage("measure units"):
        samples = min(data.samples, refit.samples(problem.networks))
        evidence = measure(problem, data, coupling.view, refit.settles(problem), samples)
    with clock.stage("couple units"):
        couplings = coupling(problem, evidence)
    if width == 1:
        return couplings, evidence.outputs, {}
    with clock.stage("make room"):
        costs = GroundCosts(problem, evidence, correlation)
        couplings, narrow = with_room(couplings, width, costs, room)
    return couplings, evidence.outputs, narrow


def make(
    couplings: Couplings, moments: OutputMoments, refit: Refit, data: Calibration, clock: Clock
) -> tuple[Network, Outcome]:
    """Emit the fused network and correct it on the data.

    Args:
        couplings: The maps of the networks.
        moments: Of the networks' outputs, at the nodes that the refit names.
        refit: How to correct the network.
        data: Calibration inputs.
        clock: Times the stages.
    """
    problem = couplings.problem
    samples = min(data.samples, refit.samples(problem.networks))
    count = len(problem.networks)  # one more than were measured, if the last is only a structure
    padded = {node: [*ms, *[None] * (count - len(ms))] for node, ms in moments.items()}
    with clock.stage("emit"):
        module, plans = emit(couplings, padded)
    base = problem.structure
    fused = replace(base, name=f"the fusion of {base.name}", module=module)
    with clock.stage("refit"):
        return fused, refit(fused, couplings, plans, data, samples)


def choose(
    ways: Sequence[tuple[Couplings, Refit]], moments: OutputMoments, data: Calibration, clock: Clock
) -> tuple[Couplings, Refit]:
    """Choose the way, and the weights, that come nearest to the networks' ensemble.

    Args:
        ways: What to choose from, the usual way first.
        moments: As for `make`.
        data: Calibration inputs; a part of them is held out to judge.
        clock: Times the stages.
    """

    def made(way: int, couplings: Couplings, part: Calibration) -> Network:
        return make(couplings, moments, ways[way][1], part, Clock(None))[0]

    with clock.stage("choose weights"):
        way, couplings = nearest([couplings for couplings, _ in ways], made, data)
    return couplings, ways[way][1]


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
