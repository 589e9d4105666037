"""One family of errors, each in four parts: what was met, where, what was expected, what to do.

A warning is one sentence: what was met, and what to try.
"""

from __future__ import annotations

import os
import traceback


def line_of(error: BaseException) -> str:
    """Return the file, line and text of the innermost step that is not torch's or ours."""
    ours = (os.path.dirname(os.path.abspath(__file__)) + os.sep, "<")
    frames = traceback.extract_tb(error.__traceback__)
    torch = f"{os.sep}torch{os.sep}"
    outside = [f for f in frames if not f.filename.startswith(ours) and torch not in f.filename]
    return f"{outside[-1].filename}:{outside[-1].lineno}, `{outside[-1].line}`" if outside else ""


class FuseError(Exception):
    """Base of every error that fxfuse raises on purpose.

    Args:
        met: What was met, in one sentence.
        where: The model, node, file or argument concerned.
        expected: What would have been right.
        do: What the reader can do about it.
    """

    def __init__(self, met: str, *, where: str, expected: str, do: str) -> None:
        self.met, self.where, self.expected, self.do = met, where, expected, do
        super().__init__(met, where, expected, do)

    def __str__(self) -> str:
        return f"{self.met}\n  where: {self.where}\n  expected: {self.expected}\n  to do: {self.do}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.met, self.where, self.expected, self.do)


def _rebuild(kind: type[FuseError], met: str, where: str, expected: str, do: str) -> FuseError:
    return kind(met, where=where, expected=expected, do=do)


class FusionWarning(UserWarning):
    """A fusion did what it was asked to, but the result may not be what the caller wants."""


class ArgumentError(FuseError, ValueError):
    """An argument is out of range, of the wrong number or of the wrong kind."""


class TraceError(FuseError):
    """A model cannot be written down as a graph."""


class ModelError(FuseError, ValueError):
    """A model's weights, inputs or outputs cannot be used."""


class DataError(FuseError, ValueError):
    """Calibration data are missing, refused by a model, or not finite."""


class ProcessError(FuseError):
    """Processes that fuse together do not work on the same, or one of them has ended."""


class PairingError(FuseError, ValueError):
    """The structures of the networks do not correspond."""


class PassError(FuseError):
    """A graph pass cannot do what it was asked to."""


class NotEquivalent(PassError):
    """A pass that claims to keep the function changed it."""


class SolverError(FuseError):
    """A transport or assignment problem was refused or not solved."""


class CheckpointError(FuseError):
    """A file of weights or of a network cannot be read, is refused, or does not fit."""


class SaveError(FuseError):
    """A network has parts that cannot be written down without code of their own."""


class WriteError(FuseError):
    """A file cannot be written."""


class ReferenceFormatError(FuseError, ValueError):
    """A model or data reference on the command line cannot be resolved."""
