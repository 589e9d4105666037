"""How far a job is: shares from 0 to 1, told to whoever wants to show them.

What a caller hands in: models and data made ready, weights and anchor checked.
"""

from __future__ import annotations

import sys
import time
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


Progress = Callable[[str, float], None]


TRACED = 0.25  # share of the work once all networks are traced


class Clock:
    """Times the stages and tells the caller how far they are.

    Attributes:
        seconds: Wall time of each stage.
        memory: Peak resident bytes of the process so far, at the end of each stage, where the
            system tells them.
    """

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.stage, self.since = "", time.perf_counter()

    def start(self, stage: str) -> None:
        """Begin a stage; the one before ends."""
        self.stop()
        self.stage, self.since = stage, time.perf_counter()
        self.tick(0.0)

    def tick(self, share: float) -> None:
        """Say which share of the stage is done."""
        if self.progress is not None:
            self.progress(self.stage, share)

    def stop(self) -> dict[str, float]:
        """End the last stage; return the seconds of all."""
        if self.stage:
            self.seconds[self.stage] = time.perf_counter() - self.since
            peak = peak_memory()
            if peak is not None:
                self.memory[self.stage] = peak
            self.stage = ""
        return self.seconds


def peak_memory() -> int | None:
    """Return the largest resident size of this process so far in bytes, None if nobody tells."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
