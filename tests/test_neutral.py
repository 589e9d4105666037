"""Runs of layers that are neutral only as a whole; single layers are tested with the rewrites."""

import pytest
import torch
from conftest import FUNCTION
from hypothesis import given
from hypothesis import strategies as st
from nets import Gate, Pooled, gap, randomise
from torch import nn

import fxfuse
from fxfuse.errors import PassError

IMAGES = torch.randn(16, 3, 8, 8)
ACTS = [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU, nn.LeakyReLU]


def step(inputs, outputs, act=None, kernel=1, groups=1, norm=True):
    parts = [nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, groups=groups, bias=not norm)]
    return nn.Sequential(*parts, *[nn.BatchNorm2d(outputs)] * norm, *[act() for _ in [1] if act])


def inverted(inputs, inner, outputs, act, gate=False, norm=True):
    """Expand, depthwise, maybe gate, project: no skip, no activation at the end."""
    return nn.Sequential(
        step(inputs, inner, act, norm=norm),
        step(inner, inner, act, 3, inner, norm=norm),
        *[Gate(inner, 3)] * gate,
        step(inner, outputs, norm=norm),
    )


def pair(act, gate=False, norm=True, inner=11, deep=9):
    """Two networks of which one has a whole inverted bottleneck more, and other widths."""
    first = nn.Sequential(
        step(3, 5, act, norm=norm),
        inverted(5, 8, 6, act, gate, norm),
        inverted(6, inner, deep, act, gate, norm),
        step(deep, 12, act, norm=norm),
        Pooled(12, 3),
    )
    second = nn.Sequential(
        step(3, 4, act, norm=norm),
        inverted(4, 7, 7, act, gate, norm),
        step(7, 10, act, norm=norm),
        Pooled(10, 3),
    )
    return [randomise(first, 1), randomise(second, 2)]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gate", [False, True])
def test_a_run_that_one_network_lacks_is_carried_through(act, gate):
    nets = pair(act, gate)
    for net, balanced in zip(nets, fxfuse.balance(nets, IMAGES)):
        assert gap(net, balanced, IMAGES) <= FUNCTION
    fused = fxfuse.fuse(nets, IMAGES)
    pair(act, gate)[0].load_state_dict(fused.state_dict(), strict=True)
    assert torch.isfinite(fused(IMAGES)).all()


def test_biases_carry_as_well_as_norms():
    nets = pair(nn.SiLU, norm=False)
    for net, balanced in zip(nets, fxfuse.balance(nets, IMAGES)):
        assert gap(net, balanced, IMAGES) <= FUNCTION


@given(st.sampled_from(ACTS), st.booleans(), st.integers(0, 99))
def test_inputs_four_times_as_far_out_as_the_examples_still_pass(act, gate, seed):
    nets = pair(act, gate)
    after = fxfuse.balance(nets, IMAGES)[1]
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    assert gap(nets[1], after, x.clamp(-2, 2)) <= FUNCTION


def test_all_weight_on_either_network_gives_a_network_of_its_own_path():
    nets = pair(nn.SiLU)
    fused = fxfuse.fuse(nets, IMAGES, weights=[1, 0])
    assert gap(nets[0], fused, IMAGES) <= FUNCTION


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh])
def test_activations_without_a_straight_line_are_refused(act):
    with pytest.raises(PassError, match="nowhere a straight line"):
        fxfuse.balance(pair(act), IMAGES)


def test_a_run_narrower_than_the_stream_is_refused():
    with pytest.raises(PassError, match="narrower"):
        fxfuse.balance(pair(nn.SiLU, inner=5), IMAGES)


def test_the_settings_of_a_gate_without_a_bias_are_refused():
    nets = pair(nn.SiLU, gate=True)
    for net in nets:
        for part in net.modules():
            if isinstance(part, Gate):
                part.up.bias = None
    with pytest.raises(PassError, match="no bias to open it"):
        fxfuse.balance(nets, IMAGES)


def test_the_models_are_left_as_they_were():
    nets = pair(nn.SiLU)
    before = [{k: v.clone() for k, v in n.state_dict().items()} for n in nets]
    fxfuse.balance(nets, IMAGES)
    for net, state in zip(nets, before):
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
