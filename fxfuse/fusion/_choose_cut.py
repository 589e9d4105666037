"""Choose where networks of different tasks are cut, by what the result may cost.

The earlier the cut, the more of each network is its own: the result costs more and is nearer to the
networks. Of the cuts that a budget allows, the costliest few are therefore tried on a part of the
data, and the one whose heads come nearest to their networks on the rest is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from ..calibration.data import Calibration
from ..calibration.distance import Distance
from ..calibration.run import working_batch
from ..errors import ArgumentError, FuseError
from ..graph.cost import cost_of
from ..graph.inputs import as_example
from ..graph.modes import eval_mode
from ..graph.state import device_of
from ..graph.structures import tensors_in
from ..graph.trace import run_once
from ..ir import Alignment, Cost
from ..spaces.network import Network
from ._cut import cut_networks

TRIED = 3  # of the cuts that the budget allows, the costliest

Make = Callable[[str], fx.GraphModule]  # a layer to cut behind -> trunk and heads, on some data


def choose_cut(
    networks: Sequence[Network],
    alignment: Alignment,
    anchor: int,
    most: Cost,
    make: Make,
    held: Calibration,
) -> str:
    """Return the layer of the anchor behind which to cut.

    Args:
        networks: The whole networks.
        alignment: Of all their layers.
        anchor: The network whose layers are meant.
        most: What the result may cost, relative to the anchor.
        make: Fuses the networks, cut behind a layer, with a head for each.
        held: Samples to judge by.

    Raises:
        ArgumentError: If no cut costs as little.
    """
    whole = cost_of(networks[anchor].module, *networks[anchor].example)
    rows = [row for s in alignment.segments if s.slots for row in zip(*s.slots) if None not in row]
    costs: dict[str, Cost] = {}
    for name in [str(row[anchor]) for row in rows]:
        try:
            costs[name] = _estimate(networks, alignment, anchor, name) / whole
        except FuseError:  # more than one value crosses, or nothing is left behind
            continue
    tried: dict[str, float] = {}
    for name in sorted(costs, key=lambda n: costs[n].multiply_adds, reverse=True):
        if costs[name].within(most) and len(tried) < TRIED:
            fused = make(name)
            costs[name] = cost_of(fused, *networks[anchor].example) / whole
            if costs[name].within(most):
                tried[name] = _missed(networks, fused, held)
    if tried:
        return min(tried, key=tried.__getitem__)
    cheapest = min(costs.values(), key=lambda c: c.multiply_adds, default=Cost(1, 1))
    raise ArgumentError(
        f"a budget of {most.multiply_adds:g} times the multiply-adds and {most.parameters:g} times "
        f"the parameters of {networks[anchor].name}",
        where="the argument `heads`, after='auto'",
        expected=f"at least what the latest cut takes: {cheapest}",
        do="allow more, or leave `after` out to cut just before the last layer",
    )


def _estimate(networks: Sequence[Network], alignment: Alignment, anchor: int, after: str) -> Cost:
    """Return what a trunk with the anchor's layers, and all heads, cost."""
    trunks, _, heads = cut_networks(networks, alignment, anchor, after)
    total = cost_of(trunks[anchor].module, *trunks[anchor].example)
    for trunk, head in zip(trunks, heads):
        value = run_once(trunk.module, trunk.example, trunk.name)[0]
        total += cost_of(head.module, value, *(trunk.example[i] for i in head.inputs))
    return total


def _missed(networks: Sequence[Network], fused: fx.GraphModule, held: Calibration) -> float:
    """Return how far the heads are from their networks, summed over these."""
    apart = [Distance() for _ in networks]
    with torch.no_grad():
        for batch in held.chunks(working_batch(networks)):
            inputs = as_example(batch, device_of(fused))
            with eval_mode(fused):
                outputs = fused(*inputs)
            for distance, network, given in zip(apart, networks, outputs):
                distance.add(run_once(network.module, inputs, network.name), tensors_in(given))
    return sum(distance.mean for distance in apart)
