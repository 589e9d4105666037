"""Give filters in front of norms the size that the networks were trained at.

A norm undoes the scale of the filter before it, so the function does not depend on it, but training
does: the smaller a filter, the further one step of gradient descent turns it. Filters that were
averaged, or solved for, are smaller than the ones they came from.

References:
    van Laarhoven 2017, L2 regularization versus batch and weight normalization: the effective
    learning rate is that over the squared norm of the filter.
"""

from __future__ import annotations

import numpy as np
import torch

from .folding import folds, producers
from .mixing import Mixer
from .network import Network
from .refit import tensor_of


def rescale(fused: Network, mixer: Mixer) -> None:
    """Scale each filter in front of a norm to the root mean square size of those it came from.

    The statistics of the norm follow, so that the function stays.

    Args:
        fused: The fused network; edited in place.
        mixer: The networks it is made of, and their maps.
    """
    base = mixer.balanced.networks[mixer.anchor]
    able = producers(base)
    for norm, node in folds(base).items():
        weight, dim = able[node]
        tensors = [tensor_of(n, weight) for n in mixer.balanced.networks]
        wanted = mixer.mix(weight, [_squares(t, dim) for t in tensors], along=dim)
        found = _squares(tensor_of(fused, weight), dim)
        known = (found > 0) & (wanted > 0)
        factor = np.sqrt(np.divide(wanted, found, out=np.ones_like(found), where=known))
        roles = base.book.norms[norm]
        mean, variance = (tensor_of(fused, str(roles[r])) for r in ("running_mean", "running_var"))
        eps, spread = float(roles["eps"]), variance.double().cpu().numpy()
        factor = np.maximum(factor, np.sqrt(eps / (spread + eps)))  # no variance below zero
        variance.data.copy_(torch.as_tensor(factor**2 * (spread + eps) - eps))
        mean.data.mul_(torch.as_tensor(factor).to(mean))
        for name in base.book.tensors[node]:
            tensor, axis = tensor_of(fused, name), dim if name == weight else 0
            along = [-1 if d == axis else 1 for d in range(tensor.dim())]
            tensor.data.mul_(torch.as_tensor(factor).to(tensor).view(along))


def _squares(tensor: torch.Tensor, dim: int) -> np.ndarray:
    """Return the squared size `(units,)` of each filter."""
    rows = tensor.detach().double().movedim(dim, 0).flatten(1)
    found: np.ndarray = rows.square().sum(1).cpu().numpy()
    return found
