"""What a result depends on."""

import fxfuse
from fxfuse.version import versions


def test_the_version_of_each_package_is_known():
    numbers = versions()
    assert list(numbers) == ["python", "fxfuse", "torch", "numpy", "scipy", "POT"]
    assert numbers["fxfuse"] == fxfuse.__version__ and "unknown" not in numbers.values()
