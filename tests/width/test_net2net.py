"""Deeper, wider and narrower copies: exact where that is claimed, of the right shape elsewhere."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.calibration.prepare import analysed
from fxfuse.errors import ArgumentError, NotEquivalent, PairingError
from fxfuse.graph.verify import lint
from fxfuse.ir import Space
from fxfuse.width.net2net import (
    EXACT,
    _precise,
    _product_scale,
    _summed,
    _varied,
    carried,
    copies,
    couple,
    disturb,
    duplicates,
    exact,
    nearest,
    resize,
    strengths,
    strongest,
)
from fxfuse.width.reshape import normed
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
    outputs,
    random_nets,
    randomise,
    residual,
)


def resize_plan_of(net, like, x, **options):
    return resize(analysed(net, x, "a"), analysed(like, x, "b"), duplicates(None), **options)


@given(st.integers(1, 9), st.integers(0, 20), st.sampled_from([None, 0, 7]))
def test_units_stand_for_themselves_first_and_are_taken_equally_often(size, more, seed):
    chosen = duplicates(seed)(np.zeros(size), size + more)
    assert chosen[:size].tolist() == list(range(size)) and len(chosen) == size + more
    counts = np.bincount(chosen, minlength=size)
    assert counts.max() - counts.min() <= 1


def test_a_seed_changes_who_is_duplicated():
    plain, one, two = (duplicates(s)(np.zeros(9), 14).tolist() for s in (None, 1, 2))
    assert plain != one != two and one == duplicates(1)(np.zeros(9), 14).tolist()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(1, 12))
def test_the_strongest_units_are_kept_in_their_order(scores, count):
    scores = np.array(scores)
    kept = strongest(scores, count)
    assert len(kept) == count
    if count < len(scores):
        assert (np.diff(kept) > 0).all()
        assert scores[kept].min() >= np.delete(scores, kept).max()


def test_strengths_are_the_norms_of_what_writes_a_unit_with_its_norm():
    net, x = build("batch norm")
    network = analysed(net, x, "net")
    found = strengths(network)["0.0.0"]
    first, norm = net[0][0][0], net[0][0][1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    rows = (first.weight * scale[:, None, None, None]).flatten(1).norm(dim=1).detach().numpy()
    bias = network.spaces["0.0.0"].axes
    assert all(a.tensor != "0.0.0.bias" for a in bias)
    assert np.allclose(found / found.sum(), rows / rows.sum(), atol=1e-6)


def test_heads_are_as_strong_as_what_is_in_them():
    net, x = build("tokens")
    network = analysed(net, x, "net")
    heads = next(s for s in network.spaces if not s.axes)
    found = strengths(network)
    assert found[heads.name].shape == (2,) and (found[heads.name] > 0).all()


def test_norms_over_units_are_seen():
    for name, count in (("layer norm", 1), ("tokens", 1), ("batch norm", 0)):
        net, x = build(name)
        assert len(normed(analysed(net, x, "net"))) == count


def test_inside_blocks_units_stand_for_units_of_their_block():
    net, x = build("grouped")
    wide = randomise(type(net)(*net))  # the same network: every block stands for itself
    plan = resize_plan_of(net, wide, x)
    for name, stands in plan.stands.items():
        assert stands.tolist() == list(range(len(stands))), name
        assert all((counts == 1).all() for counts in copies(plan, name))


def test_copies_are_counted_per_block():
    from tests.support.nets import Tokens

    x = torch.randn(2, 3, 8, 8)
    plan = resize_plan_of(randomise(Tokens(8, 2, 12)), randomise(Tokens(16, 2, 12)), x)
    queries = next(n for n, (own, _) in plan.mixer.match.spaces.items() if own.blocks is not None)
    assert [c.tolist() for c in copies(plan, queries)] == [[2, 2, 2, 2]] * 2
    plan = resize_plan_of(randomise(Tokens(8, 2, 12)), randomise(Tokens(16, 4, 12)), x)
    assert [c.tolist() for c in copies(plan, queries)] == [[1, 1, 1, 1]] * 4
    assert plan.stands[queries].tolist() == [*range(8), *range(8)]


def test_networks_of_other_structure_are_refused():
    x = torch.randn(2, 3, 8, 8)
    a = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 3, 3))
    b = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 3, 3))
    with pytest.raises(PairingError):
        resize_plan_of(randomise(a), randomise(b), x)


def test_sizes_are_told_here_and_there():
    plan = resize_plan_of(randomise(mlp(6, 5, 4, 3)), randomise(mlp(6, 7, 8, 3)), torch.randn(2, 6))
    assert plan.sizes() == {"0": (5, 7), "2": (4, 8)}


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


OTHER = torch.randn(3, 3, 8, 8)


# --- deeper -----------------------------------------------------------------------------------


def test_a_deeper_copy_keeps_the_function_and_loads_into_the_deeper_class():
    shallow, deep = randomise(residual((6, 1), (8, 1))), randomise(residual((6, 3), (8, 2)), 1)
    deeper = fxfuse.net2deeper(shallow, deep, IMAGES.repeat(4, 1, 1, 1))
    assert gap(shallow, deeper, OTHER) <= 1e-4
    deep.load_state_dict(deeper.state_dict())
    assert gap(shallow, deep, OTHER) <= 1e-4


def test_a_deeper_copy_keeps_its_own_widths():
    shallow, deep = randomise(mlp(6, 5, 5, 3)), randomise(mlp(6, 9, 9, 9, 3), 1)
    deeper = fxfuse.net2deeper(shallow, deep, torch.randn(20, 6))
    assert [p.shape[0] for p in deeper.parameters() if p.dim() == 2] == [5, 5, 5, 3]


def test_an_alignment_says_where_the_new_layers_go():
    shallow, deep, x = (
        randomise(mlp(6, 5, 5, 3)),
        randomise(mlp(6, 5, 5, 5, 3), 1),
        torch.randn(9, 6),
    )
    alignment = fxfuse.align([shallow, deep], x)
    deeper = fxfuse.net2deeper(shallow, deep, x, alignment)
    assert gap(shallow, deeper, x) <= 1e-4
    slots = [s.slots for s in alignment.segments]
    pairs = [p for rows in slots for p in zip(*rows) if None not in p]
    assert len(pairs) == 3
    for own, there in pairs:
        a, b = shallow.get_submodule(own), deeper.get_submodule(there)
        assert torch.equal(a.weight, b.weight)


# --- wider ------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", sorted(NETS))
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


def test_part_of_a_network_that_knows_its_width_stays():
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
        (lambda: mlp(6, 8, 5, 3), PairingError, "too few"),
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


def test_copies_stay_alike_in_training_unless_noise_tells_them_apart():
    net, x = build("plain")
    for noise, alike in ((0.0, True), (0.05, False)):
        wide = fxfuse.net2wider(net, x, noise=noise).train()
        assert (gap(net, wide, x) < 1e-5) == alike
        step = torch.optim.Adam(wide.parameters(), 0.01)
        wide(torch.randn(20, 6)).square().sum().backward()
        step.step()
        weight = wide.get_submodule("0").weight
        assert torch.allclose(weight[:8], weight[8:], atol=1e-6) == alike


def test_modes_are_the_models():
    net, x = build("residual")
    assert fxfuse.net2wider(net.train(), x).training
    assert not fxfuse.net2wider(net.eval(), x).training


def test_a_wider_copy_fuses_with_what_it_was_made_of():
    net, x = build("batch norm")
    wide, data = fxfuse.net2wider(net, x, seed=0), torch.randn(40, 3, 8, 8)
    assert gap(net, fxfuse.fuse([net, wide], data, anchor=1), data) <= 1e-3


# --- narrower ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "depthwise", "tokens", "concat"])
def test_a_network_is_fused_into_its_narrower_self(name):
    net, x = build(name)
    data = torch.randn(40, *data_shape(name))
    small = fxfuse.narrow(net, x)
    report = small.meta["fxfuse"]
    assert all(new <= old for old, new in report.sizes.values())
    assert any(new < old for old, new in report.sizes.values())
    fused = fxfuse.fuse([net, small], data, weights=[1, 0], anchor=1)
    state = fused.state_dict()
    assert {n: t.shape for n, t in small.state_dict().items()} == {n: state[n].shape for n in state}
    assert outputs(fused, data).isfinite().all()


def test_the_strongest_units_are_kept_with_what_they_read():
    net = randomise(mlp(6, 5, 3))
    with torch.no_grad():
        net[0].weight[1] *= 5
        net[0].weight[3] *= 5
    small = fxfuse.narrow(net, torch.randn(2, 6), share=0.4)
    assert torch.equal(small.get_submodule("0").weight, net[0].weight[[1, 3]])
    assert torch.equal(small.get_submodule("2").weight, net[2].weight[:, [1, 3]])


@settings(max_examples=8)
@given(random_nets(), st.sampled_from([0.4, 0.5]))
def test_random_networks_get_narrower(net, share):
    small = fxfuse.narrow(net, IMAGES, share=share)
    assert outputs(small, OTHER).shape == (3, 3)
    lint(small)


def test_dead_units_are_the_first_to_go_and_nothing_is_lost():
    net = randomise(mlp(6, 8, 3))
    with torch.no_grad():
        net[0].weight[::2], net[0].bias[::2] = 0.0, 0.0
    x = torch.randn(4, 6)
    assert gap(net, fxfuse.narrow(net, x), x) <= 1e-6
    assert fxfuse.narrow(net, x).meta["fxfuse"].error <= 1e-6


def test_a_copy_like_a_narrower_network_loads_into_its_class():
    net, small = randomise(Tokens(16, 4, 12)), randomise(Tokens(8, 2, 7), 1)
    result = fxfuse.narrow(net, IMAGES, like=small)
    small.load_state_dict(result.state_dict())
    assert outputs(small, IMAGES).shape == (2, 3)


def test_shares_out_of_range_and_nothing_to_narrow_are_refused():
    for share in (0, 1.2):
        with pytest.raises(ArgumentError, match="out of range"):
            fxfuse.narrow(*build("plain"), share=share)
    with pytest.raises(ArgumentError, match="no space"):
        fxfuse.narrow(*build("plain"), share=1.0)


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


@pytest.mark.parametrize("name", PAIRS)
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
