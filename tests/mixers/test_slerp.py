"""Spherical interpolation against its definition: an arc of equal speed between directions."""

import numpy as np
import pytest
import torch

import fxfuse
from fxfuse.errors import ArgumentError
from fxfuse.mixers import Slerp
from tests.support.nets import gap, mlp, randomise
from tests.support.tolerances import FUNCTION


def between(a, b, t):
    return Slerp()(lambda: iter([]), (1 - t, t))("w", [a, b])


def test_on_the_arc_nothing_gets_shorter_and_angles_grow_evenly():
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    whole = np.arccos(a @ b)
    for t in (0.0, 0.25, 0.5, 1.0):
        point = between(a, b, t)
        assert np.linalg.norm(point) == pytest.approx(1.0)
        assert np.arccos(np.clip(a @ point, -1, 1)) == pytest.approx(t * whole, abs=1e-6)
    assert np.linalg.norm((a + b) / 2) < 0.99


def test_tensors_of_one_direction_have_no_arc_but_a_line():
    a = np.array([[1.0, 2.0]])
    assert np.allclose(between(a, 3 * a, 0.25), 1.5 * a)
    assert np.allclose(between(0 * a, a, 0.5), a / 2)


def test_ends_are_the_networks_and_copies_give_themselves():
    nets, x = [randomise(mlp(6, 8, 8, 3), 1), randomise(mlp(6, 8, 3), 2)], torch.randn(30, 6)
    assert gap(nets[0], fxfuse.fuse(nets, x, weights=[1, 0], method="slerp"), x) < FUNCTION
    copies = [nets[0], fxfuse.permute(nets[0], x[:2], seed=3)]
    assert gap(nets[0], fxfuse.fuse(copies, x, method="slerp"), x) < FUNCTION


def test_an_arc_has_two_ends():
    with pytest.raises(ArgumentError, match="3 networks"):
        fxfuse.fuse([mlp(6, 8, 3)] * 3, torch.randn(9, 6), method="slerp")
