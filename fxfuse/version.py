"""The version of the package, and of what its results depend on."""

from __future__ import annotations

import platform
from importlib import metadata

import numpy
import torch

__version__ = "0.2.0"


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the packages that it computes with."""
    numbers = {"python": platform.python_version(), "fxfuse": __version__}
    numbers |= {"torch": str(torch.__version__), "numpy": numpy.__version__}
    for name in ("scipy", "POT"):
        try:
            numbers[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # installed by other means than a package
            numbers[name] = "unknown"
    return numbers
