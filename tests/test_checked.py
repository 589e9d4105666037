"""Arguments are compared with annotations."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from fxfuse._checked import _is_of, checked
from fxfuse.errors import ArgumentError

NUMBERS = Sequence[float] | Literal["auto"] | None
CASES = [
    (float, [1, 0.5, np.float32(1), np.int64(2), float("nan")], ["1", None, 1j, torch.float32, []]),
    (int, [1, np.int64(3), True], [1.0, "1", None, b"1"]),
    (bool, [True, False], [1, None, "x"]),
    (str | os.PathLike[str], ["a", Path("a")], [b"a", 1, None, ["a"]]),
    (NUMBERS, [None, "auto", [1, 2.0], (1,), np.ones(2), torch.ones(2)], ["x", [None], 3, len]),
    (Sequence[Sequence[tuple[str, str]] | None], [(), [None], [[("a", "b")]]], [[3], "a", len]),
    (Iterable[Sequence[float]], [[[1.0]], iter([])], [3, "ab", None]),
    (Callable[[int], int] | None, [None, len], [3, "x"]),
    (Mapping[str, int], [{}, {"a": 1}], [[], 0.5, None, {"a": "b"}]),
    (nn.Module, [nn.Linear(2, 2), 3], []),
    (Any, [None, 3, "x"], []),
    (Path, [Path("a")], ["a"]),
]


@pytest.mark.parametrize(("kind", "right", "wrong"), CASES, ids=[str(c[0]) for c in CASES])
def test_values_are_of_a_kind_or_not(kind, right, wrong):
    assert [v for v in right if not _is_of(v, kind)] == []
    assert [v for v in wrong if _is_of(v, kind)] == []


def test_a_wrong_argument_is_named():
    @checked()
    def function(first: int, *others: int, named: "float | None" = None, **more: int) -> int:
        """Text."""
        return first

    assert function(1, "a", named=2, more="b") == 1 and function.__doc__ == "Text."
    with pytest.raises(ArgumentError, match="`named` of .*function"):
        function(1, named="x")
    with pytest.raises(ArgumentError, match="`first`"):
        function("1")
    with pytest.raises(TypeError, match="missing"):
        function()
