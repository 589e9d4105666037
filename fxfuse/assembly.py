"""From balanced networks to the fused one: measure, couple, make room, emit, refit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import fx

from .budget import distances, widened
from .checks import lint
from .coupling import CouplingMethod
from .data import Calibration
from .emit import emit
from .errors import ModelError
from .intake import Clock
from .measuring import Measurements, measure
from .mixing import Mixer
from .network import Network
from .refit import Outcome, Refit, finite
from .rescaling import rescale
from .room import Room, deepest_first
from .tracing import run_once
from .weighing import CLEARLY, Way, nearest


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
        clock.start("choose weights")
        found = [
            Way(m, partial(_network, measured, r), CLEARLY if m is not mixer else 1.0)
            for m, r in ways
        ]
        chosen, mixer = nearest(found, data, clock.tick)
        refit = ways[chosen][1]
    fused, outcome = _made(mixer, measured, data, refit, clock)
    rescale(fused, mixer)
    require_sound(fused)
    return cleaned(fused.module), mixer, outcome, kept


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
    clock.start("measure units")
    samples = min(data.samples, refit.samples(mixer.balanced.networks))
    outputs = refit.settles(mixer)
    measured = measure(
        mixer.balanced, mixer.match, data, coupling.view, outputs, samples, clock.tick
    )
    clock.start("couple units")
    apart = distances(mixer, measured) if width > 1 else {}
    coupling(mixer, measured, clock.tick)
    if width > 1:
        clock.start("make room")
        mixer, kept = widened(mixer, width, apart, room)
        return mixer, measured, kept
    return mixer, measured, {}


def _made(
    mixer: Mixer, measured: Measurements, data: Calibration, refit: Refit, clock: Clock
) -> tuple[Network, Outcome]:
    """Emit and refit."""
    base = mixer.balanced.networks[mixer.anchor]
    samples = min(data.samples, refit.samples(mixer.balanced.networks))
    clock.start("emit")
    more = len(mixer.weights) - max((len(m) for m in measured.outputs.values()), default=0)
    outputs = {node: [*found, *[None] * more] for node, found in measured.outputs.items()}
    module, plans = emit(mixer, outputs, clock.tick)
    clock.start("refit")
    fused = replace(base, name=f"the fusion of {base.name}", module=module)
    return fused, refit(fused, mixer, plans, data, samples, clock.tick)


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


def cleaned(module: fx.GraphModule) -> fx.GraphModule:
    """Take the traces of the work out of a graph that is handed to the user."""
    for node in module.graph.nodes:
        for key in ("inserted", "neutral_to"):
            node.meta.pop(key, None)
    return module
