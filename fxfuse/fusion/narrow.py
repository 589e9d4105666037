"""Make one network smaller: keep units, drop the others or merge them, refit what is left.

References:
    Theus et al. 2024 (Intra-Fusion), structured pruning by transport; see `width.narrower`.
    Singh and Jaggi 2020 (OTFusion), who fuse a network into its pruned self.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scipy.sparse import csr_array
from torch import fx, nn

from .._checked import checked
from .._progress import Clock, Progress
from ..calibration.data import Calibration, prepare
from ..calibration.moments import correlation
from ..coupling.measure import View, measure
from ..coupling.mixing import Couplings
from ..coupling.problem import Problem
from ..depth.deepen import Balanced
from ..graph.calls import ToCall
from ..graph.compare import relative_error
from ..graph.trace import as_given, run_once, without_autocast
from ..ir import Coupling
from ..refit.emit import rescale
from ..refit.moments import AsMixed, Outcome, Refit
from ..refit.sweep import LeastSquares
from ..report.report import Nearness
from ..solvers import Exact
from ..spaces.network import Network
from ..width.importance import Importance, taylor
from ..width.narrower import (
    Budget,
    Pruned,
    Unit,
    pruned,
    same_units,
    smaller,
    transported,
    without_same,
)
from ..width.net2net import WidthReport
from ._guard import (
    MANY,
    Split,
    like_is_nearer,
    nearness,
    no_better_than_a_constant,
    split_to_judge,
    warn,
)
from .assemble import Seen, make, require_sound

REFIT = LeastSquares()


@checked()
@without_autocast()
def narrow(
    model: nn.Module,
    data: Any,
    *,
    to: float = 0.5,
    of: Unit = "width",
    like: nn.Module | None = None,
    importance: Importance = taylor,
    even: bool = True,
    merge: bool = False,
    refit: Refit | None = REFIT,
    inputs: ToCall | None = None,
    progress: Progress | bool | None = None,
) -> fx.GraphModule:
    """Return a smaller network that comes as near to a model as its size allows, without training.

    The units that count most stay, of units that are always equal one, and every layer is refitted
    to what the model computes on the data. Groups and heads stay as many as they are and lose units
    inside. What cannot be made narrower keeps its width; the report says what and why.

    Args:
        model: The network; not modified.
        data: Unlabelled inputs as for `fuse`, some hundreds. One batch is enough without a refit.
        to: What is to be left: up to 1 a share, above a number of what `of` says.
        of: What `to` counts: the units of each space, or of all if these compete; the multiply-adds
            of one sample; or parameters.
        like: A narrower network of the same structure, whose widths are taken instead. The
            result's state loads into its class.
        importance: How much units count: `fxfuse.width.taylor`, `activation` or `magnitude`.
        even: Narrow all spaces by one factor. If not, units compete by what they count for what
            they cost, wherever they are; of each space an eighth stays at least.
        merge: Merge units that are left out into those that are kept, by optimal transport
            (Intra-Fusion). If not, they are dropped, as structured pruning does.
        refit: How the result is corrected on the data; None to leave it as it was pruned or merged.
        inputs: As for `fuse`.
        progress: As for `fuse`.

    Returns:
        A `GraphModule`; its `meta["fxfuse"]` holds a `WidthReport`.

    Warns:
        FusionWarning: If the result is no nearer to the model on samples held out than the mean of
            the model's outputs is, or than `like` is.

    Raises:
        ArgumentError: If an argument is out of range, or nothing can be made narrower.
        PairingError: If `like` is of another structure.
        TraceError: If a model cannot be traced.
        DataError: If the data are empty, refused by the model, or not finite.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
        >>> small = narrow(net, torch.randn(64, 4), to=0.5)
        >>> [tuple(p.shape) for p in small.parameters() if p.dim() == 2]
        [(4, 4), (6, 4)]
        >>> small = narrow(net, torch.randn(64, 4), to=50, of="parameters")
        >>> sum(p.numel() for p in small.parameters())
        50
    """
    budget, clock = Budget(to, of), Clock(progress)
    models = [model] if like is None else [model, like]
    (network, *narrower), calibration = prepare(models, data, clock, to_call=inputs)
    split = split_to_judge(calibration, fits=refit is not None and refit.fits)
    with clock.stage("score units"):
        scores = without_same(importance(network, split.fit), same_units(network))
    with clock.stage("choose units"):
        if narrower:
            small, kept = narrower[0], dict[str, str]()
        else:
            small, kept = smaller(network, budget, None if even else scores)
        copied = pruned(network, small, scores)
    outcome, made = Outcome(), copied.plan.resized
    if merge or refit is not None:
        made, outcome = _mended(copied, split.fit, merge, refit or AsMixed(), clock)
    else:
        made = replace(made, module=copied.module)
    with clock.stage("compare with the model"):
        near, sentences = _judged(network, made, narrower, split, refit is not None)
    made.module.meta["fxfuse"] = WidthReport(
        sizes=copied.plan.sizes(),
        kept=kept,
        error=_error(network, made),
        layers=outcome.layers,
        nearness=near,
        warnings=sentences,
    )
    for sentence in sentences:
        warn(sentence)
    return as_given(model, made.module)


def _judged(
    network: Network, made: Network, like: Sequence[Network], split: Split, refitted: bool
) -> tuple[Nearness, tuple[str, ...]]:
    """Measure how near a narrower network comes to the model, and say so if that is not near."""
    alike = [n for n in like if _output_shapes(n) == _output_shapes(network)]
    near = nearness(made, alike, (1.0,), split, wanted=[network])
    ways = [
        ("leaving `refit` at its default", not refitted),
        ("merge=True", True),
        ("a larger `to`" if not like else "wider layers", True),
        ("more calibration samples", split.fit.samples < MANY),
    ]
    advice = " or ".join(way for way, helps in ways if helps)
    useless = no_better_than_a_constant(near, network, split.judge, "the narrower network", advice)
    nearer = (
        like_is_nearer(near, alike[0], f"{alike[0].name} itself or {advice}") if alike else None
    )
    return near, tuple(filter(None, (useless, nearer)))


def _output_shapes(network: Network) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in run_once(network.module, network.example, network.name)]


def _mended(
    copied: Pruned, data: Calibration, merge: bool, refit: Refit, clock: Clock
) -> tuple[Network, Outcome]:
    """Merge the units of a pruned network if asked to, and correct it on the data."""
    plan = copied.plan
    alone = Problem.of(Balanced((plan.original,), ((),), (0.0,)), 0, (1.0,))
    with clock.stage("measure units"):
        view = View(everything=True) if merge else None
        samples = min(data.samples, refit.samples(plan.problem.networks))
        evidence = measure(alone, data, view, refit.settles(alone), samples)
    with clock.stage("couple units"):
        pairs = evidence.pairs.items()
        costs = {name: correlation(list(places.values())) for (name, _, _), places in pairs}
        maps = transported(plan, copied.maps, costs, Exact())
        couplings = _couplings(plan.problem, maps)
    fused, outcome = make(couplings, Seen(evidence.outputs, refit), data, clock)
    rescale(fused, couplings)
    require_sound(fused)
    return fused, outcome


def _couplings(problem: Problem, maps: dict[tuple[str, int], Coupling]) -> Couplings:
    """Return maps of the network to the narrower one, which has nothing of its own to give."""
    present: dict[str, tuple[bool, ...]] = {
        name: (having[0], False) for name, having in problem.present.items()
    }
    nothing = {
        (name, 1): Coupling(csr_array((like.size,) * 2), csr_array((like.size,) * 2))
        for name, (_, like) in problem.spaces.items()
    }
    return Couplings(replace(problem, present=present), {**maps, **nothing})


def _error(network: Network, made: Network) -> float:
    """Return the largest difference of the outputs on the example, relative to the largest."""
    outputs = (run_once(n.module, n.example, n.name) for n in (network, made))
    return relative_error(*outputs)
