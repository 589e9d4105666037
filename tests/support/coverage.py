"""`examples/coverage.py`, loaded by its path: a package of that name may be installed."""

import importlib.util
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples/coverage.py"

_spec = importlib.util.spec_from_file_location("fxfuse_examples_coverage", EXAMPLE)
coverage = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(coverage)
