"""Parameters of which the default run takes some; `pytest -m sweep` takes the others."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def some(values: Iterable, *quick) -> list:
    """Return all values as parameters; those that are not named run in the sweep only.

    A value that is a tuple stands for several parameters.
    """
    return [v if v in quick else _swept(v) for v in values]


def crossed(*values: Iterable) -> list:
    """Return all combinations of values as parameters; most of them run in the sweep only.

    The default run takes those that differ from the first combination in one value at most, so
    that it sees each value.
    """
    first, *others = product(*values)
    return [first, *(_swept(v) if _differences(v, first) > 1 else v for v in others)]


def _differences(one: tuple, other: tuple) -> int:
    return sum(a != b for a, b in zip(one, other))


def _swept(value: Any):
    parts = value if isinstance(value, tuple) else (value,)
    return pytest.param(*parts, marks=pytest.mark.sweep)
