"""Runs of neighbouring layers, and graphs without them."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm as normal
from torch import nn

from fxfuse.depth import (
    average_of_signs,
    fitted_line,
    fitted_line_through_zero,
    majority_vote,
    sign_of_sum,
)
from fxfuse.depth._removal import Responses, Unsuitable
from fxfuse.errors import PassError
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.nets import Pooled, conv, gap, mlp, outputs, randomise, residual, stages
from tests.support.removals import layers_of, merged, network_of, removals_at, removed
from tests.support.tolerances import EXACT, FUNCTION

torch.manual_seed(0)  # of what is drawn while the tests are collected

IMAGES = torch.randn(8, 3, 8, 8)


def network(net, data=IMAGES):
    return network_of(randomise(net), data)


def leave_out(copy, removal):
    """A strategy that lets nothing take over the work of removed layers."""
    with copy.without(removal):
        pass


def test_neighbours_are_removed_together_in_pieces_between_poolings():
    original = network(stages([4, 4, 4], [4, 4]))
    names = [x.name for x in layers_of(original)]
    removals = removals_at(original, [1, 2, 3])
    assert [[x.name for x in piece] for piece in removals[0].pieces] == [names[1:3], names[3:4]]
    assert (removals[0].before.name, removals[0].behind.name) == (names[0], names[4])
    assert [x.name for x in removals[0].following] == names[4:]
    apart = removals_at(original, [0, 2])
    assert [(r.before and r.before.name, r.behind.name) for r in apart] == [
        (None, names[1]),
        (names[1], names[3]),
    ]
    assert apart[1].last.name == names[2] and str(apart[1]) == f"'{names[2]}'"
    assert removals_at(original, []) == []


@pytest.mark.parametrize(
    ("make", "data", "at", "left"),
    [
        (lambda: mlp(6, 5, 5, 5, 3), torch.randn(4, 6), [1, 2], lambda: mlp(6, 5, 3)),
        (lambda: stages([4, 4, 4], [4, 4]), IMAGES, [2, 4], lambda: stages([4, 4], [4])),
        (lambda: residual((6, 4)), IMAGES, [2, 3], lambda: residual((6, 2))),
    ],
)
def test_removed_layers_leave_the_graph_of_a_copy(make, data, at, left):
    original = network(make(), data)
    state, code = copy.deepcopy(original.module.state_dict()), original.module.code
    shorter = removed(original, at, leave_out)
    kinds = [x.kind for x in layers_of(Network.of("shorter", shorter, original.example))]
    assert kinds == [x.kind for x in layers_of(network(left(), data))]
    assert len(list(shorter.graph.nodes)) == len(list(network(left(), data).module.graph.nodes))
    assert original.module.code == code
    assert all(torch.equal(t, state[n]) for n, t in original.module.state_dict().items())
    assert set(shorter.state_dict()) < set(state)


def test_removing_layers_that_do_nothing_changes_nothing():
    net = randomise(mlp(6, 5, 5, 3))
    net[2].weight.data.copy_(torch.eye(5))
    net[2].bias.data.zero_()
    data = torch.randn(9, 6)
    original = Network.of("net", trace(net), (data[:2],))
    shorter = removed(original, [1], leave_out)
    assert torch.allclose(outputs(net, data), outputs(shorter, data), atol=1e-6)


def test_layers_are_put_back_if_the_strategy_finds_them_unsuitable():
    original = network(stages([4, 4, 4], [4, 4]))
    codes = []

    def there_and_back(copy, removal):
        with pytest.raises(Unsuitable), copy.without(removal):
            codes.append(copy.edited.module.graph.python_code("self").src)
            raise Unsuitable

    same = removed(original, [1, 2, 3], there_and_back)
    assert same.code == original.module.code and codes[0] != same.code


torch.manual_seed(0)  # of what is drawn while the tests are collected

VECTORS, IMAGES = torch.randn(200, 6), torch.randn(20, 3, 8, 8)

GATES = [
    sign_of_sum,
    majority_vote,
    average_of_signs,
    fitted_line,
    fitted_line_through_zero,
]


def measured(z, act=torch.relu, parts=3, rectifies=True):
    units = Responses("somewhere", rectifies)
    for part in torch.as_tensor(z).tensor_split(parts, 1):
        units.add(part, act(part))
    return units


def test_the_gates_by_sign_on_cases_that_tell_them_apart():
    z = [[-1.0, -1.0, 5.0], [1.0, 1.0, -5.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    units = measured(torch.tensor(z))
    lines = [gate(units) for gate in GATES[:3]]
    assert lines[0][0].tolist() == [1, 0, 1, 1, 1]  # a unit that is never active sums to zero
    assert lines[1][0].tolist() == [0, 1, 0, 0, 1]
    assert torch.allclose(lines[2][0], torch.tensor([1 / 3, 2 / 3, 0, 1 / 3, 1]).double())
    assert not any(bool(offset.any()) for _, offset in lines)


def test_half_of_the_samples_are_a_majority():
    assert majority_vote(measured(torch.tensor([[1.0, -1.0]]), parts=1))[0].tolist() == [1]


@given(st.integers(1, 4), st.integers(0, 50), st.sampled_from([torch.relu, torch.tanh, torch.exp]))
def test_the_fitted_line_is_that_of_a_regression_for_any_activation(units, seed, act):
    torch.manual_seed(seed)
    z = torch.randn(units, 40, dtype=torch.float64) + torch.randn(units, 1, dtype=torch.float64)
    slope, offset = fitted_line(measured(z, act, rectifies=False))
    through_zero, none = fitted_line_through_zero(measured(z, act, rectifies=False))
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
    slope, offset = fitted_line(measured(z))
    share, _ = average_of_signs(measured(z))
    assert abs(float(slope - share)) < 0.01
    assert abs(float(offset) - s * normal.pdf(m / s)) < 0.01


def test_the_fitted_line_of_a_constant_unit_is_that_constant():
    units = measured(torch.tensor([[3.0, 3.0], [0.0, 0.0]]), parts=1)
    assert [t.tolist() for t in fitted_line(units)] == [[0, 0], [3, 0]]
    assert fitted_line_through_zero(units)[0].tolist() == [1, 0]


@pytest.mark.parametrize("gate", GATES[:3])
def test_gates_by_sign_refuse_activations_that_do_not_rectify(gate):
    with pytest.raises(PassError, match="no rectifier") as caught:
        gate(measured(torch.randn(2, 9), torch.tanh, rectifies=False))
    assert caught.value.where == "layer 'somewhere'"


# --- merging --------------------------------------------------------------------------------------


def open_net(norm=False):
    """A perceptron whose second and third layer are always active."""
    net = randomise(mlp(6, 8, 7, 5, 3, norm=norm))
    for module in net[2 if not norm else 3 : -1]:
        if isinstance(module, nn.BatchNorm1d if norm else nn.Linear):
            module.bias.data.fill_(60.0)
    return net


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("at", [[1], [2], [1, 2]])
@pytest.mark.parametrize("gate", [sign_of_sum, majority_vote, fitted_line])
def test_layers_that_are_always_active_merge_exactly(norm, at, gate):
    net = open_net(norm)
    shorter = merged(net, VECTORS, at, gate)
    assert gap(net, shorter, VECTORS) <= FUNCTION
    assert len(layers_of(network_of(shorter, VECTORS))) == 4 - len(at)


def test_merging_multiplies_the_matrices_as_the_paper_says():
    net = randomise(mlp(6, 8, 7, 3, bias=False))
    net[4].bias = None
    shorter = merged(net, VECTORS, [1], sign_of_sum)
    z = torch.relu(VECTORS @ net[0].weight.T) @ net[2].weight.T
    truth = net[4].weight @ torch.diag((z.sum(0) >= 0).float()) @ net[2].weight
    assert torch.allclose(shorter.get_submodule("4").weight, truth, atol=1e-6)


def test_biases_are_composed():
    net = randomise(mlp(6, 8, 7, 3))
    shorter = merged(net, VECTORS, [1], average_of_signs)
    z = net[2](torch.relu(net[0](VECTORS)))
    share = (z > 0).double().mean(0).float()
    truth = net[4].bias + net[4].weight @ (share * net[2].bias)
    assert torch.allclose(shorter.get_submodule("4").bias, truth, atol=1e-6)


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Tanh])
def test_the_fitted_line_is_the_best_of_the_gates(act):
    net = randomise(mlp(6, 16, 16, 16, 3, act=act), 3)
    errors = {}
    for gate in (sign_of_sum, average_of_signs, fitted_line):
        if act is nn.ReLU or gate is fitted_line:
            shorter = merged(net, VECTORS, [1], gate)
            errors[gate] = float((outputs(net, VECTORS) - outputs(shorter, VECTORS)).norm())
    assert min(errors, key=errors.get) is fitted_line
    assert errors[fitted_line] < 0.5 * float(outputs(net, VECTORS).norm())


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh])
def test_merging_by_sign_needs_a_rectifier(act):
    with pytest.raises(PassError, match="no rectifier"):
        merged(randomise(mlp(6, 8, 7, 3, act=act)), VECTORS, [1], sign_of_sum)


def test_convolutions_merge_where_the_kernel_fits():
    parts = [conv(3, 4), conv(4, 6, 1, act=False, bias=True), conv(6, 5), Pooled(5, 3)]
    parts[2][0].padding = (0, 0)  # at padded borders a composite would not be exact
    net = randomise(nn.Sequential(*parts))
    assert gap(net, merged(net, IMAGES, [1], fitted_line), IMAGES) <= FUNCTION


UNMERGEABLE = {
    "they need a kernel of 5x5": (lambda: stages([4, 4, 4]), [1]),
    "pooling or flattening": (lambda: stages([4, 4], [4]), [1]),
    "is a block": (lambda: residual((6, 3)), [2]),
    "more than contract": (
        lambda: nn.Sequential(
            conv(3, 4, 1),
            conv(4, 4, 1, norm=False, act=False),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            conv(4, 4, 1),
            Pooled(4, 3),
        ),
        [1],
    ),
    "no single contraction": (
        lambda: nn.Sequential(
            conv(3, 4, 1),
            nn.Conv2d(4, 4, 1, 1, 1, padding_mode="circular"),
            conv(4, 4, 1),
            Pooled(4, 3),
        ),
        [1],
    ),
}


@pytest.mark.parametrize("reason", UNMERGEABLE)
def test_what_cannot_merge_is_refused_with_the_reason(reason):
    make, at = UNMERGEABLE[reason]
    with pytest.raises(PassError, match=reason) as caught:
        merged(randomise(make()), IMAGES, at, fitted_line)
    assert "least squares" in caught.value.do


def test_an_offset_is_refused_where_no_bias_can_take_it():
    net = randomise(mlp(6, 8, 7, 3, bias=False))
    net[4].bias = None
    with pytest.raises(PassError, match="cannot be stored"):
        merged(net, VECTORS, [1], fitted_line)
    assert gap(net, merged(net, VECTORS, [1], fitted_line_through_zero), VECTORS) < 1
