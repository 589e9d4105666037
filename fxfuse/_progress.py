"""How far a job is: told to whoever listens, from wherever the work is done.

The listener is a context variable, so that no function has to hand it on. A loop says `counted`;
work in several parts says `with part(0.0, 0.4)`; inside, shares count from 0 to 1 again. A `Clock`
listens to one stage after the other, times them, and tells the caller, or draws bars itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Progress = Callable[[str, float], None]


def _nobody(share: float) -> None:
    """Tell nobody."""


_listener: ContextVar[Callable[[float], None]] = ContextVar("listener", default=_nobody)


def tell(share: float) -> None:
    """Say which share of the present part of the job is done, from 0 to 1."""
    _listener.get()(share)


@contextmanager
def heard_by(listener: Callable[[float], None]) -> Iterator[None]:
    """Let a function hear the shares that are told inside."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def part(start: float, end: float) -> Iterator[None]:
    """Count what is told inside as a part of the job, from one share to another.

    Example:
        >>> with heard_by(print), part(0.5, 1.0):
        ...     tell(0.5)
        0.75
    """
    outer = _listener.get()
    with heard_by(lambda share: outer(start + (end - start) * share)):
        yield


def counted(items: Collection[T]) -> Iterator[T]:
    """Yield items, each an equal part of the job; what is told while one is worked on counts.

    Example:
        >>> with heard_by(print):
        ...     for item in counted("ab"):
        ...         tell(0.5)
        0.25
        0.5
        0.75
        1.0
    """
    for done, item in enumerate(items):
        with part(done / len(items), (done + 1) / len(items)):
            yield item
        tell((done + 1) / len(items))


def rounds(limit: int) -> Iterator[None]:
    """Yield for each round of a job, where nobody knows how many there will be.

    Each gets half of what is left.

    Example:
        >>> with heard_by(print):
        ...     for _ in rounds(3):
        ...         tell(1.0)
        0.5
        0.75
        0.875
    """
    for done in range(limit):
        with part(1 - 0.5**done, 1 - 0.5 ** (done + 1)):
            yield


class Bars:
    """Draws one stage after the other as a bar, on a terminal or in a notebook.

    Where standard error is neither, there is a line for each stage that has ended.
    """

    WIDTH = 24

    def __init__(self) -> None:
        self.drawn = ""

    def __call__(self, stage: str, share: float) -> None:
        """Draw a stage as far as it is."""
        filled = round(self.WIDTH * share)
        bar = "#" * filled + "." * (self.WIDTH - filled)
        line = f"{stage:<24} {bar} {share:4.0%}"
        if line != self.drawn and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            self.drawn = line
            sys.stderr.write(f"\r{line}")
            sys.stderr.flush()

    def end(self, stage: str, seconds: float) -> None:
        """Replace the bar of a stage by the time that it took."""
        start = "\r" if self.drawn else ""
        blank = " " * (len(self.drawn) - 34) if self.drawn else ""
        sys.stderr.write(f"{start}{stage:<24} {seconds:7.1f} s{blank}\n")
        sys.stderr.flush()
        self.drawn = ""


class Clock:
    """Times the stages of a job, and tells the caller how far each is.

    Args:
        progress: Called with the name of a stage and the share of it that is done; True to draw
            bars, False or None for silence.

    Attributes:
        seconds: Wall time of each stage.
        memory: Peak resident bytes of the process so far, at the end of each stage, where the
            system tells them.
    """

    def __init__(self, progress: Progress | bool | None) -> None:
        if isinstance(progress, bool):
            self.progress: Progress | None = Bars() if progress else None
        else:
            self.progress = progress
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside, and hear how far it is; a stage may have several parts."""
        start, last = time.perf_counter(), -1.0

        def hear(share: float) -> None:
            nonlocal last
            if self.progress is not None and share > last:
                last = share
                self.progress(name, share)

        hear(0.0)
        with heard_by(hear):
            yield
        took = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        if isinstance(self.progress, Bars):
            self.progress.end(name, took)
        peak = peak_memory()
        if peak is not None:
            self.memory[name] = peak


def peak_memory() -> int | None:
    """Return the largest resident size of this process so far in bytes, None if unknown."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
