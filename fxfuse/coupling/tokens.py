"""Which tokens of a sample count when units are compared, for `View(tokens=)`.

References:
    Imfeld et al. 2024 (Transformer Fusion): activations of the class token and of a window of
    patches around the image's centre, or of single positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import ArgumentError


@dataclass(frozen=True)
class Window:
    """The patches around the centre of the image, and all tokens in front of the patches.

    Of the positions of a sample, the last ones are taken for the largest square grid that they can
    hold. Text has no such grid.

    Attributes:
        side: How many patches high and wide the window is.

    Example:
        >>> Window(2)(17).tolist()  # a class token and 4 x 4 patches
        [0, 6, 7, 10, 11]
    """

    side: int = 6

    def __post_init__(self) -> None:
        """Refuse an empty window."""
        _require_positive("Window(side=...)", self.side)

    def __call__(self, positions: int) -> np.ndarray:
        """Return the positions that count, of so many."""
        grid = math.isqrt(positions)
        front, side = positions - grid * grid, min(self.side, grid)
        within = np.arange(side) + (grid - side) // 2
        patches = front + (within[:, None] * grid + within).ravel()
        return np.concatenate([np.arange(front), patches])


@dataclass(frozen=True)
class Leading:
    """The first tokens, such as a class token.

    Attributes:
        count: How many.

    Example:
        >>> Leading()(17).tolist()
        [0]
    """

    count: int = 1

    def __post_init__(self) -> None:
        """Refuse no tokens."""
        _require_positive("Leading(count=...)", self.count)

    def __call__(self, positions: int) -> np.ndarray:
        """Return the positions that count, of so many."""
        return np.arange(min(self.count, positions))


def _require_positive(where: str, number: int) -> None:
    if number < 1:
        raise ArgumentError(
            f"{number} tokens",
            where=where,
            expected="1 or more",
            do="leave View(tokens=...) out to compare units at all positions",
        )
