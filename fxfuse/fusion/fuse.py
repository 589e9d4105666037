"""The entry functions: `fuse`, `align`, `balance` and their variants. Start reading here.

`fuse` prepares networks and data, aligns layers, and judges the result. Between these,
`_fuse_networks` gives the networks one structure, and `_fuse_balanced` couples their units, emits
one network and refits it. With `heads`, only the trunks go this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal
from zlib import crc32

from torch import Tensor, fx, nn

from .._checked import checked
from .._progress import Clock, Progress
from .._ranks import require_alike, taken_from_first
from ..alignment.align import Pairs, align_networks
from ..alignment.aligners import Aligner, monotone
from ..alignment.layer_costs import LayerCost, linear_cka
from ..alignment.layers import partition
from ..calibration.data import Calibration, prepare
from ..coupling.mixing import Couplings, Mixer
from ..coupling.plans import CouplingMethod
from ..coupling.problem import Problem
from ..coupling.transport import Transport
from ..depth.deepen import Balanced, Balancing, deepen, made_neutral, made_whole
from ..errors import ArgumentError
from ..graph.calls import ToCall
from ..graph.cost import cost_per_sample
from ..graph.trace import as_given, without_autocast
from ..ir import Alignment, Segment
from ..refit.emit import rescale
from ..refit.finish import Finish
from ..refit.moments import Refit
from ..refit.sweep import LeastSquares
from ..report.report import Report
from ..spaces.network import Network
from ..width.budget import Room, deepest_first, require_width
from ._across import Company, company_of, require_use_of_guests
from ._apart import fuse_apart
from ._arguments import anchor_of, is_automatic, shares_for, shares_of
from ._configuration import changed_configuration
from ._cut import trunk_segments
from ._finished import finished, require_outputs
from ._guard import (
    Split,
    advice_for,
    lost_heads,
    nearness,
    split_to_judge,
    warned,
    without_repeats,
)
from .assemble import couple, make, report_on, require_sound
from .heads import Heads, require_heads
from .selection import Candidate, Choice


@dataclass(frozen=True)
class Method:
    """The choices that make a fusion method; call it like `fuse`.

    Attributes:
        aligner: Cost matrix of a segment to the alignment of its layers (see `fxfuse.alignment`).
        layer_cost: How unlike two layers are (see `fxfuse.alignment`).
        balancing: How networks of different depth get one structure: `deepen`, which is exact, or
            `Shorten(...)`.
        coupling: How the units of the networks are matched (see `fxfuse.coupling`).
        mixer: What becomes of tensors that lie in the same units: a mixer, such as
            `fxfuse.mixers.Ties()`; None for their weighted mean.
        refit: How the fused network is corrected on the data: `LeastSquares(...)`, or
            `MatchMoments(...)`.
        room: Which layers a wider network widens: `fxfuse.width.deepest_first`, or `evenly` if it
            is to have the widths of an architecture.
        absent_as_zero: Whether layers that a network lacks count as zeros in the mean.
        anchor: From the depths of all networks to the index of the anchor, where the caller names
            none. None for the deepest network, or the widest if the coupling asks for it.
    """

    aligner: Aligner = monotone
    layer_cost: LayerCost = linear_cka
    balancing: Balancing = deepen
    coupling: CouplingMethod = Transport(agreement=4.0, by_index=True)
    mixer: Mixer | None = None
    refit: Refit = LeastSquares()
    room: Room = deepest_first
    absent_as_zero: bool = False
    anchor: Callable[[Sequence[int]], int] | None = None

    def __call__(
        self, models: Sequence[nn.Module] | None = None, data: Any = None, **options: Any
    ) -> fx.GraphModule:
        """Fuse models by this method; takes the arguments of `fuse`."""
        if models is None:
            raise ArgumentError(
                "a method that is called without networks",
                where="Method.__call__",
                expected="the networks and the data",
                do="hand the method over as it is: fxfuse.fuse(models, data, method=method)",
            )
        return fuse(models, data, method=self, **options)

    @property
    def seeds(self) -> dict[str, int]:
        """The seeds of the choices that have one."""
        seeds = {f.name: getattr(getattr(self, f.name), "seed", None) for f in fields(self)}
        return {name: seed for name, seed in seeds.items() if isinstance(seed, int)}

    def usual_anchor(self, networks: Sequence[Network]) -> int:
        """Return the anchor where the caller names none: the deepest, or the widest."""
        parts = [partition(n) for n in networks]
        depths = [sum(len(s.layers) for s in segments) for segments in parts]
        if self.anchor is not None:
            return self.anchor(depths)
        widths = [0] * len(parts)
        if self.coupling.widest:
            widths = [sum(max(x.width for x in s.layers) for s in part) for part in parts]
        inside = [len(n.weights) for n in networks]  # layers inside blocks, where depths are equal
        order = list(zip(widths, depths, inside))
        return order.index(max(order))


# every network counts fully in every unit, and many positions, as one trunk holds several tasks
FAIR = Method(coupling=Transport(), refit=LeastSquares(rows=256))


def _chosen(method: Method | str | None, default: Method = Method()) -> Method:
    """Return the method that a caller chose, by itself or by its name."""
    chosen: Any = default if method is None else method
    chosen = _preset(chosen) if isinstance(chosen, str) else chosen
    if isinstance(chosen, Method):
        return chosen
    raise ArgumentError(
        f"a {type(chosen).__name__} as a method",
        where="the argument `method`",
        expected="a fxfuse.Method, or its name, such as 'zipit'",
        do="leave it out for the best one; call what is no Method: presets.hmt(models, data)",
    )


def _preset(name: str) -> Callable[..., fx.GraphModule]:
    """Return what the presets call so."""
    from ..presets import NAMED, method_named  # these use `fuse`

    return method_named(name, NAMED)


@checked("heads", "weights")
@without_autocast()
def fuse(
    models: Sequence[nn.Module],
    data: Any,
    *,
    alignment: Alignment | None = None,
    weights: Sequence[float] | Literal["auto"] | None = None,
    width: float = 1.0,
    anchor: int | None = None,
    method: Method | str | None = None,
    heads: Heads | None = None,
    across: bool = False,
    finish: Finish | None = None,
    inputs: ToCall | None = None,
    progress: Progress | bool | None = None,
) -> fx.GraphModule:
    """Fuse trained networks of different depth and width into one.

    Args:
        models: One or more networks with the same inputs, and with the same outputs unless `heads`
            are given; not modified.
        data: Unlabelled calibration inputs: a tensor `(N, ...)` or an iterable of batches, each a
            tensor, a tuple that starts with the arguments of forward, a mapping from their names,
            or a dictionary that forward takes as it is. If weights are fitted to 128 samples and
            more, some are held out to judge the result by.
        alignment: Which layers correspond; found by `align` if not given.
        weights: Non-negative share of each network, normalised to sum 1; equal if not given. With
            "auto", the result is what comes nearest to the equal ensemble on samples held out: the
            fused network, the same with its last layer just mixed, the average of weights of the
            same name, or a network of the result's size, as it is or with its last layer fitted to
            the ensemble. Of these, only the anchor counts if it is given.
        width: Of the fused network, relative to the anchor's: it takes at most the multiply-adds of
            the anchor with all layers made so much wider. Units that are least like their matches
            are not mixed but kept beside each other, the deepest layers first (`Method(room=)`).
            With `float("inf")` all are, and the outputs are exactly the mean of the networks' (with
            `heads`, each network's own), but for norms over units, groups and heads, which keep
            their width. With `heads`, it is the trunk that is wider.
        anchor: Index of the network whose widths and coordinates the result takes; the deepest if
            not given (of a zip, the widest).
        method: The choices along the way, or the name of a preset, such as "zipit"; the default is
            the best one known (with heads, `FAIR`).
        heads: For networks of different tasks: fuse them up to a layer, and keep a head for each
            (`fxfuse.heads.Separate`) or one for the labels of all (`fxfuse.heads.Union`).
        across: Take networks of other kinds than the anchor's, too, if their outputs are the same.
            They give no weights: their outputs, and their features at the last resolution that both
            have, are targets that the anchor's layers are refitted to.
        finish: A short training behind all this, of all weights to the weighted mean of the
            networks' outputs, such as `fxfuse.refit.Finish(seconds=10)` or `Finish(steps=200)`.
        inputs: From a batch to args, kwargs of forward, where batches are none of these.
        progress: True to draw bars, or what is called with the name of a stage and the share of it
            that is done.

    Returns:
        An ordinary `GraphModule` with the module names of the network whose structure it has, and
        `heads.0`, `heads.1` ... if each network keeps its own. Its `meta["fxfuse"]` holds a
        `Report`.

    Warns:
        FusionWarning: If a network that is no larger than the result alone is nearer to their
            ensemble on samples held out, a head is no nearer to its network than a constant, all
            samples are one, or `width` changes nothing.

    Raises:
        ArgumentError: If an argument is out of range or of the wrong number.
        TraceError: If a model cannot be traced.
        ModelError: If weights are not finite, or outputs differ in shape and no heads are chosen.
        DataError: If the data are empty, refused by a model, or not finite.
        PairingError: If the networks do not belong to one family (without `across`), or cannot be
            cut where asked.
        PassError: If a layer that one network lacks can be neither neutral nor passed by, or
            nothing can take the place of one that is to be removed.

    Example:
        >>> import torch
        >>> def net(*widths):
        ...     pairs = zip((4, *widths), widths)
        ...     hidden = [m for i, o in pairs for m in (nn.Linear(i, o), nn.ReLU())]
        ...     return nn.Sequential(*hidden, nn.Linear(widths[-1], 3))
        >>> fused = fuse([net(8, 8, 6), net(5, 5)], torch.randn(64, 4))
        >>> [tuple(p.shape) for p in fused.parameters() if p.dim() == 2]
        [(8, 4), (8, 8), (6, 8), (3, 6)]
    """
    if isinstance(method, str) and not isinstance(preset := _preset(method), Method):
        options = {"alignment": alignment, "weights": weights, "anchor": anchor, "heads": heads}
        _require_one_task(across, finish, heads, method)
        data = data if inputs is None else Calibration(data, models=models, to_call=inputs)
        wider = None if width == 1 else width
        return preset(models, data, **options, width=wider, progress=progress)
    method, clock = _chosen(method, Method() if heads is None else FAIR), Clock(progress)
    _require_one_task(across, finish, heads, method)
    automatic = is_automatic(weights, apart=heads is not None)
    shares = shares_of(None if isinstance(weights, str) else weights, models)
    require_width(width)
    shares = shares_for(method.mixer, shares, width, automatic)

    networks, samples = prepare(models, data, clock, heads is not None, inputs)
    index = anchor_of(anchor, method.usual_anchor(networks), len(networks))
    samples, *said = without_repeats(samples)
    chooses = automatic or finish is not None
    split = split_to_judge(samples, method.refit.fits and heads is None, chooses)
    company = company_of(networks, shares, index, samples, method.balancing, across)
    way = partial(_fuse_networks, company=company, width=width, method=method)

    if heads is None:
        alignment = alignment or _aligned(company.family, samples, method, clock)
        leads = (company.leads if anchor is None else company.leads[:1]) if automatic else []
        network, report = _fuse_and_judge(company, alignment, split, leads, finish, way, clock)
        fused = as_given(models[index], network.module)
        report = replace(report, configuration=changed_configuration(models[index], fused))
    else:
        require_heads(heads, networks)
        front = trunk_segments(networks, index, heads.after)
        alignment = alignment or _aligned(networks, samples, method, clock, front)
        fused, report = fuse_apart(
            models, networks, alignment, index, heads, samples, way, method.refit, clock
        )
        said.append(lost_heads(report, networks, split.judge))

    _require_one_result(fused)
    report = replace(report, costs=tuple(cost_per_sample(n.module, n.example) for n in networks))
    advice = advice_for(automatic, width, method == Method(), samples.samples)
    fused.meta["fxfuse"] = warned(report, said, width, models, fused, advice)
    return fused


def _require_one_task(
    across: bool, finish: Finish | None, heads: Heads | None, method: Method | str
) -> None:
    """Refuse guests and a finish for several tasks, or by a method that knows of neither."""
    known = isinstance(method, Method)
    require_use_of_guests(across, heads, method.refit if isinstance(method, Method) else method)
    require_outputs(finish, heads if known else method)


def _fuse_and_judge(
    company: Company,
    alignment: Alignment,
    split: Split,
    leads: Sequence[int],
    finish: Finish | None,
    way: Callable[..., Any],
    clock: Clock,
) -> tuple[Network, Report]:
    """Fuse networks of one task, choosing if units may be those of any, and judge the result."""
    choice = Choice(company.networks, company.shares, split.judge, leads) if leads else None
    network, couplings, report = way(
        company.family, alignment, split.fit, clock=clock, choice=choice
    )
    report = company.reported(report, couplings.problem.guests)
    if finish is not None:
        with clock.stage("finish"):
            done = finished(network, company.networks, company.shares, split, finish)
        report = replace(report, finished=done)
    with clock.stage("compare with the ensemble"):
        near = nearness(network, company.networks, company.shares, split)
    return network, replace(report, nearness=near, seconds=clock.seconds, memory=clock.memory)


def _require_one_result(fused: fx.GraphModule) -> None:
    """Give all processes the same network; refuse those that came to different structures."""
    state = fused.state_dict()
    text = str([(name, tuple(t.shape)) for name, t in state.items() if isinstance(t, Tensor)])
    require_alike([crc32(text.encode())], "fused networks")
    taken_from_first([t for t in state.values() if isinstance(t, Tensor)])


def _fuse_networks(
    networks: Sequence[Network],
    alignment: Alignment,
    data: Calibration,
    *,
    company: Company,
    width: float,
    method: Method,
    clock: Clock,
    choice: Choice | None = None,
) -> tuple[Network, Couplings, Report]:
    """Give networks one structure, and make one network of them.

    Args:
        networks: The traced networks of the family.
        alignment: Which of their layers correspond.
        data: Calibration inputs.
        company: Says which of them is the anchor, what each counts, and who else is heard.
        width: Of the result, relative to the anchor's.
        method: The choices along the way.
        clock: Times the stages.
        choice: What to choose by; None to take the fused network.
    """
    balanced = _balanced(networks, alignment, data, method, clock)
    weighted = [k for k, share in enumerate(company.shares_inside) if share > 0]
    if len(weighted) == 1:
        balanced = made_whole(balanced, weighted[0], data)
    problem = Problem.of(balanced, company.anchor, company.shares_inside, method.absent_as_zero)
    problem = replace(problem, guests=company.guests_of(problem.structure))
    fused, couplings, report = _fuse_balanced(
        problem, alignment, balanced, data, method, clock, width, choice
    )
    return fused, couplings, replace(report, cost=cost_per_sample(fused.module, fused.example))


def _fuse_balanced(
    problem: Problem,
    alignment: Alignment,
    balanced: Balanced,
    data: Calibration,
    method: Method,
    clock: Clock,
    width: float = 1.0,
    choice: Choice | None = None,
) -> tuple[Network, Couplings, Report]:
    """Couple, emit and refit; take another network if it is to be chosen, and is nearer.

    Args:
        problem: The balanced networks, what each counts, and who else is heard.
        alignment: Which of their layers correspond.
        balanced: The networks, with what balancing did to them.
        data: Calibration inputs.
        method: The choices along the way.
        clock: Times the stages.
        width: Of the result, relative to the anchor's.
        choice: What to choose by; None to take the fused network.
    """
    couplings, seen, narrow = couple(
        problem, data, method.coupling, method.mixer, method.refit, clock, width, method.room
    )
    fused, outcome = make(couplings, seen, data, clock)
    rescale(fused, couplings)
    candidates: dict[str, float] = {}
    if choice is not None:
        usual = Candidate("the fused network", fused, couplings, outcome)
        with clock.stage("choose"):
            best, candidates = choice(usual, balanced, method.refit, data)
        fused, couplings, outcome = best.network, best.couplings, best.outcome
    require_sound(fused)
    report = report_on(
        alignment, balanced, problem.anchor, couplings, outcome, clock, method.seeds, narrow
    )
    return fused, couplings, replace(report, candidates=candidates)


def _aligned(
    networks: Sequence[Network],
    data: Calibration,
    method: Method,
    clock: Clock,
    segments: Sequence[tuple[Segment, ...]] | None = None,
) -> Alignment:
    """Align layers by a method, of all segments if none are given; measure only what decides."""
    choices = method.aligner, method.layer_cost
    with clock.stage("align layers"):
        return align_networks(networks, data, *choices, measure_all=False, segments=segments)


def _balanced(
    networks: Sequence[Network],
    alignment: Alignment,
    data: Calibration,
    method: Method,
    clock: Clock,
) -> Balanced:
    """Give networks one structure by a method."""
    with clock.stage("balance depths"):
        return method.balancing(networks, alignment, data)


def fuse_along(
    models: Sequence[nn.Module],
    data: Any,
    weights: Iterable[Sequence[float]],
    *,
    alignment: Alignment | None = None,
    anchor: int | None = None,
    method: Method | str | None = None,
    inputs: ToCall | None = None,
    progress: Progress | bool | None = None,
) -> Iterator[fx.GraphModule]:
    """Fuse networks with several sets of weights, one after the other; analyse them once.

    Args:
        models: As for `fuse`.
        data: As for `fuse`.
        weights: For each fusion, the weights as for `fuse`.
        alignment: As for `fuse`.
        anchor: As for `fuse`.
        method: As for `fuse`.
        inputs: As for `fuse`.
        progress: As for `fuse`.

    Yields:
        What `fuse` returns for each set of weights.
    """
    method, clock = _chosen(method), Clock(progress)
    all_shares = [shares_for(method.mixer, shares_of(w, models), 1.0, False) for w in weights]
    networks, calibration = prepare(models, data, clock, to_call=inputs)
    index = anchor_of(anchor, method.usual_anchor(networks), len(networks))
    alignment = alignment or _aligned(networks, calibration, method, clock)
    balanced = _balanced(networks, alignment, calibration, method, clock)
    equal = [1 / len(networks)] * len(networks)
    problem = Problem.of(balanced, index, equal, method.absent_as_zero)
    prepared = dict(clock.seconds)
    for shares in all_shares:
        clock.seconds = dict(prepared)  # each fusion reports its own
        shared = replace(problem, weights=shares, output_weights=shares)
        network, _, report = _fuse_balanced(shared, alignment, balanced, calibration, method, clock)
        fused = as_given(models[index], network.module)
        fused.meta["fxfuse"] = report
        yield fused


@checked()
@without_autocast()
def align(
    models: Sequence[nn.Module],
    data: Any,
    *,
    method: Method | str | None = None,
    pairs: Sequence[Pairs | None] = (),
    inputs: ToCall | None = None,
    progress: Progress | bool | None = None,
) -> Alignment:
    """Find which layers of networks of different depth correspond.

    Args:
        models: Two or more networks; not modified.
        data: Calibration inputs, as for `fuse`.
        method: The choices along the way.
        pairs: Pairs by hand, for two models: per segment, as in `Alignment.pairs`, every layer of
            the shallower model with its layer of the deeper one, by name. A segment with None, or
            without an entry, is left to the method.
        inputs: As for `fuse`.
        progress: True to draw bars, or what is called with the name of a stage and the share of it
            that is done.

    Returns:
        The alignment; print it, draw it, or hand it to `fuse`.

    Raises:
        PairingError: If the segments of the networks do not pair.
        ArgumentError: If pairs by hand are not strictly increasing, incomplete or of layers of
            different kinds.

    Example:
        >>> import torch
        >>> def net(depth):
        ...     hidden = [m for _ in range(depth) for m in (nn.Linear(4, 4), nn.ReLU())]
        ...     return nn.Sequential(*hidden, nn.Linear(4, 3))
        >>> models, data = [net(3), net(2)], torch.randn(64, 4)
        >>> align(models, data).pairs
        [[('0', '0'), ('4', '2')], [('6', '4')]]
        >>> align(models, data, pairs=[[("2", "0"), ("4", "2")]]).pairs
        [[('2', '0'), ('4', '2')], [('6', '4')]]
    """
    method, clock = _chosen(method), Clock(progress)
    networks, calibration = prepare(models, data, clock, True, inputs)
    choices = method.aligner, method.layer_cost
    with clock.stage("align layers"):
        return align_networks(networks, calibration, *choices, pairs=pairs)


@checked()
@without_autocast()
def balance(
    models: Sequence[nn.Module],
    data: Any,
    *,
    alignment: Alignment | None = None,
    method: Method | str | None = None,
    inputs: ToCall | None = None,
    progress: Progress | bool | None = None,
) -> list[fx.GraphModule]:
    """Give networks of different depth one structure.

    By default, layers that do nothing are inserted and no function changes, but for rounding and a
    bend of about 1e-5 where activations are smooth. The method may choose another way, such as
    `Method(balancing=Shorten())`.

    Args:
        models: The networks; not modified.
        data: Calibration inputs, as for `fuse`.
        alignment: Which layers correspond; found by `align` if not given.
        method: The choices along the way.
        inputs: As for `fuse`.
        progress: True to draw bars, or what is called with the name of a stage and the share of it
            that is done.

    Returns:
        One `GraphModule` per network, equal node for node and name for name, each computing what
        its model computes (nearly, where the method removes layers).

    Raises:
        PairingError: If the networks do not belong to one family.
        PassError: If a layer that one network lacks has no neutral form, or nothing can take the
            place of one that is to be removed.
        NotEquivalent: If the function of a network that keeps its layers would change.
    """
    method, clock = _chosen(method), Clock(progress)
    networks, calibration = prepare(models, data, clock, to_call=inputs)
    alignment = alignment or _aligned(networks, calibration, method, clock)
    balanced = _balanced(networks, alignment, calibration, method, clock)
    balanced = made_neutral(balanced, calibration)
    pairs = zip(balanced.networks, models)
    return [as_given(model, n.module) for n, model in pairs]


@checked()
def net2deeper(
    model: nn.Module,
    like: nn.Module,
    data: Any,
    alignment: Alignment | None = None,
    *,
    inputs: ToCall | None = None,
) -> fx.GraphModule:
    """Return a network of the depth of another: the depth-aligned shallow network.

    It computes what the model computes, at the model's widths, with neutral layers where only the
    other network has layers. If the widths agree, its state loads into the deeper class.

    Args:
        model: The network; not modified.
        like: The deeper network; not modified.
        data: Calibration inputs, as for `fuse`.
        alignment: Which layers correspond, of `[model, like]`; found by `align` if not given.
        inputs: As for `fuse`.

    Raises:
        PairingError: If the networks do not belong to one family.
        PassError: If a layer that the network lacks has no neutral form.
        NotEquivalent: If the function would change.

    Example:
        >>> import torch
        >>> def net(*widths):
        ...     pairs = zip((4, *widths), widths)
        ...     hidden = [m for i, o in pairs for m in (nn.Linear(i, o), nn.ReLU())]
        ...     return nn.Sequential(*hidden, nn.Linear(widths[-1], 3))
        >>> shallow, deep, x = net(5, 5), net(5, 5, 5), torch.randn(64, 4)
        >>> deeper = net2deeper(shallow, deep, x)
        >>> deep.load_state_dict(deeper.state_dict())
        <All keys matched successfully>
        >>> torch.allclose(deep(x), shallow(x), atol=1e-5)
        True
    """
    return balance([model, like], data, alignment=alignment, inputs=inputs)[0]
