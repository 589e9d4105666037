"""torchvision's networks: self-fusion, and depth within families, with nothing at a special value.

The default run takes one small network of each mechanism; `pytest -m sweep` takes all.
"""

import pytest
import torch
import torchvision.models as models
from conftest import FUNCTION
from nets import gap, randomise

import fxfuse

sweep = pytest.mark.sweep
SELF = [
    "resnet18",
    pytest.param("alexnet", marks=sweep),
    pytest.param("vgg11", marks=sweep),
    pytest.param("vgg16_bn", marks=sweep),
    pytest.param("resnet50", marks=sweep),
    pytest.param("resnext50_32x4d", marks=sweep),
    pytest.param("wide_resnet50_2", marks=sweep),
]
PAIRS = [
    ("resnet18", "resnet34"),
    pytest.param("vgg11", "vgg19", marks=sweep),
    pytest.param("vgg13_bn", "vgg16_bn", marks=sweep),
    pytest.param("resnet50", "resnet101", marks=sweep),
]


def make(name, seed=0):
    return randomise(getattr(models, name)(weights=None), seed)


@pytest.mark.parametrize("name", SELF)
def test_a_model_fused_with_its_permuted_copy_computes_what_it_computes(name):
    net, x = make(name), torch.randn(16, 3, 64, 64)
    fused = fxfuse.fuse([net, fxfuse.permute(net, x[:1], seed=1)], x)
    assert gap(net, fused, x) < FUNCTION
    getattr(models, name)(weights=None).load_state_dict(fused.state_dict(), strict=True)


@pytest.mark.parametrize(("shallow", "deep"), PAIRS)
def test_pairs_of_a_family_balance_exactly_and_fuse_into_the_deeper_class(shallow, deep):
    nets, x = [make(shallow, 1), make(deep, 2)], torch.randn(16, 3, 64, 64)
    for net, balanced in zip(nets, fxfuse.balance(nets, x)):
        assert gap(net, balanced, x) < FUNCTION
    fused = fxfuse.fuse(nets, x)
    getattr(models, deep)(weights=None).load_state_dict(fused.state_dict(), strict=True)
    assert torch.isfinite(fused(x)).all()
