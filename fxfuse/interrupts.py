"""Ctrl-C on the command line ends it quietly, also in the seconds in which torch is loaded."""

from __future__ import annotations

import os
import signal
import sys

STOPPED = 130  # what a shell says of a program that was interrupted


def stop_at_once() -> None:
    """From now on, let an interrupt end a process that is the command line, and no other one.

    Nothing is under way yet that would have to be undone. Whoever ignores interrupts, as a job in
    the background does, goes on to.
    """
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def stop_cleanly() -> None:
    """Let an interrupt raise `KeyboardInterrupt` again, so that half-written files are removed."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    """Tell whether this is the command `fxfuse`, or `python -m fxfuse`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # its name comes later; the module's stands before its arguments
        program = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return os.path.splitext(os.path.basename(program))[0] == "fxfuse"


def _stop(*_: object) -> None:
    os._exit(STOPPED)
