"""Judge a fused network on held-out samples; warn where one of its networks does as well alone.

The measure is how far outputs are from those of the networks' ensemble. A network that is no larger
than the fused one and nearer to the ensemble would be the better choice.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from ..calibration.data import Calibration
from ..calibration.distance import Distance
from ..calibration.run import working_batch
from ..errors import FusionWarning
from ..graph.state import ties_of
from ..graph.wrappers import unwrapped
from ..report.report import Nearness, Report
from ..spaces.network import Network
from .selection import constant_distance, distances

SHARE, MOST, FEWEST = 16, 64, 8  # every sixteenth sample is held out, some of very many
HELD_OUT, ENOUGH = 4, 128  # every fourth sample is held out to choose by, fewer of many
PARTS = 8  # of the samples, whose differences show how far chance goes
NEGLIGIBLE = {True: 1e-4, False: 1e-3}  # a distance in nats, or relative: as good as none
MANY = 500  # calibration samples, of which more may not help


@dataclass(frozen=True, eq=False)
class Split:
    """Samples to fuse on, and samples to judge the result by.

    Attributes:
        fit: Those to fuse on.
        judge: A part of the data, or all of few samples.
        held_out: Whether none of them are in both.
    """

    fit: Calibration
    judge: Calibration
    held_out: bool


def split_to_judge(data: Calibration, fits: bool, chooses: bool = False) -> Split:
    """Choose samples to judge by; hold them out if anything is fitted and they are not few.

    Args:
        data: Calibration inputs.
        fits: Whether weights are fitted to them. If not, judging by them is fair.
        chooses: Whether the judgement decides what is returned, so that it takes more samples.
    """
    fits, few = fits or chooses, HELD_OUT if chooses else SHARE * FEWEST
    if data.samples < few:
        return Split(data, data, held_out=False)
    every = max(HELD_OUT, data.samples // ENOUGH) if chooses else max(SHARE, data.samples // MOST)
    rest, taken = data.parted(every)
    return Split(rest if fits else data, taken, held_out=fits)


def nearness(
    fused: Network,
    networks: Sequence[Network],
    shares: Sequence[float],
    split: Split,
    wanted: Sequence[Network] = (),
) -> Nearness:
    """Measure how far the fused network, and each of its networks, is from their ensemble.

    Args:
        fused: The fused network.
        networks: Those that it was made of, or that it is to be compared with.
        shares: Of each member of the ensemble.
        split: Has the samples to judge by.
        wanted: The members of the ensemble, if these are not `networks`.
    """
    ensemble = [(w, n) for w, n in zip(shares, wanted or networks) if w]
    every, size = [fused, *networks], -(-split.judge.samples // PARTS)
    parts = [distances(ensemble, every, [batch]) for batch in split.judge.chunks(size)]
    sums = [sum(column[1:], column[0]) for column in zip(*parts)]
    differs = not sums[0].shown <= NEGLIGIBLE[sums[0].in_nats]
    return Nearness(
        in_nats=sums[0].in_nats,
        samples=split.judge.samples,
        held_out=split.held_out,
        fused=sums[0].shown,
        networks=tuple(total.shown for total in sums[1:]),
        clear=tuple(differs and _nearer(parts, column) for column in range(1, len(every))),
    )


def _nearer(parts: Sequence[Sequence[Distance]], column: int) -> bool:
    """Tell whether a network is nearer than the fused one, by more than chance would have it."""
    totals = np.array([(part[0].total, part[column].total) for part in parts])
    if not np.isfinite(totals).all():
        return bool(np.isfinite(totals[:, 1]).all())
    more = totals[:, 0] - totals[:, 1]
    chance = more.std(ddof=1) / math.sqrt(len(more)) if len(more) > 1 else 0.0
    return bool(more.mean() > chance)


def better_alone(
    report: Report, models: Sequence[nn.Module], fused: nn.Module, advice: str
) -> str | None:
    """Say that a network no larger than the fused one is nearer to the ensemble, if one is.

    Args:
        report: Has the distances.
        models: The networks.
        fused: The fused network.
        advice: What to try.
    """
    near, size = report.nearness, _size(fused)
    clear = [k for k, m in enumerate(models) if near and near.clear[k] and _size(m) <= size]
    if near is None or not clear:
        return None
    best = min(clear, key=near.networks.__getitem__)
    name = report.alignment.names[best]
    return (
        f"the fused network is farther from the networks' ensemble than {name} alone, which is no "
        f"larger: {near.shown(near.fused)} against {near.shown(near.networks[best])} on "
        f"{near.judges}; try {advice}"
    )


def no_better_than_a_constant(
    near: Nearness, model: Network, judge: Calibration, what: str, advice: str
) -> str | None:
    """Say that a network is no nearer to the one that it was made of than a constant is.

    Args:
        near: Its distance from that network, and the samples it was measured on.
        model: That network.
        judge: These samples.
        what: The made network in words.
        advice: What to try.
    """
    size = working_batch([model])
    constant = constant_distance(model, judge.chunks(size)).shown
    if near.fused < constant or constant <= NEGLIGIBLE[near.in_nats]:
        return None
    return (
        f"{what} is no nearer to {model.name} than the mean of its outputs is: "
        f"{near.shown(near.fused)} against {near.shown(constant)} on {near.judges}; try {advice}"
    )


def lost_heads(report: Report, networks: Sequence[Network], judge: Calibration) -> str | None:
    """Say that heads behind a fused trunk are no nearer to their networks than constants are.

    Args:
        report: Has how far each head is from its network.
        networks: The networks.
        judge: Samples to measure the constants on.
    """
    lost = []
    for name, apart, network in zip(report.alignment.names, report.apart, networks):
        constant = constant_distance(network, judge.chunks(working_batch([network])))
        if apart is not None and apart >= constant.shown > NEGLIGIBLE[True]:
            lost.append(f"{name} ({apart:.3g} nats against {constant.shown:.3g})")
    if not lost:
        return None
    return (
        f"heads that are no nearer to their networks than the mean of these networks' outputs is: "
        f"{', '.join(lost)}; try an earlier cut (`after`), a larger width, or calibration samples "
        "of all tasks"
    )


def like_is_nearer(near: Nearness, like: Network, advice: str) -> str | None:
    """Say that the network whose widths a narrower one took is nearer to the model, if it is.

    Args:
        near: The distances from the model of the narrower network, and of the one it is like.
        like: The latter.
        advice: What to try.
    """
    if not near.clear[0]:
        return None
    return (
        f"the narrower network is farther from the model than {like.name}, whose widths it has: "
        f"{near.shown(near.fused)} against {near.shown(near.networks[0])} on {near.judges}; "
        f"try {advice}"
    )


def advice_for(automatic: bool, width: float, usual: bool, samples: int) -> str:
    """Return what may help a fused network that is farther off than a network alone.

    Args:
        automatic: Whether the weights were chosen.
        width: Of the fused network.
        usual: Whether it was fused by the default method.
        samples: How many calibration samples there were.
    """
    ways = [
        ("the default method", not usual),
        ('weights="auto"', not automatic),
        ("a larger width" if width > 1 else "width=1.5", width != float("inf")),
        ("more calibration samples", samples < MANY),
    ]
    tries = [way for way, helps in ways if helps] or ["that network itself"]
    return " or ".join([", ".join(tries[:-1]), tries[-1]] if len(tries) > 1 else tries)


def nothing_wider(report: Report, width: float) -> str | None:
    """Say that a larger width was asked for and nothing is wider, if so."""
    if width == 1 or any(s.size > s.sizes[report.anchor] for s in report.spaces):
        return None
    reasons = dict.fromkeys(report.narrow.values()) or ["that is less than one more unit anywhere"]
    return (
        f"width={width:g} changed nothing ({'; '.join(reasons)}): leave it out, or fuse with a "
        "wider network as the anchor"
    )


def untied(model: nn.Module, fused: nn.Module) -> str | None:
    """Say that the fused network has two weights where the model whose structure it has ties them.

    Args:
        model: The model.
        fused: The fused network.
    """
    state = fused.state_dict(keep_vars=True)
    for first, second in ties_of(unwrapped(model)):
        if first in state and second in state and state[first] is not state[second]:
            return (
                f"'{first}' and '{second}' are one tensor in the network whose structure was taken "
                "and two in another, so they are two in the fused one: untie them in the class "
                "before it loads the state, or make the other network the anchor"
            )
    return None


def without_repeats(data: Calibration) -> tuple[Calibration, str | None]:
    """Return the data; if all samples are one, one of them, and a sentence that says so."""
    if data.whole:
        return data, None  # a sample has many parts, as a graph has nodes
    first = data.example(1)
    for batch in data.chunks(64):
        if not all(bool((t == one).all()) for t, one in zip(batch, first)):
            return data, None
    return Calibration([(first,)]), (
        "the calibration data are one sample, which says little of which units correspond: give a "
        "few hundred samples that differ"
    )


def warned(
    report: Report,
    said: Sequence[str | None],
    width: float,
    models: Sequence[nn.Module],
    fused: nn.Module,
    advice: str,
) -> Report:
    """Warn of what may not be what the caller wants; return the report with the sentences.

    Args:
        report: What the fusion did.
        said: Sentences that are known already.
        width: That was asked for.
        models: The networks.
        fused: The fused network.
        advice: What to try if it is not near enough.
    """
    alone = better_alone(report, models, fused, advice)
    apart = untied(models[report.anchor], fused)
    sentences = tuple(filter(None, (*said, nothing_wider(report, width), apart, alone)))
    for sentence in sentences:
        warn(sentence)
    return replace(report, warnings=sentences)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def warn(sentence: str) -> None:
    """Warn at the line of the caller's code that led here."""
    frame, level = sys._getframe(), 0
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, FusionWarning, stacklevel=level + 1)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0] or module == "contextlib"
