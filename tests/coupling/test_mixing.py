"""Tensors mixed by the maps of their axes, against what the formulas say."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch import nn

import fxfuse
from fxfuse.calibration.data import Calibration
from fxfuse.coupling.measure import measure
from fxfuse.coupling.mixing import Couplings, apply_along, turned
from fxfuse.coupling.plans import two_maps
from fxfuse.coupling.transport import Transport
from fxfuse.ir import Coupling
from tests.support.nets import gap, mlp, randomise, stages
from tests.support.problems import images, problem_of
from tests.support.tolerances import FUNCTION


def test_a_tensor_is_mixed_as_the_formula_says():
    nets, x = [randomise(stages([5, 6], [7]), s) for s in (1, 2)], images()
    problem = problem_of(nets, x, weights=(0.3, 0.7))
    rng = np.random.default_rng(0)
    couplings, maps = {}, {}
    for name, spaces in problem.spaces.items():
        for k in (0, 1):
            p, u = (rng.random((spaces[k].size,) * 2) for _ in range(2))
            maps[name, k] = (p, u)
            couplings[name, k] = Coupling(csr_array(p), csr_array(u))
    weights = [n.state_dict()["0.1.0.weight"].numpy() for n in nets]
    (first, second) = [s.name for s in problem.networks[0].spaces][:2]
    expected = sum(
        share * np.einsum("Oo,oihw,iI->OIhw", maps[second, k][0], weights[k], maps[first, k][1])
        for k, share in enumerate((0.3, 0.7))
    )
    mixed = Couplings(problem, couplings).mix("0.1.0.weight", weights)
    assert np.allclose(mixed, expected, rtol=1e-5, atol=1e-6)


def test_a_fused_unit_that_a_network_gives_nothing_to_is_that_of_the_others():
    nets, x = [randomise(mlp(4, 3, 2), s) for s in (1, 2)], torch.randn(30, 4)
    transport, problem = Transport(), problem_of(nets, x)
    couplings = transport(problem, measure(problem, Calibration(x), transport.view, {}, len(x)))
    space = next(iter(couplings.problem.networks[0].spaces))
    plan = np.eye(3) / 3
    plan[1] = 0.0
    couplings.maps[space.name, 1] = Coupling(*two_maps(csr_array(plan)))
    weights = [n.state_dict()["0.weight"].numpy() for n in nets]
    mixed = couplings.mix("0.weight", weights)
    assert np.allclose(mixed[[0, 2]], (weights[0] + weights[1])[[0, 2]] / 2, atol=1e-6)
    assert np.allclose(mixed[1], weights[0][1], atol=1e-6)
    heads = [n.state_dict()["2.weight"].numpy() for n in nets]
    read = couplings.mix("2.weight", heads)
    assert np.allclose(read[:, 1], heads[0][:, 1] / 2, atol=1e-6)


def test_a_map_along_an_axis_is_the_product_with_its_matrix():
    rng = np.random.default_rng(0)
    tensor, picks = rng.random((3, 4, 5)), np.zeros((6, 4))
    picks[np.arange(6), [3, 0, 1, 1, 2, 0]] = [1, 2, 1, 0.5, 1, 1]
    for matrix in (np.eye(4), np.eye(4)[[2, 0, 3, 1]], picks, rng.random((6, 4))):
        expected = np.einsum("ij,ajb->aib", matrix, tensor)
        assert np.allclose(apply_along(csr_array(matrix), tensor, 1), expected)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("groups", [2, None])
def test_grouped_transposed_convolutions_of_two_widths_give_each_parent_back(groups, outputs):
    def build(width, seed):
        upscale = nn.ConvTranspose2d(width, outputs * width, 2, 2, groups=groups or width)
        head = nn.Conv2d(outputs * width, 3, 1)
        net = nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), upscale, nn.ReLU(), head)
        return randomise(net, seed)

    narrow, wide, x = build(4, 1), build(6, 2), torch.randn(20, 3, 4, 4)
    for weights in ([1, 0], [0.5, 0.5]):
        fused = fxfuse.fuse([narrow, wide], x, weights=weights)
        assert fused(x).isfinite().all()
        assert weights != [1, 0] or gap(narrow, fused, x) < FUNCTION


def test_turning_a_grouped_weight_twice_gives_it_back():
    weight = np.random.default_rng(0).standard_normal((6, 4, 3))
    turned_once = turned(weight, 2)
    assert turned_once.shape == (8, 3, 3) and (turned(turned_once, 2) == weight).all()
    assert (turned_once[4 + 1, 2] == weight[3 + 2, 1]).all()
