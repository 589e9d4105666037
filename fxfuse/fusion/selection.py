"""Choose the networks' weights by how near the fused network comes to their ensemble.

Units are mixed with the chosen weights; the outputs wanted stay those of the ensemble. In the units
of one network, the lead, a fused network with all weight on the lead computes just what the lead
computes; with any other weights, mixing loses something. Which weights are best, and which lead,
shows on samples that nothing is fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .._progress import tell
from ..calibration.counted import Counted
from ..calibration.data import Batch, Calibration
from ..calibration.distance import Distance
from ..calibration.run import working_batch
from ..coupling.mixing import Couplings
from ..graph.modes import eval_mode
from ..graph.state import device_of
from ..graph.structures import tensors_in
from ..spaces.network import Network

HELD = 4  # every fourth sample is held out to judge
STARTS, REFINEMENTS = (0.75, 1.0), 2  # shares of the lead to try; then, between the best ones
CLEARLY = 0.75  # a greater ratio of distances may be otherwise on other samples

Make = Callable[[int, Couplings, Calibration], Network]  # a way, its maps, data -> fused network


def nearest(ways: Sequence[Couplings], make: Make, data: Calibration) -> tuple[int, Couplings]:
    """Choose the way, and the weights, that bring the fused network nearest to the ensemble.

    Of several ways, the first is taken unless another comes nearer with the ensemble's weights; one
    with another lead must come clearly nearer. Then the weight of the lead is searched for between
    its share of the ensemble and 1; the others keep their proportions.

    Args:
        ways: The couplings of each way, with the weights of the ensemble.
        make: Makes the fused network of a way, with other weights, on some of the data.
        data: Calibration inputs; every fourth is held out, unless there are fewer than four.

    Returns:
        The index of the way, and its couplings with the chosen weights.
    """
    fit, held = data.parted(HELD) if data.samples >= HELD else (data, data)
    usual = ways[0].problem
    ensemble = [(w, n) for w, n in zip(usual.output_weights, usual.networks) if w]
    most, done = len(ways) + len(STARTS) + REFINEMENTS, 0

    def distance(way: int, share: float) -> float:
        nonlocal done
        network = make(way, _with_share(ways[way], share), fit)
        done += 1
        tell(done / most)
        return _distance(ensemble, network, held)

    equal = [way.problem.output_weights[way.problem.lead] for way in ways]
    first = [distance(i, share) for i, share in enumerate(equal)]
    margins = [1.0 if way.problem.lead == usual.lead else CLEARLY for way in ways]
    eligible = [i for i, margin in enumerate(margins) if not i or first[i] < margin * first[0]]
    best = min(eligible, key=first.__getitem__)
    tried = {equal[best]: first[best]}
    for share in [s for s in STARTS if s not in tried and s > min(tried)]:
        tried[share] = distance(best, share)
    for _ in range(REFINEMENTS):
        share = _between(tried)
        tried[share] = distance(best, share)
    tell(1.0)
    return best, _with_share(ways[best], min(tried, key=tried.__getitem__))


def _between(tried: dict[float, float]) -> float:
    """Return the middle between the best share and the better of its neighbours."""
    order = sorted(tried)
    best = order.index(min(tried, key=tried.__getitem__))
    neighbours = [order[i] for i in (best - 1, best + 1) if 0 <= i < len(order)]
    return (order[best] + min(neighbours, key=tried.__getitem__, default=order[best] / 2)) / 2


def _with_share(couplings: Couplings, share: float) -> Couplings:
    """Return the maps with a weight of the lead, and the others in proportion."""
    given, lead = couplings.problem.output_weights, couplings.problem.lead
    rest = sum(given) - given[lead]
    if rest <= 0:
        return couplings.weighted([float(k == lead) for k in range(len(given))])
    scale = (1 - share) / rest
    return couplings.weighted([share if k == lead else w * scale for k, w in enumerate(given)])


def _distance(ensemble: list[tuple[float, Network]], network: Network, data: Calibration) -> float:
    """Return how far a network's outputs are from a weighted mean of other networks' outputs.

    This is the divergence of class probabilities, or the relative error of other outputs.
    """
    size = working_batch([*(member for _, member in ensemble), network])
    return distances(ensemble, [network], data.chunks(size))[0].mean


def distances(
    ensemble: Sequence[tuple[float, Network]], networks: Sequence[Network], data: Iterable[Batch]
) -> list[Distance]:
    """Return how far the outputs of each network are from those of an ensemble.

    Args:
        ensemble: The share and the network of each member.
        networks: The networks that are compared with it; members among them are run once.
        data: Batches of inputs.
    """
    every = list(dict.fromkeys([*(member for _, member in ensemble), *networks]))
    apart = [Distance() for _ in networks]
    with torch.no_grad():
        for batch in data:
            outputs = {network: _outputs(network, batch) for network in every}
            parts = zip(*(outputs[member] for _, member in ensemble))
            mean = [sum(w * t for (w, _), t in zip(ensemble, each)) for each in parts]
            for distance, network in zip(apart, networks):
                distance.add(mean, outputs[network])
    return apart


def _outputs(network: Network, batch: Batch) -> list[Tensor]:
    """Return what a network gives, but whole numbers, which have no mean."""
    module = network.module
    with eval_mode(module):
        outputs = tensors_in(module(*(t.to(device_of(module)) for t in batch)))
    counted = Counted.of(batch)
    values = [counted.rows(t) for t in outputs if t.is_floating_point() or t.is_complex()]
    return [t.to(torch.promote_types(t.dtype, torch.float64)).cpu() for t in values]
