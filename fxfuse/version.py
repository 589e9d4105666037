"""The version of the package, and of what its results depend on."""

from __future__ import annotations

import platform
from importlib import metadata

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the packages that it computes with."""
    found = {"python": platform.python_version(), "fxfuse": __version__}
    for name in ("torch", "numpy", "scipy", "POT"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # installed by other means than a package
            found[name] = "unknown"
    return found
