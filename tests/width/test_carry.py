"""Copies of units: which are made, and the weights of a network carried into another width."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxfuse.calibration.data import analyse
from fxfuse.errors import NotEquivalent, PairingError
from fxfuse.ir import Space
from fxfuse.width._carry import (
    EXACT,
    _factor_scale,
    _precise_variant,
    _varied,
    add_noise,
    carry_weights,
    closest_copy,
    copy_counts,
    copy_maps,
    exact_copy,
    in_turn,
    plan_copies,
    strongest,
)
from fxfuse.width.reshape import spaces_under_norms
from tests.support.nets import NETS, Tokens, build, gap, mlp, outputs, randomise
from tests.support.sweeps import some


@given(st.integers(1, 9), st.integers(0, 20), st.sampled_from([None, 0, 7]))
def test_every_unit_is_copied_once_before_any_is_copied_again(size, more, seed):
    chosen = in_turn(seed)(np.zeros(size), size + more)
    assert chosen[:size].tolist() == list(range(size)) and len(chosen) == size + more
    counts = np.bincount(chosen, minlength=size)
    assert counts.max() - counts.min() <= 1


def test_a_seed_changes_which_units_are_copied():
    plain, one, two = (in_turn(s)(np.zeros(9), 14).tolist() for s in (None, 1, 2))
    assert plain != one != two and one == in_turn(1)(np.zeros(9), 14).tolist()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(1, 12))
def test_the_strongest_units_are_kept_in_their_order(scores, count):
    scores = np.array(scores)
    kept = strongest(scores, count)
    assert len(kept) == count
    if count < len(scores):
        assert (np.diff(kept) > 0).all()
        assert scores[kept].min() >= np.delete(scores, kept).max()


def test_spaces_under_norms_over_units_are_found():
    for name, count in (("layer norm", 1), ("tokens", 1), ("batch norm", 0)):
        net, x = build(name)
        assert len(spaces_under_norms(analyse(net, x, "net"))) == count


def test_a_copy_of_equal_widths_copies_each_unit_of_each_block_once():
    net, x = build("grouped")
    wide = randomise(type(net)(*net))  # the same network
    plan = plan_of(net, wide, x)
    for name, sources in plan.sources.items():
        assert sources.tolist() == list(range(len(sources))), name
        assert all((counts == 1).all() for counts in copy_counts(plan, name))


def test_copies_are_counted_per_block():
    from tests.support.nets import Tokens

    x = torch.randn(2, 3, 8, 8)
    plan = plan_of(randomise(Tokens(8, 2, 12)), randomise(Tokens(16, 2, 12)), x)
    queries = next(n for n, (old, _) in plan.spaces.items() if old.blocks is not None)
    assert [c.tolist() for c in copy_counts(plan, queries)] == [[2, 2, 2, 2]] * 2
    plan = plan_of(randomise(Tokens(8, 2, 12)), randomise(Tokens(16, 4, 12)), x)
    assert [c.tolist() for c in copy_counts(plan, queries)] == [[1, 1, 1, 1]] * 4
    assert plan.sources[queries].tolist() == [*range(8), *range(8)]


def test_networks_of_other_structure_are_refused():
    x = torch.randn(2, 3, 8, 8)
    a = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 3, 3))
    b = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 3, 3))
    with pytest.raises(PairingError):
        plan_of(randomise(a), randomise(b), x)


def test_sizes_are_given_before_and_after():
    plan = plan_of(randomise(mlp(6, 5, 4, 3)), randomise(mlp(6, 7, 8, 3)), torch.randn(2, 6))
    assert plan.sizes() == {"0": (5, 7), "2": (4, 8)}


IMAGES = torch.randn(2, 3, 8, 8)


def plan_of(net, like, x=IMAGES, choose=None):
    return plan_copies(analyse(net, x, "a"), analyse(like, x, "b"), choose or in_turn(None))


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
def test_products_keep_their_value_however_the_code_scales_them(scale):
    x = torch.randn(2, 4, 5)
    net, wide = randomise(Products(4, scale)), randomise(Products(8, scale), 1)
    wider = exact_copy(plan_of(net, wide, x))
    assert wider.error <= 1e-5 and gap(net, wider.module, torch.randn(2, 4, 5)) <= 1e-5


@given(st.integers(1, 6), st.integers(0, 9), st.integers(0, 99))
def test_the_product_over_copies_is_the_product_over_units(size, more, seed):
    rng = np.random.default_rng(seed)
    old, new = Space("s", size, ()), Space("s", size + more, ())
    sources = in_turn(seed)(np.zeros(size), size + more)
    q, k = rng.normal(size=(2, size))
    wanted = {
        "fixed": q @ k,
        "by the width": q @ k * (new.size / size) ** 0.5,
        "by the block": q @ k * (new.size / size) ** 0.5,
    }
    for scaling, value in wanted.items():
        scale = _factor_scale(old, new, sources, scaling)
        assert (scale * q[sources]) @ (scale * k[sources]) == pytest.approx(value)


def test_only_spaces_that_no_weight_reads_are_scaled():
    plan = plan_of(randomise(Tokens(8, 2, 12)), randomise(Tokens(16, 4, 24), 1))
    multiplied = plan.problem.unread
    assert len(multiplied) == 1
    axes = plan.resized.spaces[next(iter(multiplied))].axes
    assert {a.tensor.rpartition(".")[2] for a in axes} == {"in_proj_weight", "in_proj_bias"}


class Counted(nn.Module):
    """A network whose output depends, more or less, on its number of units."""

    def __init__(self, width, seen):
        super().__init__()
        self.a, self.b, self.seen = nn.Linear(5, width), nn.Linear(width, 3), seen

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(x) + self.seen * x.shape[1]


@pytest.mark.parametrize("seen", [1.0, 1e-5])
def test_copies_that_change_the_function_are_refused_however_small_the_change(seen):
    net, x = randomise(Counted(4, seen)), torch.randn(4, 5)
    with pytest.raises(NotEquivalent, match="duplicated"):
        exact_copy(plan_of(net, randomise(Counted(8, seen), 1), x))


def test_a_norm_needs_whole_multiples():
    net, x = build("layer norm")
    wide = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 3))
    with pytest.raises(PairingError, match="norm over units") as caught:
        exact_copy(plan_of(net, randomise(wide), x))
    assert "multiple" in caught.value.expected


def test_a_narrower_network_is_refused():
    with pytest.raises(PairingError, match="some are lost"):
        exact_copy(plan_of(randomise(mlp(6, 8, 3)), randomise(mlp(6, 7, 3)), torch.randn(2, 6)))


@pytest.mark.parametrize("name", some(sorted(NETS), "residual", "grouped", "tokens", "shared"))
def test_a_copy_of_equal_widths_has_the_same_weights(name):
    net, x = build(name)
    plan = plan_of(net, randomise(copy.deepcopy(net), 7), x)
    module = exact_copy(plan).module
    for key, tensor in net.state_dict().items():
        assert torch.allclose(module.state_dict()[key], tensor), key


def test_the_variant_that_is_checked_has_no_constant_tensor():
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    nn.init.zeros_(fresh[2].weight)
    network = analyse(fresh.eval(), IMAGES, "fresh")
    varied = _varied(network.module)
    for tensor in [*varied.parameters(), *varied.buffers()]:
        assert not tensor.is_floating_point() or tensor.min() < tensor.max()
    assert not network.module.get_submodule("2").weight.any()
    assert varied.get_submodule("1").running_var.min() > 0.5
    module, example, tolerance = _precise_variant(network)
    assert tolerance == EXACT and example[0].dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in module.parameters())


def test_code_that_fixes_its_precision_is_checked_in_that_precision():
    class Single(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b = nn.Linear(5, width), nn.Linear(width, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x.float())))

    x = torch.randn(4, 5)
    network = analyse(randomise(Single(4)), x, "a")
    assert _precise_variant(network)[2] == 1e-4
    assert exact_copy(plan_of(randomise(Single(4)), randomise(Single(9)), x)).error < 1e-6


def test_noise_of_the_given_size_is_added_to_duplicated_units_only():
    net, wide = randomise(mlp(6, 5, 3)), randomise(mlp(6, 8, 3), 1)
    copied = exact_copy(plan_of(net, wide, torch.randn(2, 6)))
    module = copied.module
    before = copy.deepcopy(module.state_dict())
    add_noise(copied, 0.1, 0)
    change = (module.get_submodule("0").weight - before["0.weight"]).detach()
    assert change.abs().amax(1).gt(0).tolist() == [True] * 3 + [False] * 2 + [True] * 3
    rows = change.abs().amax(1) > 0
    spread = float(before["0.weight"].std())
    assert 0.05 * spread < float(change[rows].std()) < 0.2 * spread
    assert torch.equal(module.get_submodule("2").weight, before["2.weight"])


def test_the_closest_copy_is_taken_where_none_is_exact():
    net, small = randomise(Products(6, "by the size")), randomise(Products(3, "by the size"), 1)
    x = torch.randn(2, 4, 5)
    original, other = analyse(net, x, "a"), analyse(small, x, "b")
    plan = plan_copies(original, other, strongest)
    closest = closest_copy(plan, original.module, original.example, 0.0)
    errors = []
    for scaling in ("by the block", "by the width", "fixed", "normalised"):
        module = carry_weights(plan, copy_maps(plan, scaling), original.module)
        errors.append(gap(net, module, x))
    assert closest.error == pytest.approx(min(errors), rel=1e-3)
    assert outputs(closest.module, x).shape == (2, 4, 3)
