"""Compare units by their weights, the other axes of each tensor already mapped."""

from __future__ import annotations

import numpy as np

from .folding import tensors_of
from .mixing import Mixer


def weight_cost(mixer: Mixer, name: str, k: int) -> np.ndarray:
    """Compare units by their weights, all other axes already mapped: `(base units, units)`.

    References:
        Ainsworth et al. 2023 (Git Re-Basin), one step of weight matching.
    """
    networks, match = mixer.balanced.networks, mixer.match
    base = match.base[name]
    space, own = match.spaces[name][base], match.spaces[name][k]
    cost = np.zeros((space.size, own.size))
    states = [dict(tensors_of(networks[i].module)) for i in (base, k)]
    for axis in space.axes:
        other = next(a for a in own.axes if (a.tensor, a.dim) == (axis.tensor, axis.dim))
        across = networks[mixer.anchor].spaces.on(axis.tensor)
        across = [(s.name, i) for s, a in across if a.dim != axis.dim for i in (base, k)]
        if axis.groups > 1 or any(pair not in mixer.couplings for pair in across):
            continue
        rows = []
        for i, state, found in zip((base, k), states, (axis, other)):
            tensor = state[axis.tensor].detach().cpu().numpy()
            moved = np.moveaxis(mixer.carry(axis.tensor, tensor, i, but=axis.dim), axis.dim, 0)
            rows.append(moved[found.index].reshape(len(found.index), -1).astype(float))
        a, b = rows
        cost += (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.maximum(cost, 0.0)
