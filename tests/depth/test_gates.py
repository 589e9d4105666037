"""None"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from fxfuse.depth import gates
from fxfuse.depth.gates import Responses
from fxfuse.errors import PassError
from tests.support.tolerances import EXACT

EVERY = [
    gates.sign_of_sum,
    gates.majority_vote,
    gates.average_of_signs,
    gates.line,
    gates.line_through_zero,
]


def measured(z, act=torch.relu, parts=3, rectifies=True):
    units = Responses("somewhere", rectifies)
    for part in torch.as_tensor(z).tensor_split(parts, 1):
        units.add(part, act(part))
    return units


def test_the_gates_by_sign_on_cases_that_tell_them_apart():
    z = [[-1.0, -1.0, 5.0], [1.0, 1.0, -5.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    units = measured(torch.tensor(z))
    found = [gate(units) for gate in EVERY[:3]]
    assert found[0][0].tolist() == [1, 0, 1, 1, 1]  # a unit that is never active sums to zero
    assert found[1][0].tolist() == [0, 1, 0, 0, 1]
    assert torch.allclose(found[2][0], torch.tensor([1 / 3, 2 / 3, 0, 1 / 3, 1]).double())
    assert not any(bool(offset.any()) for _, offset in found)


def test_half_of_the_samples_are_a_majority():
    assert gates.majority_vote(measured(torch.tensor([[1.0, -1.0]]), parts=1))[0].tolist() == [1]


@given(st.integers(1, 4), st.integers(0, 50), st.sampled_from([torch.relu, torch.tanh, torch.exp]))
def test_the_line_is_that_of_a_regression_for_any_activation(units, seed, act):
    torch.manual_seed(seed)
    z = torch.randn(units, 40, dtype=torch.float64) + torch.randn(units, 1, dtype=torch.float64)
    slope, offset = gates.line(measured(z, act, rectifies=False))
    through_zero, none = gates.line_through_zero(measured(z, act, rectifies=False))
    for i in range(units):
        truth = np.polyfit(z[i], act(z[i]), 1)
        assert np.allclose([slope[i], offset[i]], truth, atol=EXACT)
        alone = np.linalg.lstsq(z[i][:, None], act(z[i]), rcond=None)[0]
        assert np.allclose(through_zero[i], alone, atol=EXACT)
    assert not bool(none.any())


def test_for_normal_units_the_slope_is_the_share_of_active_samples():
    """Stein's lemma; offset `m Phi + s phi - Phi m`."""
    m, s = 0.4, 0.8
    z = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0)).double() * s + m
    slope, offset = gates.line(measured(z))
    share, _ = gates.average_of_signs(measured(z))
    assert abs(float(slope - share)) < 0.01
    assert abs(float(offset) - s * norm.pdf(m / s)) < 0.01


def test_units_that_do_not_vary_get_the_constant_they_are():
    units = measured(torch.tensor([[3.0, 3.0], [0.0, 0.0]]), parts=1)
    assert [t.tolist() for t in gates.line(units)] == [[0, 0], [3, 0]]
    assert gates.line_through_zero(units)[0].tolist() == [1, 0]


@pytest.mark.parametrize("gate", EVERY[:3])
def test_signs_say_nothing_of_activations_that_do_not_rectify(gate):
    with pytest.raises(PassError, match="no rectifier") as caught:
        gate(measured(torch.randn(2, 9), torch.tanh, rectifies=False))
    assert caught.value.where == "layer 'somewhere'"
