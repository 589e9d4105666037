"""Choose the networks' weights by how near the fused network comes to their ensemble.

Units are mixed with the chosen weights, outputs stay those of the ensemble. A fused network in the
units of one network, the lead, computes what this one does at no loss, and anything between the
networks at some: on samples that nothing is fitted to, the best place between the two shows, and
whose units are the best to lead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .data import Batch, Calibration
from .mixing import Mixer
from .network import Network
from .statistics import working_batch
from .tracing import device_of, tensors_in

HELD = 4  # every fourth sample judges
STARTS, REFINEMENTS = (0.75, 1.0), 2  # shares of the lead; between the best ones
CLEARLY = 0.75  # of what the first lead misses: ratios above it say nothing on other samples

Make = Callable[[Mixer, Calibration], Network]


def nearest(
    options: Sequence[Mixer],
    make: Make,
    data: Calibration,
    tick: Callable[[float], None] | None = None,
) -> Mixer:
    """Return the networks with the weights that bring the fused one nearest to their ensemble.

    Of several options the first is taken, unless another comes clearly nearer with the ensemble's
    weights. Then the weight of the lead is searched for between its share of the ensemble and all;
    the others keep their proportions.

    Args:
        options: The networks and their maps, in the units of one network or another; the weights
            are those of the ensemble.
        make: Makes the fused network from some of the data.
        data: Calibration inputs; every fourth is held out, unless there are less than four.
        tick: Called with the share of the search that is done.
    """
    fit, held = data.parted(HELD) if data.samples >= HELD else (data, data)
    given = options[0].output_weights
    voices = [(w, n) for w, n in zip(given, options[0].balanced.networks) if w]
    most, done = len(options) + len(STARTS) + REFINEMENTS, 0

    def missed(mixer: Mixer, share: float) -> float:
        nonlocal done
        network = make(_with_share(mixer, share), fit)
        done += 1
        if tick is not None:
            tick(done / most)
        return _distance(voices, network, held)

    options = [replace(mixer, ensemble=given) for mixer in options]
    first = [missed(mixer, given[mixer.match.lead]) for mixer in options]
    best = first.index(min(first))
    if first[best] > CLEARLY * first[0]:
        best = 0
    mixer = options[best]
    found = {given[mixer.match.lead]: first[best]}
    for share in [s for s in STARTS if s not in found and s > min(found)]:
        found[share] = missed(mixer, share)
    for _ in range(REFINEMENTS):
        share = _between(found)
        found[share] = missed(mixer, share)
    if tick is not None:
        tick(1.0)
    return _with_share(mixer, min(found, key=found.__getitem__))


def _between(found: dict[float, float]) -> float:
    """Return the middle between the best share and the better of its neighbours."""
    order = sorted(found)
    best = order.index(min(found, key=found.__getitem__))
    beside = [order[i] for i in (best - 1, best + 1) if 0 <= i < len(order)]
    return (order[best] + min(beside, key=found.__getitem__, default=order[best] / 2)) / 2


def _with_share(mixer: Mixer, share: float) -> Mixer:
    """Return the networks with a weight of the lead, the others in proportion."""
    given, lead = mixer.output_weights, mixer.match.lead
    rest = sum(given) - given[lead]
    scale = (1 - share) / rest if rest > 0 else 0.0
    weights = [share if k == lead else w * scale for k, w in enumerate(given)]
    if rest <= 0:
        weights[lead] = 1.0
    return replace(mixer, weights=tuple(weights))


def _distance(voices: list[tuple[float, Network]], network: Network, data: Calibration) -> float:
    """Return how far outputs are from a weighted mean of networks' outputs.

    That is the divergence of class probabilities, or the relative error of other outputs; what it
    holds does not grow with the number of samples.
    """
    networks = [*(other for _, other in voices), network]
    wrong = power = 0.0
    with torch.no_grad():
        for batch in data.chunks(working_batch(networks)):
            outputs = [_outputs(n, batch) for n in networks]
            own = outputs.pop()
            mean = [sum(w * t for (w, _), t in zip(voices, each)) for each in zip(*outputs)]
            a, b = _missed(mean, own)
            wrong, power = wrong + a, power + b
    return wrong / max(power, 1e-300)


def _outputs(network: Network, batch: Batch) -> list[Tensor]:
    module = network.module.eval()
    found = tensors_in(module(*(t.to(device_of(module)) for t in batch)))
    return [t.double().cpu() for t in found]


def _missed(wanted: list[Tensor], found: list[Tensor]) -> tuple[float, float]:
    """Return what outputs miss, summed over a batch, and what that is relative to."""
    if len(wanted) == 1 and wanted[0].dim() == 2 and wanted[0].shape[1] > 1:
        mean, own = (t[0].log_softmax(1) for t in (wanted, found))
        return float((mean.exp() * (mean - own)).sum()), float(len(mean))
    pairs = list(zip(wanted, found))
    return (
        sum(float((a - b).square().sum()) for a, b in pairs),
        sum(float(a.square().sum()) for a, _ in pairs),
    )
