"""Methods of the papers in a few lines of NumPy, for networks `(w, b, v, c)`: v relu(w x + b) + c.

They know one hidden layer and two networks in equal parts, and share nothing with the package.
"""

from itertools import permutations

import numpy as np
import ot


def hidden(net, x):
    """Return the pre-activations of the hidden units, `(units, samples)`."""
    w, b, _, _ = net
    return w @ x.T + b[:, None]


def relu(z):
    return np.maximum(z, 0.0)


def outputs_of(net, x):
    _, _, v, c = net
    return v @ relu(hidden(net, x)) + c[:, None]


def mean(a, b):
    return tuple((p + q) / 2 for p, q in zip(a, b))


def reordered(net, order):
    """Return a network with its hidden units in another order."""
    w, b, v, c = net
    return w[order], b[order], v[:, order], c


def correlations(x, y):
    return np.corrcoef(x, y)[: len(x), len(x) :]


def best_order(score, size):
    return list(max(permutations(range(size)), key=lambda order: score(list(order))))


def otfusion(a, b, x):
    """Singh and Jaggi 2020: plans between pre-activations, one for the outputs, too."""

    def plan(y, z):
        cost = np.sqrt(((y[:, None] - z[None]) ** 2).sum(-1))
        return len(y) * ot.emd(ot.unif(len(y)), ot.unif(len(z)), cost)

    t, s = plan(hidden(a, x), hidden(b, x)), plan(outputs_of(a, x), outputs_of(b, x))
    w, bias, v, c = b
    return mean(a, (t @ w, t @ bias, s @ v @ t.T, s @ c))


def git_rebasin(a, b, x):
    """Ainsworth et al. 2023: of all orders, that of the greatest inner product of weights."""

    def alike(order):
        return sum((p * q).sum() for p, q in zip(a, reordered(b, order)))

    return mean(a, reordered(b, best_order(alike, len(a[1]))))


def repair(a, b, x):
    """Jordan et al. 2023: the order of most correlation, then the parents' means and spreads."""
    alike = correlations(relu(hidden(a, x)), relu(hidden(b, x)))
    b = reordered(b, best_order(lambda order: alike[range(len(order)), order].sum(), len(alike)))
    w, bias, v, c = mean(a, b)
    now, first, second = (hidden(net, x) for net in ((w, bias, v, c), a, b))
    gain = (first.std(1) + second.std(1)) / 2 / now.std(1)
    shift = (first.mean(1) + second.mean(1)) / 2 - gain * now.mean(1)
    return gain[:, None] * w, gain * bias + shift, v, c


def zipped(a, b, x, alpha, beta):
    """Stoica et al. 2024: merge the most alike, within a network as often as its budget allows."""
    groups = [[(net, i)] for net in (0, 1) for i in range(len(a[1]))]
    values = np.vstack([relu(hidden(net, x)) for net in (a, b)])
    alike, size = np.corrcoef(values), len(a[1])
    np.fill_diagonal(alike, -np.inf)
    budget = [int(size * 0.5 * beta)] * 2
    while len(groups) > size:
        owners = [{net for net, _ in group} for group in groups]
        spent = {net for net in (0, 1) if not budget[net]}
        barred = [[bool(p & q & spent) for q in owners] for p in owners]
        i, j = sorted(divmod(np.where(barred, -np.inf, alike).argmax(), len(groups)))
        for net in owners[i] & owners[j]:
            budget[net] -= 1
        lower = np.minimum(alike[i], alike[j])
        alike[i] = alike[:, i] = np.minimum(alpha * lower, lower)
        alike = np.delete(np.delete(alike, j, 0), j, 1)
        groups[i] += groups.pop(j)
    parts = [sum(1 for _ in group) for group in groups]
    w, bias = (
        np.stack([sum((a, b)[net][t][i] for net, i in g) / n for g, n in zip(groups, parts)])
        for t in (0, 1)
    )
    v = np.stack([sum((a, b)[net][2][:, i] for net, i in g) / 2 for g in groups], 1)
    return w, bias, v, (a[3] + b[3]) / 2


def zipit(a, b, x):
    return zipped(a, b, x, 0.3, 0.125)


def elastic_zip(a, b, x):
    """Xu et al. 2025."""
    return zipped(a, b, x, 0.5, 1.0)


def intra_fusion(net, kept, x):
    """Theus et al. 2024: all units transported onto those that are kept, by their values."""
    w, b, v, c = net
    y = hidden(net, x)
    cost = 1 - correlations(y[kept], y)
    plan = ot.emd(ot.unif(len(kept)), ot.unif(len(y)), cost)
    onto = len(kept) * plan
    return onto @ w, onto @ b, v @ (len(y) * plan.T), c
