"""Match several networks to each other rather than all of them to one.

The fused units are then nobody's: every network, the anchor too, has a map to them, and the maps
between two networks that lead over them are consistent around every cycle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .ascent import Ascent, Start, inner
from .coupling import Plans, two_maps
from .mixing import Mixer
from .progress import Tick, counted, in_parts, rounds, silent
from .solvers import Assignment
from .weightwise import Weights

Free = Mapping[int, Sequence[str]]


def spaces_to_join(mixer: Mixer) -> Free:
    """Settle the spaces that a network lacks; return, per network, those that it has."""
    match = mixer.match
    plans = Plans(match, Assignment(), two_maps, mixer.couplings)
    free: dict[int, list[str]] = {k: [] for k in range(len(mixer.weights))}
    for name in match.spaces:
        for k, here in enumerate(match.present[name]):
            if here:
                free[k].append(name)
            elif any(match.present[name]) or k != match.base[name]:
                plans.drop(name, k)
            else:
                plans.keep(name, k)
    return free


def join(weights: Weights, free: Free, start: Start, tick: Tick = silent) -> None:
    """Start each network against the sum of those before it, the first where it is."""
    order = by_content(weights)
    for i, k in enumerate(counted(order, tick)):
        ascent = Ascent(weights, k, sum_of(weights, order[:i]), free[k])
        if i:
            start(ascent)
        else:
            ascent.keep()


def merge_in_turn(
    weights: Weights,
    free: Free,
    limit: int,
    sweeps: int,
    rng: np.random.Generator,
    tick: Tick = silent,
) -> None:
    """Match each network to the sum of the others, in random order, until none moves."""
    order = by_content(weights)
    for turn in rounds(limit, tick):
        moved = False
        for k, step in in_parts([order[i] for i in rng.permutation(len(order))], turn):
            targets = sum_of(weights, [j for j in order if j != k])
            moved |= Ascent(weights, k, targets, free[k]).run(sweeps, rng, step)
        if not moved:
            return


def by_content(weights: Weights) -> list[int]:
    """Return the networks in an order that depends on their weights, not on that of the list."""
    norms = [[inner(t, t) for _, t in sorted(s.items())] for s in weights.states]
    return sorted(range(len(norms)), key=lambda k: norms[k])


def sum_of(weights: Weights, networks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return every tensor summed over the networks that have it, all axes mapped."""
    found: dict[str, np.ndarray] = {}
    for k in networks:
        for tensor in weights.states[k]:
            value = weights.carried(tensor, k)
            found[tensor] = found[tensor] + value if tensor in found else value
    return found
