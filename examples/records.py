"""Records: what a script measured, as JSON, with what it ran on."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fxfuse._files import write_text
from fxfuse.version import versions


def write_record(path: Path, question: str, rows: Sequence[dict[str, Any]], **facts: Any) -> None:
    """Write a record, and print where.

    Args:
        path: The file.
        question: What the script asks, in a word.
        rows: What it found, a row for each network.
        **facts: What that rests on: seed, samples, test images and the like.
    """
    known = {"question": question, "rows": list(rows), **facts}
    known |= {"versions": versions(), "hardware": hardware()}
    write_text(path, json.dumps(known, indent=1) + "\n")
    print(path, flush=True)


def hardware() -> dict[str, Any]:
    """Return what a script runs on."""
    cuda = torch.cuda.is_available()
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if cuda else "none",
    }
