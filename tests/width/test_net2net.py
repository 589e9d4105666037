"""Wider copies, which compute the same."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.errors import ArgumentError, PairingError
from fxfuse.graph.verify import lint
from tests.support.nets import (
    NETS,
    Concat,
    Inverted,
    Pooled,
    Tokens,
    build,
    conv,
    data_shape,
    gap,
    mlp,
    random_nets,
    randomise,
    residual,
)
from tests.support.sweeps import crossed, some

IMAGES = torch.randn(2, 3, 8, 8)
OTHER = torch.randn(3, 3, 8, 8)


# --- wider ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "factor"), crossed(sorted(NETS), [2, 3]))
def test_a_wider_copy_computes_the_same(name, factor):
    net, x = build(name)
    before = copy.deepcopy(net.state_dict())
    wide = fxfuse.net2wider(net, x, factor=factor)
    assert gap(net, wide, torch.randn(3, *data_shape(name))) <= 1e-5
    lint(wide)
    report, stays = wide.meta["fxfuse"], {s.parent for s in fxfuse.find_spaces(net, x)}
    if name == "states":
        stays.add("1.pick")  # two activations are summed over it: no weight shares out the copies
    for space, (old, new) in report.sizes.items():
        assert new == (old if space in stays else factor * old), space
        assert (space in report.kept) == (space in stays)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


@settings(max_examples=12)
@given(random_nets(), st.sampled_from([1.25, 1.5, 2]), st.sampled_from([None, 3]))
def test_random_networks_wider_by_any_factor_compute_the_same(net, factor, seed):
    wide = fxfuse.net2wider(net, IMAGES, factor=factor, seed=seed)
    assert gap(net, wide, OTHER) <= 1e-4
    grown = [new >= old for old, new in wide.meta["fxfuse"].sizes.values()]
    assert all(grown) and wide.meta["fxfuse"].error <= 1e-4


class GroupNormed(nn.Module):
    def __init__(self, width=8, groups=2):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.again = (nn.GroupNorm(groups, width) for _ in "ab")
        self.head = Pooled(width, 3)

    def forward(self, x):
        x = torch.nn.functional.silu(self.norm(self.a(x)))
        return self.head(x + self.again(self.b(x)))


LIKE = {
    "group norm inside": (lambda: GroupNormed(8), lambda: GroupNormed(24)),
    "group norm, more groups": (lambda: GroupNormed(8), lambda: GroupNormed(16, 4)),
    "more heads": (lambda: Tokens(8, 2, 12), lambda: Tokens(16, 4, 15)),
    "larger heads": (lambda: Tokens(8, 2, 12), lambda: Tokens(24, 2, 13)),
    "more and larger heads": (lambda: Tokens(8, 2, 12), lambda: Tokens(32, 4, 24)),
    "residual": (lambda: residual((6, 2), (8, 1)), lambda: residual((7, 2), (13, 1), stem=7)),
    "gate": (
        lambda: nn.Sequential(conv(3, 6), Inverted(6, 9, 4), Pooled(6, 3)),
        lambda: nn.Sequential(conv(3, 8), Inverted(8, 9, 7), Pooled(8, 3)),
    ),
    "concat": (
        lambda: nn.Sequential(conv(3, 4), Concat(4, 3), Concat(7, 5), Pooled(12, 3)),
        lambda: nn.Sequential(conv(3, 5), Concat(5, 7), Concat(12, 6), Pooled(18, 3)),
    ),
    "groups": (
        lambda: nn.Sequential(conv(3, 8), conv(8, 8, groups=2), Pooled(8, 3)),
        lambda: nn.Sequential(conv(3, 16), conv(16, 24, groups=4), Pooled(24, 3)),
    ),
}


@pytest.mark.parametrize("name", LIKE)
def test_a_copy_like_a_wider_network_loads_into_its_class(name):
    net, wide = (randomise(build(), seed) for seed, build in enumerate(LIKE[name]))
    result = fxfuse.net2wider(net, IMAGES, like=wide, seed=1)
    wide.load_state_dict(result.state_dict())
    assert gap(net, wide, OTHER) <= 1e-5
    assert result.meta["fxfuse"].kept == {}


@pytest.mark.parametrize("factor", [1.5, 2])
def test_several_outputs_of_each_input_are_duplicated_together(factor):
    twice = nn.Conv2d(4, 8, 3, padding=1, groups=4)
    net = randomise(nn.Sequential(conv(3, 4), twice, nn.ReLU(), Pooled(8, 3)))
    wide = fxfuse.net2wider(net, IMAGES, factor=factor)
    assert gap(net, wide, OTHER) <= 1e-5
    assert wide.get_submodule("1").out_channels == 8 * factor


def test_what_cannot_be_wider_keeps_its_width_and_says_why():
    net, x = build("layer norm")
    with pytest.raises(ArgumentError, match="no space"):
        fxfuse.net2wider(net, x, factor=1.5)
    wide = fxfuse.net2wider(*build("tokens"), factor=1.5)
    report = wide.meta["fxfuse"]
    assert report.sizes["token"] == (8, 8) and "whole multiples" in report.kept["token"]
    assert report.sizes["blocks.0.mlp.0"] == (12, 18) and "blocks.0.mlp.0" not in report.kept


def test_a_space_whose_size_the_code_uses_keeps_its_width():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.c(torch.relu(self.b(x / x.shape[1])))

    net, x = randomise(Half()), torch.randn(4, 6)
    wide = fxfuse.net2wider(net, x)
    assert gap(net, wide, x) <= 1e-5
    report = wide.meta["fxfuse"]
    assert report.sizes == {"a": (8, 8), "b": (5, 10)} and "differ" in report.kept["a"]


@pytest.mark.parametrize(
    ("like", "kind", "words"),
    [
        (lambda: mlp(6, 8, 5, 3), PairingError, "some are lost"),
        (lambda: mlp(6, 9, 9, 9, 3), PairingError, "structures that differ"),
        (lambda: mlp(6, 9, 9, 4), PairingError, "must stay in place"),
    ],
)
def test_networks_that_are_no_wider_version_are_refused(like, kind, words):
    with pytest.raises(kind, match=words):
        fxfuse.net2wider(randomise(mlp(6, 8, 7, 3)), torch.randn(2, 6), like=randomise(like()))


@pytest.mark.parametrize("options", [{"factor": 0.5}, {"noise": -1.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ArgumentError, match="out of range"):
        fxfuse.net2wider(*build("plain"), **options)


def test_a_seed_changes_which_units_are_duplicated():
    net, x = build("plain")
    states = [fxfuse.net2wider(net, x, factor=1.5, seed=s).state_dict() for s in (None, 1, 1, 2)]
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(states, states[1:])]
    assert same == [False, True, False]


def test_duplicates_stay_alike_in_training_unless_there_is_noise():
    net, x = build("plain")
    for noise, alike in ((0.0, True), (0.05, False)):
        wide = fxfuse.net2wider(net, x, noise=noise).train()
        assert (gap(net, wide, x) < 1e-5) == alike
        step = torch.optim.Adam(wide.parameters(), 0.01)
        wide(torch.randn(20, 6)).square().sum().backward()
        step.step()
        weight = wide.get_submodule("0").weight
        assert torch.allclose(weight[:8], weight[8:], atol=1e-6) == alike


def test_noise_reaches_what_a_grouped_transposed_convolution_writes():
    grouped = nn.ConvTranspose2d(4, 6, 2, groups=2)
    net, x = randomise(nn.Sequential(conv(3, 4), grouped, nn.ReLU(), conv(6, 3))), IMAGES
    wide, noisy = (fxfuse.net2wider(net, x, noise=n).state_dict()["1.weight"] for n in (0.0, 0.1))
    assert wide.shape == noisy.shape == (8, 6, 2, 2)
    assert ((wide - noisy).flatten(2).norm(dim=2) > 0).all()


def test_a_copy_is_in_the_models_mode():
    net, x = build("residual")
    assert fxfuse.net2wider(net.train(), x).training
    assert not fxfuse.net2wider(net.eval(), x).training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_copy_has_the_models_precision_and_gradient_flags(dtype):
    net = randomise(mlp(6, 4, 3)).to(dtype)
    net[0].weight.requires_grad_(False)
    wide = fxfuse.net2wider(net, torch.randn(2, 6, dtype=dtype))
    assert {p.dtype for p in wide.parameters()} == {dtype}
    flags = {n: p.requires_grad for n, p in wide.named_parameters()}
    assert flags.pop("0.weight") is False and all(flags.values())


def test_a_network_and_its_wider_copy_fuse_into_the_same_function():
    net, x = build("batch norm")
    wide, data = fxfuse.net2wider(net, x, seed=0), torch.randn(40, 3, 8, 8)
    assert gap(net, fxfuse.fuse([net, wide], data, anchor=1), data) <= 1e-3


# --- torchvision ------------------------------------------------------------------------------


def tv(name, **options):
    from torchvision import models

    return lambda: models.get_model(name, weights=None, **options)


def densenet(growth, stem):
    from torchvision.models import DenseNet

    return lambda: DenseNet(growth, (6, 12, 24, 16), stem, num_classes=7)


def vit(width, heads, inner):
    from torchvision.models import VisionTransformer

    return lambda: VisionTransformer(32, 8, 2, heads, width, inner, num_classes=7)


def swin(width, heads, second=False):
    from torchvision.models import swin_transformer as s

    v2 = {"block": s.SwinTransformerBlockV2, "downsample_layer": s.PatchMergingV2}
    return lambda: s.SwinTransformer(
        [4, 4], width, [2, 2], heads, [4, 4], num_classes=7, **(v2 if second else {})
    )


def maxvit(width):
    from torchvision.models import MaxVit

    return lambda: MaxVit((32, 32), width, 2, [width, 2 * width], [1, 1], 8, 0.0, num_classes=7)


PAIRS = {
    "vit": (vit(24, 3, 48), vit(48, 6, 90)),
    "swin": (swin(12, [3, 6]), swin(24, [6, 12])),
    "swin_v2": (swin(12, [3, 6], second=True), swin(24, [3, 6], second=True)),
    "maxvit": (maxvit(16), maxvit(32)),
}


LARGE = {
    "mobilenet_v2": (tv("mobilenet_v2", width_mult=1.0), tv("mobilenet_v2", width_mult=1.4)),
    "resnet50": (tv("resnet50"), tv("wide_resnet50_2")),
    "mnasnet": (tv("mnasnet0_5"), tv("mnasnet1_0")),
    "densenet": (densenet(16, 32), densenet(24, 48)),
}


def widened_like(small, large, side=32):
    from tests.support.coverage import coverage

    x = torch.randn(4, 3, side, side)
    net, wide = coverage.randomise(small(), x), large().eval()
    wide.load_state_dict(fxfuse.net2wider(net, x[:2], like=wide).state_dict())
    return gap(net, wide, torch.randn(2, 3, side, side))


@pytest.mark.parametrize("name", some(PAIRS, "vit", "swin_v2"))
def test_vision_networks_are_widened_into_larger_ones(name):
    assert widened_like(*PAIRS[name]) <= 1e-4


@pytest.mark.sweep
@pytest.mark.parametrize("name", LARGE)
def test_large_vision_networks_are_widened_into_larger_ones(name):
    assert widened_like(*LARGE[name], side=64) <= 1e-4


@pytest.mark.sweep
def test_widths_that_a_norm_does_not_allow_are_refused_with_the_reason():
    net, wide = tv("convnext_small")(), tv("convnext_base")()
    with pytest.raises(PairingError, match="units, to be") as caught:
        fxfuse.net2wider(net, torch.randn(1, 3, 64, 64), like=wide)
    assert "multiple" in caught.value.expected


SWEEP = """
vgg11_bn resnet18 resnext50_32x4d wide_resnet50_2 regnet_y_400mf efficientnet_b0
efficientnet_v2_s mobilenet_v2 mobilenet_v3_small mnasnet0_5 squeezenet1_0 densenet121 googlenet
convnext_tiny swin_t swin_v2_t
""".split()  # noqa: SIM905


@pytest.mark.sweep
@pytest.mark.parametrize("name", SWEEP)
def test_vision_networks_are_widened_by_a_factor(name):
    from tests.support.coverage import coverage

    net = coverage.build(name)
    wide = fxfuse.net2wider(net, torch.randn(2, 3, 64, 64))
    assert gap(net, wide, torch.randn(2, 3, 64, 64)) <= 1e-4
    assert all("blocks" in why for why in wide.meta["fxfuse"].kept.values())


def test_a_parameter_without_axes_keeps_its_shape():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.3))
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)) * self.scale)

    net, x = Scaled().eval(), torch.randn(20, 6)
    wide = fxfuse.net2wider(net, x, factor=1.5)
    assert wide.scale.shape == () and fxfuse.narrow(net, x).scale.shape == ()
    assert gap(net, fxfuse.fuse([net, wide], x), torch.randn(9, 6)) < 1e-4
