"""Gather what the stages of a fusion did into a `Report`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.sparse import csr_array

from .._progress import Clock
from ..coupling.mixing import Couplings
from ..depth.deepen import Balanced
from ..ir import Alignment, Coupling
from ..refit.moments import Outcome
from ..report.report import CouplingReport, Report, SpaceReport

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
    mass = float(matrix.sum())
    if not mass:
        return CouplingReport("absent", 0.0, 0.0)
    rows, columns = matrix.shape
    stays = float(matrix.diagonal().sum()) / mass
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
