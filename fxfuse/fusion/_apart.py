"""Fuse networks of different tasks: a fused trunk, and what each network does behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import fx, nn

from .._progress import Clock, counted
from ..calibration.data import Calibration
from ..coupling.mixing import Couplings
from ..graph.cost import cost_per_sample
from ..graph.names import with_given_names
from ..graph.trace import copy_modes, copy_precision, with_arguments
from ..ir import Alignment, Cost
from ..refit.moments import Refit
from ..report.report import Report
from ..spaces.network import Network
from ._choose_cut import choose_cut
from ._cut import AUTO, cut_networks
from ._fit_heads import refitted
from ._guard import HELD_OUT
from .assemble import require_sound
from .heads import Heads, Separate, grafted


def fuse_apart(
    models: Sequence[nn.Module],
    networks: Sequence[Network],
    alignment: Alignment,
    anchor: int,
    heads: Heads,
    data: Calibration,
    way: Callable[..., tuple[Network, Couplings, Report]],
    refit: Refit,
    clock: Clock,
) -> tuple[fx.GraphModule, Report]:
    """Fuse networks of different tasks up to a layer, and refit what each does behind it.

    Args:
        models: The models.
        networks: The same, traced.
        alignment: Which of their layers correspond.
        anchor: Index of the network whose structure the trunk takes.
        heads: Where they are cut, and what becomes of what is behind.
        data: Calibration inputs.
        way: Fuses the trunks.
        refit: How heads are corrected.
        clock: Times the stages.
    """
    if heads.after == AUTO:
        most = Cost(heads.multiply_adds, heads.parameters)
        rest, held = data.parted(HELD_OUT)

        def make(after: str) -> fx.GraphModule:
            cut, quiet = Separate(after), Clock(None)
            fused, _ = fuse_apart(models, networks, alignment, anchor, cut, rest, way, refit, quiet)
            return fused

        with clock.stage("choose the cut"):
            after = choose_cut(networks, alignment, anchor, most, make, held)
        heads = replace(heads, after=after)
    trunks, alignment, tails = cut_networks(networks, alignment, anchor, heads.after)
    trunk, couplings, report = way(trunks, alignment, data=data, clock=clock)
    fused = copy_modes(models[anchor], trunk.module)
    layers, apart = list(report.layers), []
    with clock.stage("refit heads"):
        grafts, modules = grafted(fused, couplings, tails), []
        for k, graft in enumerate(counted(grafts)):
            module, outcome = refitted(graft, trunks[k], trunk, data, refit)
            modules.append(copy_modes(models[k], module))
            layers += [replace(fit, node=f"heads.{k}.{fit.node}") for fit in outcome.layers]
            apart.append(outcome.divergence)
    with clock.stage("attach heads"):
        heads(fused, couplings, tails, modules)
        require_sound(replace(trunk, name="the fused network", module=fused))
        cost = cost_per_sample(fused, trunk.example)
        with_arguments(models[anchor], fused)
        fused = with_given_names(copy_precision(models[anchor], fused))
    return fused, replace(
        report,
        heads=tuple(graft.how for graft in grafts),
        layers=tuple(layers),
        apart=tuple(apart),
        cost=cost,
        seconds=clock.seconds,
        memory=clock.memory,
    )
