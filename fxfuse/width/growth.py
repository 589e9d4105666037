"""Room for couplings that say themselves how many units the fused network has.

Such a coupling is given a problem with a host: one more network, of no weight, with the structure
of the anchor and room for more units. Once the units are coupled, the host shrinks to those in use.

References:
    Wang et al. 2020 (FedMA), whose global layers grow while clients are matched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from scipy.sparse import csr_array

from ..coupling.mixing import Couplings
from ..coupling.problem import Problem
from ..ir import Coupling
from ..spaces.network import Network
from .budget import fixed_spaces, host_of, hosted, sized
from .reshape import change_most


def with_host(problem: Problem, limit: float) -> Problem:
    """Return the problem with a host, in whose units the fused ones are counted.

    Spaces that cannot have any number of units keep the anchor's units.

    Args:
        problem: The networks.
        limit: How many units the host has, relative to the widest network; never more than all
            networks have together.
    """
    base, anchor = problem.structure, problem.anchor
    fixed, more = fixed_spaces(base), {}
    for name, spaces in problem.spaces.items():
        sizes = [s.size for s, has in zip(spaces, problem.present[name]) if has]
        if name not in fixed and sizes:
            most = min(math.ceil(limit * max(sizes)), sum(sizes))
            more[name] = max(most - spaces[anchor].size, 0)
    host, kept = host_of(base, more)
    wider = hosted(problem, host)
    bases = {
        name: problem.base[own.name] if own.name in fixed | kept else wider.anchor
        for name, own in ((name, spaces[anchor]) for name, spaces in wider.spaces.items())
    }
    return replace(wider, base=bases)


def without_spare_units(couplings: Couplings, problem: Problem) -> Couplings:
    """Return couplings to a host that has the units in use only.

    A space that cannot have exactly so many keeps what is spare; nothing reads it.

    Args:
        couplings: Those of a problem with a host.
        problem: The same problem without one.
    """
    before, anchor = couplings.problem, problem.anchor
    used = {name: _used(couplings, name, len(problem.networks)) for name in before.spaces}
    names = {name: spaces[anchor].name for name, spaces in before.spaces.items()}
    host = before.structure
    full = {names[name]: spaces[before.anchor].size for name, spaces in before.spaces.items()}
    wanted = {names[name]: max(int(rows.sum()), 1) for name, rows in used.items()}

    def shrunk(chosen: set[str]) -> Network:
        return sized(problem.structure, full | {name: wanted[name] for name in chosen})

    smaller = [name for name in full if wanted[name] < full[name]]
    small, kept = change_most(smaller, shrunk)
    after = hosted(problem, small or host)
    of_anchor = {spaces[anchor].name: name for name, spaces in after.spaces.items()}
    maps = {}
    for name, rows in used.items():
        shrinks = names[name] in smaller and names[name] not in kept
        chosen = np.flatnonzero(rows) if shrinks else np.arange(len(rows))
        chosen = chosen if len(chosen) else np.arange(1)
        for k in range(len(problem.networks)):
            maps[of_anchor[names[name]], k] = _taken(couplings.maps[name, k], chosen)
        nothing = csr_array((len(chosen), len(chosen)))
        maps[of_anchor[names[name]], after.anchor] = Coupling(nothing, nothing)
    return replace(couplings, problem=after, maps=maps)


def _used(couplings: Couplings, name: str, count: int) -> np.ndarray:
    """Return which fused units of a space any network gives anything to."""
    maps: Mapping[tuple[str, int], Coupling] = couplings.maps
    given = sum(abs(maps[name, k].project).sum(1) for k in range(count))
    used: np.ndarray = np.asarray(given).ravel() > 0
    return used


def _taken(coupling: Coupling, units: np.ndarray) -> Coupling:
    """Return a coupling to some of the fused units."""
    project = csr_array(csr_array(coupling.project)[units])
    unproject = csr_array(csr_array(coupling.unproject)[:, units])
    gains = None if coupling.gains is None else coupling.gains[units]
    return Coupling(project, unproject, coupling.cost, gains)
