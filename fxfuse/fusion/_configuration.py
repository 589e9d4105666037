"""Find the settings in `model.config` with which a model's class has the fused network's widths."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import combinations, islice, product
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.wrappers import unwrapped

MOST = 64  # configurations that are tried


def changed_configuration(model: nn.Module, fused: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the whole numbers of `model.config` that change: by name, before and after.

    These are numbers that sizes had which are others now. Which of them belong to these sizes shows
    when the class is built with them: its state must have the shapes of the fused network's.

    Args:
        model: The model whose structure was taken.
        fused: The fused network.

    Returns:
        Nothing if no size changed, or no such configuration gives these shapes.
    """
    bare = unwrapped(model)
    config, before, after = getattr(bare, "config", None), _shapes(bare), _shapes(fused)
    if config is None or before == after:
        return {}
    now: dict[int, dict[int, None]] = {}
    for name, shape in before.items():
        for old, new in zip(shape, after.get(name, ())):
            if old != new:
                now.setdefault(old, {})[new] = None
    for changes in islice(_choices(config, now), MOST):
        changed = copy.deepcopy(config)
        for key, (_, new) in changes.items():
            setattr(changed, key, new)
        if _shapes_of_class(bare, changed) == after:
            return changes
    return {}


def _choices(config: Any, now: dict[int, dict[int, None]]) -> Iterator[dict[str, tuple[int, int]]]:
    """Yield which numbers of a configuration may change to what, the fewest first."""
    held = getattr(config, "__dict__", {})
    numbers = {k: v for k, v in held.items() if type(v) is int and v in now}
    for count in range(1, len(numbers) + 1):
        for names in combinations(numbers, count):
            for sizes in product(*(now[numbers[name]] for name in names)):
                yield {name: (numbers[name], size) for name, size in zip(names, sizes)}


def _shapes_of_class(model: nn.Module, config: Any) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of a model's class with another configuration, None if there is no such."""
    build: Any = type(model)
    try:
        with torch.device("meta"):
            return _shapes(build(config))
    except Exception:
        return None


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    state = module.state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if isinstance(t, Tensor)}
