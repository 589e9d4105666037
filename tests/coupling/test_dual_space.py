"""Matching by activations and weights: against all permutations, and what each kind counts."""

from itertools import permutations

import numpy as np
import pytest
import torch

import fxfuse
from fxfuse.coupling import DualSpace, WeightMatching
from fxfuse.errors import ArgumentError, PairingError
from fxfuse.refit import AsMixed
from tests.support.nets import build, data_shape, gap, mlp, randomise
from tests.support.tolerances import FUNCTION


def matched(nets, x, coupling):
    """Return the permutation that the first hidden units of the second network get."""
    fused = fxfuse.fuse(nets, x, method=fxfuse.Method(coupling=coupling, refit=AsMixed()))
    return fused.meta["fxfuse"].maps["0", 1].toarray().argmax(1)


def best(nets, x, balance):
    """Return the best of all permutations of one hidden layer, and its likeness."""
    first, second = ([p.detach().numpy().astype(float) for p in net.parameters()] for net in nets)
    a, b = (net[:2](x).detach().numpy().T for net in nets)
    rho = np.corrcoef(a, b)[: len(a), len(a) :]
    most = sum(np.linalg.norm(p) * np.linalg.norm(q) for p, q in zip(first[:3], second[:3]))

    def likeness(order):
        moved = second[0][order], second[1][order], second[2][:, order]
        weights = sum((p * q).sum() for p, q in zip(first[:3], moved))
        return (1 - balance) * weights + balance * most * rho[range(len(a)), order].mean()

    orders = [list(order) for order in permutations(range(len(a)))]
    return max(orders, key=likeness), likeness


@pytest.mark.parametrize("balance", [0.3, 1.0])
def test_of_all_permutations_of_a_layer_the_best_is_found(balance):
    nets, x = [randomise(mlp(6, 5, 3), seed) for seed in (1, 2)], torch.randn(300, 6)
    order, likeness = best(nets, x, balance)
    ours = matched(nets, x, DualSpace(balance=balance))
    assert likeness(list(ours)) == pytest.approx(likeness(order), abs=1e-2)


def test_the_balance_matters_and_none_is_weight_matching():
    nets, x = [randomise(mlp(6, 24, 3), seed) for seed in (3, 4)], torch.randn(300, 6)
    orders = [matched(nets, x, DualSpace(balance=b)) for b in (0.0, 0.5, 1.0)]
    assert np.array_equal(orders[0], matched(nets, x, WeightMatching()))
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("name", ["grouped", "layer norm"])
def test_permuted_copies_give_the_network(name):
    (net, x), data = build(name), torch.randn(30, *data_shape(name))
    copies = [net, fxfuse.permute(net, x, seed=1)]
    method = fxfuse.Method(coupling=DualSpace(), refit=AsMixed())
    assert gap(net, fxfuse.fuse(copies, data, method=method), data) < FUNCTION


def test_other_widths_and_a_balance_out_of_range_are_refused():
    with pytest.raises(PairingError, match="one to one"):
        fxfuse.fuse([mlp(6, 8, 3), mlp(6, 7, 3)], torch.randn(20, 6), method="mudsc")
    with pytest.raises(ArgumentError, match="balance 2"):
        DualSpace(balance=2)
