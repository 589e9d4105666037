"""Choose the networks' weights by how near the fused network comes to their ensemble.

Units are mixed with the chosen weights, outputs stay those of the ensemble. A fused network of the
anchor's widths computes what the anchor does at no loss, and anything between the networks at some:
on samples that nothing is fitted to, the best place between the two shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .data import Calibration
from .mixing import Mixer
from .network import Network
from .statistics import batch_size
from .tracing import device_of, tensors_in

HELD = 4  # every fourth sample judges
STARTS, REFINEMENTS = (0.7, 0.85, 0.95, 1.0), 2  # shares of the anchor; between the best ones

Make = Callable[[Mixer, Calibration], Network]


def nearest(
    mixer: Mixer,
    anchor: int,
    make: Make,
    data: Calibration,
    tick: Callable[[float], None] | None = None,
) -> Mixer:
    """Return the networks with the weights that bring the fused one nearest to their ensemble.

    The anchor's weight is searched for between its share of the ensemble and all; the others keep
    their proportions.

    Args:
        mixer: The networks and their maps; its weights are those of the ensemble.
        anchor: The network of whose units the fused ones are.
        make: Makes the fused network from some of the data.
        data: Calibration inputs; every fourth is held out, unless there are less than four.
        tick: Called with the share of the search that is done.
    """
    fit, held = data.parted(HELD) if data.samples >= HELD else (data, data)
    mixer = replace(mixer, ensemble=mixer.output_weights)
    voices = [(w, n) for w, n in zip(mixer.output_weights, mixer.balanced.networks) if w]
    wanted = _outputs(voices, held)
    start = mixer.output_weights[anchor]
    found: dict[float, float] = {}
    shares = [start, *(share for share in STARTS if share > start)]
    total = len(shares) + REFINEMENTS
    for _ in range(total):
        share = shares[len(found)] if len(found) < len(shares) else _between(found)
        network = make(_with_share(mixer, anchor, share), fit)
        found[share] = _distance(wanted, _outputs([(1.0, network)], held))
        if tick is not None:
            tick(len(found) / total)
    return _with_share(mixer, anchor, min(found, key=found.__getitem__))


def _between(found: dict[float, float]) -> float:
    """Return the middle between the best share and the better of its neighbours."""
    order = sorted(found)
    best = order.index(min(found, key=found.__getitem__))
    beside = [order[i] for i in (best - 1, best + 1) if 0 <= i < len(order)]
    return (order[best] + min(beside, key=found.__getitem__, default=order[best] / 2)) / 2


def _with_share(mixer: Mixer, anchor: int, share: float) -> Mixer:
    """Return the networks with a weight of the anchor, the others in proportion."""
    given = mixer.output_weights
    rest = sum(given) - given[anchor]
    scale = (1 - share) / rest if rest > 0 else 0.0
    weights = [share if k == anchor else w * scale for k, w in enumerate(given)]
    if rest <= 0:
        weights[anchor] = 1.0
    return replace(mixer, weights=tuple(weights))


def _outputs(voices: list[tuple[float, Network]], data: Calibration) -> list[Tensor]:
    """Return the weighted mean of networks' outputs, each `(samples, ...)`."""
    found: list[list[Tensor]] = []
    networks = [network for _, network in voices]
    with torch.no_grad():
        for batch in data.chunks(batch_size(networks, 1 << 24, 128)):
            total: list[Tensor] = []
            for weight, network in voices:
                module = network.module.eval()
                inputs = [t.to(device_of(module)) for t in batch]
                parts = [weight * t.cpu() for t in tensors_in(module(*inputs)) if t.dim()]
                total = [a + b for a, b in zip(total, parts)] if total else parts
            found.append(total)
    return [torch.cat(parts) for parts in zip(*found)]


def _distance(wanted: list[Tensor], found: list[Tensor]) -> float:
    """Return the divergence of class probabilities, or the relative error of other outputs."""
    if len(wanted) == 1 and wanted[0].dim() == 2 and wanted[0].shape[1] > 1:
        mean, own = (t[0].double().log_softmax(1) for t in (wanted, found))
        return float((mean.exp() * (mean - own)).sum(1).mean())
    wrong = sum(float((a - b).double().square().sum()) for a, b in zip(wanted, found))
    return wrong / max(sum(float(a.double().square().sum()) for a in wanted), 1e-300)
