"""Scale units that no weight reads, such as queries and keys, to the size of the base network's.

Where two activations are multiplied and summed over units, a wider network has smaller units: the
sum over more of them is the same. If units of different size were averaged as they are, the product
would come out wrong, and no weight behind it could make up for that.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.sparse import csr_array, diags_array

from ..calibration.norms import FoldedState, fold_norms, foldable_norms
from ..ir import Coupling
from .mixing import Couplings, turned


def sized_alike(couplings: Couplings) -> Couplings:
    """Return couplings that scale merged or duplicated units in front of products.

    A unit is scaled by the size of its weights in the base network relative to that of the weights
    that it is given, all carried into the fused network's units. Units matched one to one stay.
    """
    problem = couplings.problem
    scaled = [
        (name, k)
        for (name, k), coupling in couplings.maps.items()
        if name in problem.unread and k != problem.base[name] and not _one_to_one(coupling)
    ]
    if not scaled:
        return couplings
    states = [fold_norms(n, foldable_norms(n)) for n in problem.networks]
    maps = dict(couplings.maps)
    for name, k in scaled:
        base = problem.base[name]
        wanted = _squares(couplings, states[base], name, base)
        given = _squares(couplings, states[k], name, k)
        ratio = np.divide(wanted, given, out=np.ones_like(given), where=(wanted > 0) & (given > 0))
        gains = np.sqrt(ratio)
        project = csr_array(diags_array(gains) @ maps[name, k].project)
        maps[name, k] = replace(maps[name, k], project=project, gains=gains)
    return replace(couplings, maps=maps)


def _one_to_one(coupling: Coupling) -> bool:
    """Tell whether every unit is given to one fused unit at most, and each is given one."""
    matrix = csr_array(coupling.project, copy=True)
    matrix.eliminate_zeros()
    once = np.bincount(matrix.indices, minlength=matrix.shape[1]) <= 1
    return bool(once.all() and (np.diff(matrix.indptr) <= 1).all())


def _squares(couplings: Couplings, state: FoldedState, name: str, k: int) -> np.ndarray:
    """Return the squared size `(fused units,)` of the weights that a network gives to each unit."""
    problem = couplings.problem
    structure, part = problem.structure, couplings.maps[name, k].given
    of_norms = {t for roles in structure.norms.values() for t in roles.values()}
    total = np.zeros(len(part))
    for axis in structure.spaces[name].axes:
        if axis.tensor not in of_norms | problem.lacking[k]:
            carried = couplings.carry(axis.tensor, state[axis.tensor], k)
            if axis.groups > 1:  # the outputs of a transposed convolution, kept group by group
                rows = turned(carried, axis.groups)[axis.index]
            else:
                rows = np.moveaxis(carried, axis.dim, 0)[axis.index]
            rows = rows.reshape(len(part), -1)
            total += np.square(rows, dtype=float).sum(1)
    squares: np.ndarray = np.divide(total, part**2, out=np.zeros_like(total), where=part > 0)
    return squares
