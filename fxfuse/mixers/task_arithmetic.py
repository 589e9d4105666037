"""Add the changes of several tuned networks to the checkpoint that they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..coupling.mixing import Named, Rule, Tensors
from ._changes import OfChanges


@dataclass(frozen=True)
class TaskArithmetic(OfChanges):
    """The checkpoint plus the scaled sum of all changes.

    With `scale` one divided by the number of tuned networks it is their mean; with a negative one
    and a single network, what it was tuned to is unlearned.

    Attributes:
        base: Index of the network that is the checkpoint.
        scale: What each change is multiplied by, for equal weights.

    References:
        Ilharco et al. 2023, Editing models with task arithmetic; 0.4 is what Yadav et al. (TIES)
        use where there are no data to choose it by.
    """

    scale: float = 0.4

    def __call__(self, named: Callable[[], Named], shares: Sequence[float]) -> Rule:
        """Return the rule for each tensor."""
        factors = self.factors(shares)

        def add(name: str, tensors: Tensors) -> np.ndarray:
            changes = self.changes(tensors)
            total = np.tensordot(factors.astype(changes.dtype), changes, 1)
            added: np.ndarray = tensors[self.base] + total
            return added

        return add
