"""Distances of outputs: each against its formula, in one batch and in several."""

import pytest
import torch

from fxfuse.calibration.data import Calibration, analyse
from fxfuse.calibration.distance import divergence, is_logits, relative_error_on
from tests.support.nets import mlp, outputs, randomise
from tests.support.tolerances import EXACT

WANTED, GIVEN = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))


def test_the_divergence_is_that_of_the_softmax():
    p, q = WANTED.double().softmax(1), GIVEN.double().softmax(1)
    assert divergence(WANTED, GIVEN) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-12)
    assert divergence(WANTED, WANTED + 3.0) == pytest.approx(0.0, abs=1e-5)


def test_the_divergence_sums_over_samples():
    parts = divergence(WANTED[:3], GIVEN[:3]) + divergence(WANTED[3:], GIVEN[3:])
    assert divergence(WANTED, GIVEN) == pytest.approx(parts, rel=1e-12)


def test_logits_have_samples_and_classes():
    assert is_logits(torch.zeros(3, 2))
    assert not any(map(is_logits, [torch.zeros(3, 1), torch.zeros(3, 2, 4), [torch.zeros(3, 2)]]))


def test_the_error_of_a_network_is_the_root_mean_square_over_all_outputs():
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    a, b = (analyse(randomise(mlp(6, 5, 3), seed=s), (x,), "net") for s in (1, 2))
    one, two = outputs(a.module, x).double(), outputs(b.module, x).double()
    wanted = float((one - two).norm() / one.norm())
    assert relative_error_on(Calibration(x), a, b) == pytest.approx(wanted, rel=1e-5)
    assert relative_error_on(Calibration(x), a, a) <= EXACT
