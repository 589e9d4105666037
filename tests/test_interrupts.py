"""Ctrl-C while torch is being loaded."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fxfuse

ROOT = Path(fxfuse.__file__).parents[1]
SLOW_TORCH = """
import pathlib, time
pathlib.Path("loading").touch()
time.sleep(1)
pathlib.Path("loaded").touch()
raise SystemExit(5)
"""
PROGRAM = "from fxfuse.cli import main\nmain()\n"


def interrupted(folder, arguments, before):
    """Interrupt a process while it loads a torch that takes a second; return how it ended."""
    (folder / "torch.py").write_text(SLOW_TORCH)
    for name in ("fxfuse", "other"):
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, before),
    )
    while process.poll() is None and not (folder / "loading").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=50)
    return process.returncode, err, (folder / "loaded").exists()


WAYS = [["-m", "fxfuse", "inspect"], ["-mfxfuse"], ["-m", "fxfuse", "-m", "x"], ["bin/fxfuse"]]


@pytest.mark.parametrize("arguments", WAYS)
def test_the_command_line_ends_with_130_and_no_word(tmp_path, arguments):
    assert interrupted(tmp_path, arguments, signal.SIG_DFL) == (130, "", False)


def test_other_programs_are_left_to_themselves(tmp_path):
    status, err, _ = interrupted(tmp_path, ["bin/other", "fxfuse"], signal.SIG_DFL)
    assert status != 130 and "KeyboardInterrupt" in err


def test_a_job_that_ignores_interrupts_goes_on(tmp_path):
    assert interrupted(tmp_path, WAYS[0], signal.SIG_IGN) == (5, "", True)
