"""What a result depends on."""

import fxfuse
from fxfuse.version import versions


def test_versions_are_told_and_known():
    found = versions()
    assert list(found) == ["python", "fxfuse", "torch", "numpy", "scipy", "POT"]
    assert found["fxfuse"] == fxfuse.__version__ and "unknown" not in found.values()
