"""torchvision's networks with nothing at a special value: permuted, fused with themselves, paired.

The default run takes one small network of each mechanism; `pytest -m sweep` takes all.
"""

import pytest
import torch
from torchvision import models

import fxfuse
from fxfuse.errors import PairingError
from fxfuse.refit.moments import MatchMoments
from tests.support.coverage import coverage
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION, PERMUTATION

# Units that can be exchanged, at least. For googlenet and inception_v3 these are all there are:
# every convolution and linear layer, the auxiliary heads included, but for the outputs.
FREE = {
    "alexnet": 9_344,
    "vgg11": 10_944,
    "vgg16_bn": 12_416,
    "resnet18": 2_880,
    "resnet50": 11_456,
    "resnext50_32x4d": 19_008,
    "densenet121": 10_240,
    "r3d_18": 2_880,
    "mobilenet_v2": 9_128,
    "mobilenet_v3_small": 4_872,
    "efficientnet_b0": 11_404,
    "shufflenet_v2_x1_0": 5_626,
    "squeezenet1_1": 2_944,
    "googlenet": 9_584,
    "inception_v3": 18_112,
    "deeplabv3_mobilenet_v3_large": 9_208,
    "mnasnet1_0": 10_024,
    "regnet_y_400mf": 10_288,
    "convnext_tiny": 27_936,
    "vit_b_32": 56_064,
    "swin_t": 27_936,
    "swin_v2_t": 34_080,
    "maxvit_t": 45_280,
}


QUICK = {
    "resnet18",  # batch norm, residual streams
    "squeezenet1_1",  # joins
    "mobilenet_v3_small",  # depthwise convolutions, gates
    "shufflenet_v2_x1_0",  # interleaved streams
}


QUICK_FUSED = {
    "resnet18",
    "squeezenet1_1",
}


REFUSED = {"vit_b_16+vit_b_32", "resnet18+vgg11", "mobilenet_v3_small+mobilenet_v3_large"}
DEEPER_ELSEWHERE = {"regnet_y_400mf+regnet_y_800mf"}


QUICK_PAIRS = {
    "mobilenet_v3_small+mobilenet_v3_large",
}


def method_for(name, quick):
    """Return the default for the sweep; what is run every time takes the quicker correction."""
    return fxfuse.Method(refit=MatchMoments()) if name in quick else fxfuse.presets.best


def all_names():
    return [n for n in coverage.names_in("torchvision") if n not in coverage.GIANTS]


@pytest.mark.parametrize("name", some(all_names(), *QUICK))
def test_all_units_of_a_network_can_be_permuted(name):
    net = coverage.build(name)
    x = coverage.example(name, net, 2)
    assert fxfuse.find_spaces(net, x[:1]).free_units >= FREE.get(name, 1)
    shuffled = fxfuse.permute(net, x[:1], seed=1)
    assert coverage.difference(net, shuffled, x) < PERMUTATION
    net.load_state_dict(shuffled.state_dict(), strict=True)


@pytest.mark.parametrize("name", some(all_names(), *QUICK_FUSED))
def test_a_network_fused_with_its_permuted_copy_computes_what_it_computes(name):
    net = coverage.build(name)
    x = coverage.example(name, net, 8, small=True)
    method = method_for(name, QUICK_FUSED)
    fused = fxfuse.fuse([net, fxfuse.permute(net, x[:1], seed=1)], x, method=method)
    assert coverage.difference(net, fused, x) < FUNCTION
    net.load_state_dict(fused.state_dict(), strict=True)


@pytest.mark.parametrize("pair", some(sorted(set(coverage.PAIRS) - REFUSED), *QUICK_PAIRS))
def test_pairs_of_a_family_balance_exactly_and_fuse_into_the_deeper_class(pair):
    both = pair.split("+")
    nets = [coverage.build(name, seed) for seed, name in enumerate(both)]
    x = coverage.example(both[0], nets[0], 8, small=True)
    for net, balanced in zip(nets, fxfuse.balance(nets, x)):
        assert coverage.difference(net, balanced, x) < FUNCTION
    fused = fxfuse.fuse(nets, x, anchor=1, method=method_for(pair, QUICK_PAIRS))
    assert torch.isfinite(torch.as_tensor(coverage.difference(nets[1], fused, x)))
    if pair not in DEEPER_ELSEWHERE:
        nets[1].load_state_dict(fused.state_dict(), strict=True)


@pytest.mark.parametrize("pair", some(sorted(REFUSED), *QUICK_PAIRS))
def test_networks_of_other_families_are_refused_with_both_lists_of_segments(pair):
    both = pair.split("+")
    nets = [coverage.build(name) for name in both]
    x = coverage.example(both[0], nets[0], 2, small=True)
    with pytest.raises(PairingError) as caught:
        fxfuse.fuse(nets, x)
    assert caught.value.met.count("segments of ") == 2 and caught.value.met.count(">>") == 2


def test_heads_of_training_mode_move_with_what_they_read():
    net = coverage.build("googlenet")
    x = torch.randn(4, 3, 64, 64)
    shuffled = fxfuse.permute(net, x[:1], seed=1)
    for model in (net, shuffled):
        for part in model.modules():
            part.train(not isinstance(part, (torch.nn.Dropout, torch.nn.BatchNorm2d)))
    wanted, found = net(x), shuffled(x)
    assert isinstance(found, models.GoogLeNetOutputs)
    for a, b in zip(wanted, found):
        assert float((a - b).abs().max() / a.abs().max()) < PERMUTATION
