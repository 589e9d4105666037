"""What a result depends on."""

import re
from pathlib import Path

import fxfuse
from fxfuse.version import versions


def test_the_version_of_each_package_is_known():
    numbers = versions()
    assert list(numbers) == ["python", "fxfuse", "torch", "numpy", "scipy", "POT"]
    assert numbers["fxfuse"] == fxfuse.__version__ and "unknown" not in numbers.values()


def test_the_version_is_the_same_wherever_people_read_it():
    """It is written in `fxfuse/version.py`; these two are for readers."""
    root = Path(__file__).parents[1]
    (cited,) = re.findall(r"^version: (.*)$", (root / "CITATION.cff").read_text(), re.MULTILINE)
    described = re.findall(r"^## \[(\d.*?)\]", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited == described[0] == fxfuse.__version__
