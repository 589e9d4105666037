"""Check the arguments of the entry functions: weights, the anchor, and what a mixer allows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..coupling.mixing import Mixer
from ..errors import ArgumentError


def is_automatic(weights: Sequence[float] | str | None, apart: bool) -> bool:
    """Tell whether the weights are to be chosen, which needs networks of one task (not `apart`)."""
    if isinstance(weights, str) and (weights != "auto" or apart):
        raise ArgumentError(
            f"weights '{weights}'" + (" for networks of different tasks" if apart else ""),
            where="the argument `weights`",
            expected="numbers, or 'auto' for networks of one task, which have an ensemble",
            do="give one number for each model, or leave them out for equal weights",
        )
    return weights == "auto"


def shares_of(weights: Sequence[float] | None, models: Sequence[nn.Module]) -> tuple[float, ...]:
    """Return the share of each model, sum 1; refuse weights that do not fit the models."""
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
    """Return the index of the anchor; refuse what is not the index of a network."""
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


def shares_for(
    mixer: Mixer | None, shares: tuple[float, ...], width: float, automatic: bool
) -> tuple[float, ...]:
    """Return the shares that the networks have under a mixer; refuse what it has no answer to.

    Args:
        mixer: What becomes of tensors in the same units; None for the weighted mean.
        shares: Those that the caller gave, sum 1.
        width: Of the fused network, relative to the anchor's.
        automatic: Whether the weights are to be chosen.
    """
    if mixer is None:
        return shares
    if width != 1 or automatic:
        raise ArgumentError(
            f"{f'width={width:g}' if width != 1 else 'chosen weights'} with {mixer}",
            where="the argument `width`" if width != 1 else "the argument `weights`",
            expected="the anchor's width and given weights, as all tensors lie in the same units",
            do="leave it out, or use a method that takes the weighted mean",
        )
    return mixer.shares(shares)
