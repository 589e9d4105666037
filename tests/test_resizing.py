import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import NETS, Tokens, build, gap, mlp, outputs, randomise
from torch import nn

from fxfuse.errors import NotEquivalent, PairingError
from fxfuse.intake import analysed
from fxfuse.ir import Space
from fxfuse.resizing import (
    EXACT,
    _precise,
    _product_scale,
    _summed,
    _varied,
    carried,
    couple,
    disturb,
    exact,
    nearest,
)
from fxfuse.stands import duplicates, resize, strongest

IMAGES = torch.randn(2, 3, 8, 8)


def plan_of(net, like, x=IMAGES, pick=None):
    return resize(analysed(net, x, "a"), analysed(like, x, "b"), pick or duplicates(None))


class Products(nn.Module):
    """Attention written out, with a scale that the code takes from somewhere."""

    def __init__(self, width, scale):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, width), nn.Linear(5, width), nn.Linear(5, width)
        self.out, self.scale = nn.Linear(width, 3), scale

    def forward(self, x):
        q, k = self.q(x), self.k(x)
        if self.scale == "normalised":
            q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        scale = q.shape[-1] ** -0.5 if self.scale == "by the size" else 0.3
        return self.out(torch.softmax(q @ k.transpose(1, 2) * scale, -1) @ self.v(x))


@pytest.mark.parametrize("scale", ["by the size", "fixed", "normalised"])
def test_products_stay_however_the_code_scales_them(scale):
    x = torch.randn(2, 4, 5)
    net, wide = randomise(Products(4, scale)), randomise(Products(8, scale), 1)
    module, error = exact(plan_of(net, wide, x))
    assert error <= 1e-5 and gap(net, module, torch.randn(2, 4, 5)) <= 1e-5


@given(st.integers(1, 6), st.integers(0, 9), st.integers(0, 99))
def test_a_product_over_copies_is_the_product(size, more, seed):
    rng = np.random.default_rng(seed)
    own, there = Space("s", size, ()), Space("s", size + more, ())
    stands = duplicates(seed)(np.zeros(size), size + more)
    q, k = rng.normal(size=(2, size))
    wanted = {
        "fixed": q @ k,
        "by the width": q @ k * (there.size / size) ** 0.5,
        "by the block": q @ k * (there.size / size) ** 0.5,
    }
    for products, value in wanted.items():
        scale = _product_scale(own, there, stands, products)
        assert (scale * q[stands]) @ (scale * k[stands]) == pytest.approx(value)


def test_only_units_that_no_weight_reads_are_scaled():
    plan = plan_of(randomise(Tokens(8, 2, 12)), randomise(Tokens(16, 4, 24), 1))
    summed = _summed(plan)
    assert len(summed) == 1
    axes = plan.networks[1].spaces[summed.pop()].axes
    assert {a.tensor.rpartition(".")[2] for a in axes} == {"in_proj_weight", "in_proj_bias"}


class Counted(nn.Module):
    """A network that knows how many units it has, and lets it be seen more or less."""

    def __init__(self, width, seen):
        super().__init__()
        self.a, self.b, self.seen = nn.Linear(5, width), nn.Linear(width, 3), seen

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(x) + self.seen * x.shape[1]


@pytest.mark.parametrize("seen", [1.0, 1e-5])
def test_maps_that_do_not_keep_the_function_are_refused_however_little_it_shows(seen):
    net, x = randomise(Counted(4, seen)), torch.randn(4, 5)
    with pytest.raises(NotEquivalent, match="duplicated"):
        exact(plan_of(net, randomise(Counted(8, seen), 1), x))


def test_a_norm_needs_whole_multiples():
    net, x = build("layer norm")
    wide = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 3))
    with pytest.raises(PairingError, match="norm over units") as caught:
        exact(plan_of(net, randomise(wide), x))
    assert "multiple" in caught.value.expected


def test_what_is_narrower_is_refused():
    with pytest.raises(PairingError, match="too few"):
        exact(plan_of(randomise(mlp(6, 8, 3)), randomise(mlp(6, 7, 3)), torch.randn(2, 6)))


@pytest.mark.parametrize("name", sorted(NETS))
def test_a_network_carried_into_itself_is_itself(name):
    net, x = build(name)
    plan = plan_of(net, randomise(copy.deepcopy(net), 7), x)
    module, _ = exact(plan)
    for key, tensor in net.state_dict().items():
        assert torch.allclose(module.state_dict()[key], tensor), key


def test_the_copy_that_is_checked_has_no_constant_tensor():
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    nn.init.zeros_(fresh[2].weight)
    network = analysed(fresh.eval(), IMAGES, "fresh")
    varied = _varied(network.module)
    for tensor in [*varied.parameters(), *varied.buffers()]:
        assert not tensor.is_floating_point() or tensor.min() < tensor.max()
    assert not network.module.get_submodule("2").weight.any()
    assert varied.get_submodule("1").running_var.min() > 0.5
    module, example, tolerance = _precise(network)
    assert tolerance == EXACT and example[0].dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in module.parameters())


def test_code_of_its_own_precision_is_checked_in_that():
    class Single(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b = nn.Linear(5, width), nn.Linear(width, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x.float())))

    x = torch.randn(4, 5)
    network = analysed(randomise(Single(4)), x, "a")
    assert _precise(network)[2] == 1e-4
    assert exact(plan_of(randomise(Single(4)), randomise(Single(9)), x))[1] < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_and_gradients_are_the_networks(dtype):
    net, wide = randomise(mlp(6, 4, 3)).to(dtype), randomise(mlp(6, 8, 3), 1)
    net[0].weight.requires_grad_(False)
    like = analysed(wide, torch.randn(2, 6), "b")
    plan = resize(analysed(net, torch.randn(2, 6, dtype=dtype), "a"), like, duplicates(None))
    module, _ = exact(plan)
    assert {p.dtype for p in module.parameters()} == {dtype}
    flags = {n: p.requires_grad for n, p in module.named_parameters()}
    assert flags.pop("0.weight") is False and all(flags.values())


def test_noise_moves_the_copies_alone_by_its_size():
    net, wide = randomise(mlp(6, 5, 3)), randomise(mlp(6, 8, 3), 1)
    plan = plan_of(net, wide, torch.randn(2, 6))
    module, _ = exact(plan)
    before = copy.deepcopy(module.state_dict())
    disturb(plan, module, 0.1, 0)
    change = (module.get_submodule("0").weight - before["0.weight"]).detach()
    assert change.abs().amax(1).gt(0).tolist() == [True] * 3 + [False] * 2 + [True] * 3
    rows = change.abs().amax(1) > 0
    spread = float(before["0.weight"].std())
    assert 0.05 * spread < float(change[rows].std()) < 0.2 * spread
    assert torch.equal(module.get_submodule("2").weight, before["2.weight"])


def test_the_nearest_network_is_taken_where_none_is_exact():
    net, small = randomise(Products(6, "by the size")), randomise(Products(3, "by the size"), 1)
    x = torch.randn(2, 4, 5)
    own, other = analysed(net, x, "a"), analysed(small, x, "b")
    plan = resize(own, other, strongest, weigh=True)
    module, error = nearest(plan, own.module, own.example, 0.0)
    errors = []
    for products in ("by the block", "by the width", "fixed", "normalised"):
        couple(plan, products)
        errors.append(gap(net, carried(plan, own.module), x))
    assert error == pytest.approx(min(errors), rel=1e-3)
    assert outputs(module, x).shape == (2, 4, 3)
