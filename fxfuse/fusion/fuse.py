"""What a caller hands in: models and data made ready, weights and anchor checked.

The entry functions; they read as the way of the data: trace, align, balance, assemble.

Copies of one network that are deeper, wider or narrower.

The first two keep its function; the third is a start for fusing a network into a smaller one.

References:
    Chen et al. 2016 (Net2Net).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import fx, nn

from .._progress import Clock, Progress
from ..alignment.align import Pairs, align_networks
from ..alignment.aligners import Aligner, monotone
from ..alignment.layer_costs import LayerCost, linear_cka
from ..alignment.layers import partition
from ..calibration.data import Calibration
from ..calibration.prepare import take_in
from ..coupling.mixing import Correspondence, Mixer, correspond
from ..coupling.plans import CouplingMethod
from ..coupling.transport import Transport
from ..depth.deepen import Balanced, Balancing, deepen
from ..errors import ArgumentError
from ..graph.trace import copy_modes, plain_modes
from ..ir import Alignment
from ..refit.moments import Refit
from ..refit.sweep import LeastSquares
from ..spaces.network import Network
from ..width.budget import Room, deepest_first, require_width
from ._cut import Head, cut_networks, trunk_segments
from .assemble import assemble, report_on, require_sound
from .heads import Heads, require_heads


def is_automatic(weights: Sequence[float] | str | None, apart: bool) -> bool:
    """Tell whether the weights are to be chosen.

    Args:
        weights: As for `fuse`.
        apart: Whether the networks are of different tasks.

    Raises:
        ArgumentError: If they are a word that means nothing.
    """
    if isinstance(weights, str) and (weights != "auto" or apart):
        raise ArgumentError(
            f"weights '{weights}'" + (" for networks of different tasks" if apart else ""),
            where="the argument `weights`",
            expected="numbers, or 'auto' for networks of one task, which have an ensemble",
            do="give one number for each model, or leave them out for equal weights",
        )
    return weights == "auto"


def shares_of(weights: Sequence[float] | None, models: Sequence[nn.Module]) -> tuple[float, ...]:
    """Return the share of each model, sum 1; refuse what is no weights."""
    count = len(models) if isinstance(models, Sequence) else 0
    given = [1.0] * count if weights is None else [float(w) for w in weights]
    total = sum(given)
    good = all(w >= 0 for w in given) and (0 < total < float("inf") or not count)
    if len(given) != count or not good:
        raise ArgumentError(
            f"weights {given}",
            where="the argument `weights`",
            expected=f"{count} non-negative numbers, one for each model, not all zero",
            do="leave them out for equal weights",
        )
    return tuple(w / total for w in given)


def anchor_of(given: int | None, default: int, count: int) -> int:
    """Return the index of the anchor; refuse what is no index."""
    if given is None:
        return default
    if isinstance(given, int) and 0 <= given < count:
        return given
    raise ArgumentError(
        f"anchor {given!r}",
        where="the argument `anchor`",
        expected=f"an index from 0 to {count - 1}",
        do="leave it out to take the deepest network",
    )


@dataclass(frozen=True)
class Method:
    """The choices that make a fusion method; call it like `fuse`.

    Attributes:
        aligner: Cost matrix of a segment to the alignment of its layers (see `aligners`).
        layer_cost: How unlike two layers are (see `layer_costs`).
        balancing: How networks of different depth get one structure: `deepen`, which is exact, or
            `Shorten(...)`.
        coupling: How the units of the networks find each other, and how far each has a say.
        refit: How the fused network is corrected on the data: `LeastSquares(...)`, or by its
            moments alone.
        room: Where the units of a wider network get their places: `room.deepest_first`, or
            `room.evenly` if it is to have the widths of an architecture.
        absent_as_zero: Let layers that a network lacks pull the others' towards zero.
        anchor: Which network's widths the fused one takes, when the caller does not say: from all
            depths to an index. None for the deepest, or the widest if the coupling asks for it.
    """

    aligner: Aligner = monotone
    layer_cost: LayerCost = linear_cka
    balancing: Balancing = deepen
    coupling: CouplingMethod = Transport(agreement=4.0)
    refit: Refit = LeastSquares()
    room: Room = deepest_first
    absent_as_zero: bool = False
    anchor: Callable[[Sequence[int]], int] | None = None

    def __call__(self, models: Sequence[nn.Module], data: Any, **options: Any) -> fx.GraphModule:
        """Fuse models by this method; takes the arguments of `fuse`."""
        return fuse(models, data, method=self, **options)


FAIR = Method(coupling=Transport())  # every network has its full say in every unit


@plain_modes()
def fuse(
    models: Sequence[nn.Module],
    data: Any,
    *,
    alignment: Alignment | None = None,
    weights: Sequence[float] | Literal["auto"] | None = None,
    width: float = 1.0,
    anchor: int | None = None,
    method: Method | None = None,
    heads: Heads | None = None,
    progress: Progress | None = None,
) -> fx.GraphModule:
    """Fuse trained networks of different depth and width into one.

    Args:
        models: One or more networks with the same inputs, and with the same outputs unless `heads`
            are given; not modified.
        data: Unlabelled calibration inputs: a tensor `(N, ...)` or an iterable of batches, each a
            tensor or a tuple, list or dict whose first entry is the input.
        alignment: Which layers correspond; found by `align` if not given.
        weights: Non-negative share of each network, normalised to sum 1; equal if not given. With
            "auto" the outputs are to be the equal ensemble's, and the shares in the units before
            them are those that come nearest to it on samples held out; so are, if there is no more
            width, a last layer that is fitted or just mixed and, unless the anchor is given, the
            units of the anchor or of another network as wide.
        width: Of the fused network, relative to the anchor's: it takes at most the multiply-adds of
            the anchor with all layers made so much wider. Units that are least like their matches
            get places of their own, the deepest layers first (`Method(room=)`); with room for all,
            `float("inf")`, the outputs are the mean of the networks' exactly, but for norms over
            units, groups and heads, which keep their width.
        anchor: Index of the network whose widths and coordinates the result takes; the deepest if
            not given (of a zip, the widest).
        method: The choices along the way; the default is the best one known (with heads, `FAIR`).
        heads: For networks of different tasks: fuse them up to a layer only, and keep a head for
            each (`fxfuse.heads.Separate`) or one for the labels of all (`fxfuse.heads.Union`).
        progress: Called with the name of a stage and the share of it that is done.

    Returns:
        An ordinary `GraphModule` with the module names of the network whose structure it has, and
        `heads.0`, `heads.1` ... if each network keeps its own. Its `meta["fxfuse"]` holds a
        `Report`.

    Raises:
        ArgumentError: If an argument is out of range or of the wrong number.
        TraceError: If a model cannot be traced.
        ModelError: If weights are not finite, or outputs differ in shape and no heads are chosen.
        DataError: If the data are empty, refused by a model, or not finite.
        PairingError: If the networks do not belong to one family, or cannot be cut where asked.
        PassError: If a layer that one network lacks has no neutral form, or nothing can take the
            place of one that is to be removed.

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
    method, clock = method or (Method() if heads is None else FAIR), Clock(progress)
    automatic = is_automatic(weights, heads is not None)
    shares = shares_of(None if isinstance(weights, str) else weights, models)
    require_width(width, heads is not None)
    ready = _prepare(models, data, alignment, anchor, method, clock, heads)
    choices = ready.data, method.coupling, method.refit, clock
    leads = [k for k in range(len(models)) if k != ready.anchor and anchor is None]
    module, mixer, outcome, kept = assemble(
        ready.mixer(shares, method),
        *choices,
        width=width,
        room=method.room,
        weigh=automatic,
        leads=leads,
    )
    fused = copy_modes(models[ready.anchor], module)
    notes: tuple[str, ...] = ()
    if heads is not None:
        with clock.stage("attach heads"):
            notes = heads(fused, mixer, ready.behind, models)
            base = mixer.balanced.networks[mixer.anchor]
            require_sound(replace(base, name="the fused network", module=fused))
    facts = ready.anchor, ready.alignment, outcome, clock, notes, _seeds(method), kept
    fused.meta["fxfuse"] = report_on(mixer, *facts)
    return fused


@dataclass(frozen=True, eq=False)
class _Prepared:
    """Networks that are ready to be coupled."""

    data: Calibration
    anchor: int
    alignment: Alignment
    balanced: Balanced
    match: Correspondence
    behind: list[Head]

    def mixer(self, shares: Sequence[float], method: Method) -> Mixer:
        """Return what mixes them with some shares, its couplings still to be found."""
        zero = method.absent_as_zero
        return Mixer(self.balanced, self.anchor, self.match, shares, absent_as_zero=zero)


def _prepare(
    models: Sequence[nn.Module],
    data: Any,
    alignment: Alignment | None,
    anchor: int | None,
    method: Method,
    clock: Clock,
    heads: Heads | None = None,
) -> _Prepared:
    """Trace, align and balance; with heads, only what lies in front of them."""
    networks, calibration = take_in(models, data, clock, apart=heads is not None)
    require_heads(heads, networks)
    target = anchor_of(anchor, _usual_anchor(method, networks), len(networks))
    if alignment is None:
        choices = method.aligner, method.layer_cost
        with clock.stage("align layers"):
            front = None if heads is None else trunk_segments(networks, target, heads.after)
            alignment = align_networks(networks, calibration, *choices, False, segments=front)
    behind: list[Head] = []
    if heads is not None:
        networks, alignment, behind = cut_networks(networks, alignment, target, heads.after)
    with clock.stage("balance depths"):
        balanced = method.balancing(networks, alignment, calibration)
    match = correspond(balanced, target)
    return _Prepared(calibration, target, alignment, balanced, match, behind)


def _seeds(method: Method) -> dict[str, int]:
    """Return the seeds of a method's choices; what has none draws nothing, or always the same."""
    found = {f.name: getattr(getattr(method, f.name), "seed", None) for f in fields(method)}
    return {name: seed for name, seed in found.items() if isinstance(seed, int)}


def fuse_along(
    models: Sequence[nn.Module],
    data: Any,
    weights: Iterable[Sequence[float]],
    *,
    alignment: Alignment | None = None,
    anchor: int | None = None,
    method: Method | None = None,
    progress: Progress | None = None,
) -> Iterator[fx.GraphModule]:
    """Fuse the same networks with one set of weights after the other, analysed and balanced once.

    Args:
        models: As for `fuse`.
        data: As for `fuse`.
        weights: The shares of each fusion.
        alignment: As for `fuse`.
        anchor: As for `fuse`.
        method: As for `fuse`.
        progress: As for `fuse`.

    Yields:
        What `fuse` returns for each set of weights.
    """
    method, clock = method or Method(), Clock(progress)
    all_shares = [shares_of(w, models) for w in weights]
    ready = _prepare(models, data, alignment, anchor, method, clock)
    for shares in all_shares:
        choices = ready.data, method.coupling, method.refit, clock
        module, mixer, outcome, _ = assemble(ready.mixer(shares, method), *choices)
        fused = copy_modes(models[ready.anchor], module)
        facts = ready.anchor, ready.alignment, outcome, clock
        fused.meta["fxfuse"] = report_on(mixer, *facts, seeds=_seeds(method))
        yield fused


def _usual_anchor(method: Method, networks: Sequence[Network]) -> int:
    """Return the anchor of a method: by default the deepest, or first of all the widest."""
    parts = [partition(n) for n in networks]
    depths = [sum(len(s.layers) for s in segments) for segments in parts]
    if method.anchor is not None:
        return method.anchor(depths)
    widths = [0] * len(parts)
    if getattr(method.coupling, "widest", False):
        widths = [sum(max(x.width for x in s.layers) for s in segments) for segments in parts]
    order = list(zip(widths, depths))
    return order.index(max(order))


@plain_modes()
def align(
    models: Sequence[nn.Module],
    data: Any,
    *,
    method: Method | None = None,
    pairs: Sequence[Pairs | None] = (),
    progress: Progress | None = None,
) -> Alignment:
    """Find which layers of networks of different depth correspond.

    Args:
        models: Two or more networks; not modified.
        data: Calibration inputs, as for `fuse`.
        method: The choices along the way.
        pairs: Pairs by hand, of two models: per segment, as in `Alignment.pairs`, every layer of
            the shallower one with its layer of the deeper one, by name. None, or no entry, leaves
            a segment to the method.
        progress: Called with the name of a stage and the share of it that is done.

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
    method, clock = method or Method(), Clock(progress)
    networks, calibration = take_in(models, data, clock, apart=True)
    choices = method.aligner, method.layer_cost
    with clock.stage("align layers"):
        return align_networks(networks, calibration, *choices, pairs=pairs)


@plain_modes()
def balance(
    models: Sequence[nn.Module],
    data: Any,
    *,
    alignment: Alignment | None = None,
    method: Method | None = None,
    progress: Progress | None = None,
) -> list[fx.GraphModule]:
    """Give networks of different depth one structure.

    By default, layers that do nothing are inserted and no function changes; other ways are a choice
    of the method, such as `Method(balancing=Shorten())`.

    Args:
        models: The networks; not modified.
        data: Calibration inputs, as for `fuse`.
        alignment: Which layers correspond; found by `align` if not given.
        method: The choices along the way.
        progress: Called with the name of a stage and the share of it that is done.

    Returns:
        One `GraphModule` per network, equal node for node and name for name, each computing what
        its model computes (nearly, where the method removes layers).

    Raises:
        PairingError: If the networks do not belong to one family.
        PassError: If a layer that one network lacks has no neutral form, or nothing can take the
            place of one that is to be removed.
        NotEquivalent: If the function of a network that keeps its layers would change.
    """
    method, clock = method or Method(), Clock(progress)
    networks, calibration = take_in(models, data, clock)
    if alignment is None:
        choices = method.aligner, method.layer_cost
        with clock.stage("align layers"):
            alignment = align_networks(networks, calibration, *choices, False)
    with clock.stage("balance depths"):
        balanced = method.balancing(networks, alignment, calibration)
    pairs = zip(balanced.networks, models)
    return [copy_modes(model, n.module) for n, model in pairs]


def net2deeper(
    model: nn.Module, like: nn.Module, data: Any, alignment: Alignment | None = None
) -> fx.GraphModule:
    """Return a network of the depth of another: the depth-aligned shallow network.

    It has neutral layers where the other has layers that it lacks, at its own widths, and computes
    what the model computes. If the widths agree, its state loads into the deeper class.

    Args:
        model: The network; not modified.
        like: The deeper network; not modified.
        data: Calibration inputs, as for `fuse`.
        alignment: Which layers correspond, of `[model, like]`; found by `align` if not given.

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
    return balance([model, like], data, alignment=alignment)[0]
