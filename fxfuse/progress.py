"""How far a job is: shares from 0 to 1, told to whoever wants to show them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

T = TypeVar("T")
Tick = Callable[[float], None]


def silent(share: float) -> None:
    """Tell nobody."""


def part(tick: Tick, start: float, end: float) -> Tick:
    """Return what to tell the shares of a part of a job.

    Example:
        >>> part(print, 0.5, 1.0)(0.5)
        0.75
    """
    return lambda share: tick(start + (end - start) * share)


def counted(items: Collection[T], tick: Tick) -> Iterator[T]:
    """Hand on items; when one is done with, tell the share that is.

    Example:
        >>> [item for item in counted("ab", print)]
        0.5
        1.0
        ['a', 'b']
    """
    for done, item in enumerate(items, 1):
        yield item
        tick(done / len(items))


def in_parts(items: Collection[T], tick: Tick) -> Iterator[tuple[T, Tick]]:
    """Hand on items, each with what to tell its own shares.

    Example:
        >>> for item, step in in_parts("ab", print):
        ...     step(0.5)
        0.25
        0.75
    """
    for done, item in enumerate(items):
        yield item, part(tick, done / len(items), (done + 1) / len(items))


def rounds(limit: int, tick: Tick) -> Iterator[Tick]:
    """Yield what to tell the shares of each round, where nobody knows how many there will be.

    Each gets half of what is left.

    Example:
        >>> for step in rounds(3, print):
        ...     step(1.0)
        0.5
        0.75
        0.875
    """
    for done in range(limit):
        yield part(tick, 1 - 0.5**done, 1 - 0.5 ** (done + 1))
