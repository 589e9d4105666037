"""Which positions of a batch count: those that no attention mask among the inputs leaves out.

Sequences of different lengths are padded to one length. What a network computes at the padding says
nothing of its units. Units may also be compared at some of the positions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Part of the name of an input `(samples, positions)` that is a mask -> whether its ones count.
MASKS = {"attention_mask": True, "padding_mask": False}

Tokens = Callable[[int], np.ndarray]  # number of positions in a sample -> those that count


class Served(tuple[Tensor, ...]):
    """A batch that says which of its positions count.

    Attributes:
        masks: The number of each tensor in it that is a mask -> whether its ones count.
        whole: Whether it is one sample, such as a graph, that cannot be cut.
    """

    masks: Mapping[int, bool] = {}
    whole: bool = False

    @classmethod
    def of(
        cls, tensors: Sequence[Tensor], masks: Mapping[int, bool], whole: bool = False
    ) -> Served:
        """Return tensors as a batch."""
        batch = cls(tensors)
        batch.masks, batch.whole = masks, whole
        return batch

    def like(self, tensors: Sequence[Tensor]) -> Served:
        """Return other tensors as a batch with the same masks."""
        return Served.of(tensors, self.masks, self.whole)

    @staticmethod
    def is_whole(batch: Sequence[Tensor]) -> bool:
        """Tell whether a batch is one sample, whatever its first axis is."""
        return batch.whole if isinstance(batch, Served) else len({len(t) for t in batch}) > 1

    @staticmethod
    def masks_of(batch: Sequence[Tensor]) -> Mapping[int, bool]:
        """Return the masks of a batch; none, if it is no batch of the data."""
        return batch.masks if isinstance(batch, Served) else {}


@dataclass(frozen=True, eq=False)
class Counted:
    """Which positions of a batch count; all, where its masks say nothing of a value.

    Attributes:
        masks: `(samples, positions)` each, of those that leave anything out.
        tokens: Which positions of every sample count, besides; None for all.
        samples: How many samples the batch has.
    """

    masks: tuple[Tensor, ...] = ()
    tokens: Tokens | None = None
    samples: int = 0

    @classmethod
    def of(cls, batch: Sequence[Tensor], tokens: Tokens | None = None) -> Counted:
        """Return what the masks of a batch say; nothing, if it is no batch of the data.

        Args:
            batch: The inputs.
            tokens: Which positions of every sample count, besides.
        """
        masks = Served.masks_of(batch)
        kept = [(batch[i] != 0) == counts for i, counts in masks.items()]
        return cls(tuple(mask for mask in kept if not bool(mask.all())), tokens, len(batch[0]))

    def among(self, shape: Sequence[int]) -> Tensor | None:
        """Return which places of a value count, `(places,)`; None if all do.

        A mask speaks of a value with its samples first and its positions along one other axis.

        Args:
            shape: Of the value, without the axis of its units.
        """
        found = [mask for mask in map(lambda m: _spread(m, shape), self.masks) if mask is not None]
        chosen = self._chosen(shape)
        if not found or any(not torch.equal(mask, found[0]) for mask in found):
            return chosen
        return found[0] if chosen is None else found[0] & chosen.to(found[0].device)

    def _chosen(self, shape: Sequence[int]) -> Tensor | None:
        """Return which places of a value are among the tokens that count, `(places,)`."""
        places = math.prod(shape[1:])
        if self.tokens is None or places < 2 or not shape or shape[0] != self.samples:
            return None
        chosen = torch.zeros(self.samples, places, dtype=torch.bool)
        chosen[:, torch.as_tensor(self.tokens(places))] = True
        return chosen.flatten()

    def of_units(self, value: Tensor, axis: int) -> Tensor:
        """Return values with their units first, and only the positions that count."""
        moved = value.movedim(axis, 0)
        kept = self.among(moved.shape[1:]) if self.masks or self.tokens else None
        return moved if kept is None else moved.flatten(1)[:, kept.to(moved.device)]

    def filled(self, value: Tensor, axis: int) -> Tensor:
        """Return values in which positions that do not count have the mean over other samples.

        Args:
            value: `(samples, ...)`, positions along one axis.
            axis: The axis of the units.
        """
        moved = value.movedim(axis, -1)
        kept = self.among(moved.shape[:-1]) if self.masks else None
        if kept is None or not value.is_floating_point():
            return value
        kept = kept.to(value.device).view(*moved.shape[:-1], 1)
        count = kept.sum(0).clamp(min=1)
        means = moved.masked_fill(~kept, 0.0).sum(0) / count
        return torch.where(kept, moved, means).movedim(-1, axis)

    def rows(self, value: Tensor) -> Tensor:
        """Return the positions of an output `(samples, positions, ...)` that count."""
        same = [mask for mask in self.masks if value.shape[:2] == mask.shape]
        return value[same[0].to(value.device)] if same else value


def _spread(mask: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Return a mask for every place of a value; None if it says nothing of such a value."""
    samples, length = mask.shape
    if tuple(shape) == (samples * length,):
        return mask.flatten()
    along = [axis for axis, n in enumerate(shape) if axis and n == length]
    if not len(shape) or shape[0] != samples or len(along) != 1:
        return None
    view = [samples] + [length if axis == along[0] else 1 for axis in range(1, len(shape))]
    return mask.view(view).expand(tuple(shape)).flatten()
