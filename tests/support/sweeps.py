"""Parameters of which the default run takes some; `pytest -m sweep` takes the others."""

from collections.abc import Iterable

import pytest


def some(values: Iterable, *quick) -> list:
    """Return all values as parameters; those that are not named run in the sweep only."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.sweep) for v in values]
