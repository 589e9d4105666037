import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import build, gap, mlp, outputs, randomise, residual

import fxfuse
from fxfuse.errors import PairingError
from fxfuse.inplace import InPlace
from fxfuse.refit import MatchMoments

NAIVE = fxfuse.Method(coupling=InPlace(), refit=MatchMoments(keep=True))


@settings(max_examples=6)
@given(st.floats(0, 1), st.integers(0, 99))
def test_weights_are_averaged_name_by_name(share, seed):
    a, b = (randomise(mlp(6, 8, 7, 3), seed + i) for i in range(2))
    fused = NAIVE([a, b], torch.randn(20, 6), weights=[share, 1 - share])
    theirs = b.state_dict()
    for name, tensor in a.state_dict().items():
        wanted = share * tensor + (1 - share) * theirs[name]
        assert torch.allclose(fused.state_dict()[name], wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["batch norm", "residual", "grouped", "tokens"])
def test_a_network_averaged_with_itself_is_itself(name):
    net, x = build(name)
    assert gap(net, NAIVE([net, net], x.repeat(8, *[1] * (x.dim() - 1))), x) <= 1e-4


def test_permuted_units_are_not_found_again():
    net, x = build("plain")
    pair, data = [net, fxfuse.permute(net, x, seed=1)], torch.randn(50, 6)
    assert gap(net, fxfuse.fuse(pair, data), data) < 1e-4 < 0.1 < gap(net, NAIVE(pair, data), data)


def test_networks_of_unequal_depth_are_balanced_first():
    deep, shallow = randomise(mlp(6, 5, 5, 3)), randomise(mlp(6, 5, 3), 1)
    data = torch.randn(30, 6)
    alignment = fxfuse.align([deep, shallow], data)
    fused = NAIVE([deep, shallow], data, alignment=alignment)
    balanced = fxfuse.balance([deep, shallow], data, alignment=alignment)[1]
    first = (deep[0].weight + balanced.get_submodule("0").weight) / 2
    assert torch.allclose(fused.get_submodule("0").weight, first, atol=1e-6)
    assert outputs(fused, data).shape == (30, 3)


def test_networks_of_unequal_width_are_refused_with_the_reason():
    pair = [randomise(residual((6, 1))), randomise(residual((8, 1), stem=8))]
    with pytest.raises(PairingError, match="in place") as caught:
        NAIVE(pair, torch.randn(8, 3, 8, 8))
    assert "equal widths" in caught.value.expected
