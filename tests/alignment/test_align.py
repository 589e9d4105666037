"""Alignment of networks: segments that pair, maps that are planted, pairs by hand."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.alignment import align as align_module
from fxfuse.alignment.align import align_networks
from fxfuse.alignment.aligners import (
    Aligner,
    Random,
    head_tail,
    layer_wise,
    monotone,
    same_index,
    segment_wise,
    uniform,
)
from fxfuse.alignment.layer_costs import Wasserstein, linear_cka, neuron_counts
from fxfuse.alignment.layers import partition
from fxfuse.alignment.pairing import pair_segments
from fxfuse.calibration.data import Calibration
from fxfuse.errors import ArgumentError, DataError, PairingError
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.nets import (
    Pooled,
    Residual,
    Tokens,
    conv,
    mlp,
    randomise,
    residual,
    stages,
    values,
)
from tests.support.references import direct_cka
from tests.support.tolerances import STATISTIC

FEW_IMAGES = torch.randn(2, 3, 8, 8)
VECTORS, IMAGES_OF_EIGHT = torch.randn(40, 6), torch.randn(24, 3, 8, 8)


def networks(*nets, data=VECTORS):
    models = [randomise(net, seed) for seed, net in enumerate(nets)]
    return [Network.of(f"net {i}", trace(m), (data[:2],)) for i, m in enumerate(models)]


def aligned(*nets, data=VECTORS, **options):
    return align_networks(networks(*nets, data=data), Calibration(data), **options)


class Rows(Aligner):
    """Chooses rows whatever the costs are."""

    def __init__(self, *rows):
        self.rows = list(rows)

    def __call__(self, costs):
        return self.rows


def mixed(act):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), act(), Pooled(4, 3))


def paired(*nets):
    traced = networks(*nets, data=FEW_IMAGES)
    return [group.segments for group in pair_segments(traced, [partition(n) for n in traced])]


def test_a_stem_and_a_stage_pair_as_segments_of_their_own():
    names = [
        [[x.name for x in s.layers] for s in segments]
        for segments in paired(residual((6, 3)), residual((6, 1)))
    ]
    assert names == [
        [["0.0"], ["0.0"]],
        [["1.0", "1.1", "1.2"], ["1.0"]],
        [["2.fc"], ["2.fc"]],
    ]


def test_segments_that_alternate_differently_are_not_split():
    a = nn.Sequential(conv(3, 6), Residual(6, 6), conv(6, 6), Pooled(6, 3))
    b = nn.Sequential(conv(3, 6), Residual(6, 6), Pooled(6, 3))
    assert [len(first.layers) for first, _ in paired(a, b)] == [3, 1]


@pytest.mark.parametrize(
    ("a", "b", "segment"),
    [
        (lambda: stages([4], [4]), lambda: stages([4], [4], [4]), 3),
        (lambda: residual((4, 2)), lambda: stages([4, 4], [4]), 2),
        (lambda: residual((4, 1), (4, 1)), lambda: residual((4, 1)), 2),
        (lambda: stages([4], hidden=(7,)), lambda: stages([4]), 2),
        (lambda: mixed(nn.ReLU), lambda: mixed(nn.GELU), 1),
    ],
)
def test_networks_that_do_not_pair_are_listed_side_by_side_with_the_first_difference(a, b, segment):
    with pytest.raises(PairingError) as caught:
        paired(a(), b())
    error = caught.value
    assert error.where == f"segment {segment}, the first that differs"
    lines = error.met.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("  segments of net")]
    assert len(heads) == 2
    first = [line for line in lines[heads[0] + 1 : heads[1]] if "made of" not in line]
    assert first[0].lstrip("> ").startswith("8x8 positions: ")
    assert [i + 1 for i, line in enumerate(first) if ">>" in line] == [segment] * (
        len(first) >= segment
    )


def test_a_perceptron_does_not_pair_with_a_convolutional_network():
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(192, 8, 3)

        def forward(self, x):
            return self.net(x.flatten(1))

    with pytest.raises(PairingError, match="made of linear, relu"):
        paired(Reshaped(), stages([4]))


def test_layers_that_can_only_pair_out_of_order_are_refused():
    a = nn.Sequential(conv(3, 4), conv(4, 4, 5), conv(4, 4), Pooled(4, 3))
    b = nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 4, 5), Pooled(4, 3))
    with pytest.raises(PairingError, match="segments do not pair") as caught:
        paired(a, b)
    assert caught.value.met.count(">>") == 2, "both lists, each with the segment that differs"


def test_plain_layers_do_not_pair_with_blocks():
    with pytest.raises(PairingError):
        paired(residual((4, 2), stem=4), stages([4, 4, 4]))


def with_identities(shallow, behind):
    """Put identity layers behind some hidden layers; return also where the others are now."""
    parts, planted, layers = [], [], 0
    for i, layer in enumerate(shallow):
        parts.append(layer)
        if isinstance(layer, nn.Linear):
            planted.append(layers)
            layers += 1
        elif i // 2 in behind:
            identity = nn.Linear(8, 8)
            nn.init.eye_(identity.weight)
            nn.init.zeros_(identity.bias)
            parts += [identity, nn.ReLU()]
            layers += 1
    return nn.Sequential(*parts), planted[:-1]


@given(st.sets(st.integers(0, 3), max_size=4), st.integers(0, 50))
def test_a_planted_alignment_is_found(behind, seed):
    shallow = randomise(mlp(6, *[8] * 5, 3), seed)
    deep, planted = with_identities(shallow, behind)
    nets = [Network.of(n, trace(m), (VECTORS[:2],)) for n, m in (("a", deep), ("b", shallow))]
    alignment = align_networks(nets, Calibration(VECTORS))
    hidden = alignment.segments[0]
    assert [hidden.slots[0].index(a) for a, _ in alignment.pairs[0]] == planted
    costs = [hidden.cost_of(1, row) for row in planted]
    assert costs == pytest.approx([0.0] * len(costs), abs=1e-5)


def test_costs_are_one_minus_cka_of_pre_activations():
    a, b = networks(mlp(6, 8, 8, 7, 3), mlp(6, 5, 9, 3))
    alignment = align_networks([a, b], Calibration(VECTORS))
    z = [
        [values(n.module, VECTORS)[f"_{p}"] for p in points]
        for n, points in ((a, "024"), (b, "02"))
    ]
    expected = [[direct_cka(x, y) for y in z[1]] for x in z[0]]
    assert np.allclose(alignment.segments[0].costs[1], expected, rtol=STATISTIC)
    assert alignment.segments[0].costs[0] is None, "the reference is not measured against itself"


def test_slots_hold_every_layer_once_and_none_elsewhere():
    alignment = aligned(mlp(6, 8, 8, 8, 8, 3), mlp(6, 5, 5, 3))
    hidden, last = alignment.segments
    assert hidden.reference == 0 and hidden.slots[0] == ("0", "2", "4", "6")
    assert hidden.slots[1][0] == "0" and hidden.slots[1][3] == "2"
    assert hidden.slots[1][1:3] == (None, None)
    assert last.slots == (("8",), ("4",))
    assert alignment.names == ("net 0", "net 1")


def test_the_reference_of_a_segment_is_the_network_that_is_deeper_there():
    alignment = aligned(stages([4, 4, 4], [5]), stages([4], [5, 5]), data=IMAGES_OF_EIGHT)
    assert [s.reference for s in alignment.segments] == [0, 1, 0]
    assert alignment.pairs == [
        [("0.0.0", "0.0.0")],
        [("0.2.0", "0.4.0")],
        [("2.0", "2.0")],
    ]


def test_a_segment_of_one_layer_pairs_it_with_the_first():
    alignment = aligned(mlp(6, 8, 8, 8, 3), mlp(6, 5, 3))
    assert alignment.pairs[0] == [("0", "0")]


def test_three_networks_share_the_slots_of_the_deepest():
    alignment = aligned(mlp(6, 5, 5, 3), mlp(6, 8, 8, 8, 8, 3), mlp(6, 7, 3))
    hidden = alignment.segments[0]
    assert hidden.reference == 1
    assert [sum(s is not None for s in row) for row in hidden.slots] == [2, 4, 1]
    assert [row[0] for row in hidden.slots] == ["0", "0", "0"]


def test_one_network_is_aligned_with_itself():
    (net,) = networks(mlp(6, 5, 5, 3))
    assert align_networks([net], Calibration(VECTORS)).segments[0].slots == (("0", "2"),)


def test_equal_depths_pair_layer_by_layer():
    alignment = aligned(mlp(6, 8, 8, 8, 3), mlp(6, 5, 7, 9, 3))
    assert alignment.pairs == [[("0", "0"), ("2", "2"), ("4", "4")], [("6", "6")]]


def test_blocks_of_different_kinds_never_pair():
    alignment = aligned(Tokens(depth=3), Tokens(depth=2), data=IMAGES_OF_EIGHT)
    blocks = alignment.segments[1]
    for a, b in zip(*blocks.slots):
        assert b is None or a.rpartition(".")[2] == b.rpartition(".")[2]
    costs = np.array(blocks.costs[1])
    assert np.isinf(costs[0, 1]) and np.isfinite(costs[0, 0])


def test_where_the_constraints_decide_slow_costs_are_measured_only_on_demand():
    nets = networks(mlp(6, 8, 8, 8, 3), mlp(6, 5, 5, 3))
    for cost, is_quick in [(linear_cka, True), (Wasserstein(), False)]:
        quick = align_networks(nets, Calibration(VECTORS), layer_cost=cost, measure_all=False)
        full = align_networks(nets, Calibration(VECTORS), layer_cost=cost)
        assert quick.pairs == full.pairs
        assert full.segments[0].costs[1] is not None
        assert (quick == full) is is_quick and (quick.segments[0].costs[1] is None) is not is_quick


def test_costs_that_decide_nothing_are_measured_on_few_samples(monkeypatch):
    seen, real = [], align_module.record
    monkeypatch.setattr(align_module, "record", lambda *a: seen.append(len(a[1][0])) or real(*a))
    data = Calibration(torch.randn(300, 6, generator=torch.Generator().manual_seed(0)))
    nets = networks(mlp(6, 8, 8, 8, 3), mlp(6, 5, 5, 3))  # bound at both ends
    align_networks(nets, data, measure_all=False)
    assert seen == [64, 64]
    nets = networks(mlp(6, 8, 8, 8, 8, 3), mlp(6, 5, 5, 5, 3))
    both = align_networks(nets, data, measure_all=False)
    assert seen[2:] == [256, 256, 64, 64]
    assert both.segments[0] == align_networks(nets, data).segments[0]


def test_the_aligner_decides():
    nets = networks(mlp(6, 8, 8, 8, 8, 3), mlp(6, 5, 5, 3))
    chain = align_networks(nets, Calibration(VECTORS), same_index)
    assert chain.pairs[0] == [("0", "0"), ("2", "2")]
    assert align_networks(nets, Calibration(VECTORS)).pairs[0] == [("0", "0"), ("6", "2")]


@pytest.mark.parametrize("rows", [[0], [0, 4], [2, 1], [1, 1], [-1, 2], [0, 1, 2]])
def test_an_aligner_that_gives_no_map_is_refused(rows):
    with pytest.raises(ArgumentError, match="for 4 and 2 layers") as caught:
        aligned(mlp(6, 8, 8, 8, 8, 3), mlp(6, 5, 5, 3), aligner=Rows(*rows))
    assert caught.value.where.startswith("the aligner")


def test_an_aligner_that_pairs_different_kinds_is_refused():
    with pytest.raises(ArgumentError, match="layers"):
        aligned(Tokens(depth=3), Tokens(depth=2), data=IMAGES_OF_EIGHT, aligner=Rows(0, 1, 2, 4))


def test_a_function_is_no_aligner_and_the_error_says_what_is():
    with pytest.raises(ArgumentError, match="an aligner of type function") as caught:
        aligned(mlp(6, 8, 8, 3), mlp(6, 5, 3), aligner=lambda costs: [0])
    assert "fxfuse.alignment.Aligner" in caught.value.do


EVERY = [monotone, segment_wise, layer_wise, same_index, uniform, head_tail, Random(1)]


@pytest.mark.parametrize("aligner", EVERY)
def test_every_aligner_pairs_attention_with_attention(aligner):
    alignment = aligned(Tokens(depth=4), Tokens(depth=2), data=IMAGES_OF_EIGHT, aligner=aligner)
    for a, b in alignment.pairs[1]:
        assert a.rpartition(".")[2] == b.rpartition(".")[2]


def test_costs_are_measured_for_every_aligner_that_needs_them():
    """Two of three layers: bound at both ends there is no choice, bound at the first there is."""
    nets = networks(mlp(6, 8, 8, 8, 3), mlp(6, 5, 5, 3))
    slow = Wasserstein()
    for aligner, measured in [(monotone, False), (segment_wise, True), (layer_wise, True)]:
        quick = align_networks(nets, Calibration(VECTORS), aligner, slow, measure_all=False)
        full = align_networks(nets, Calibration(VECTORS), aligner, slow)
        assert quick.pairs == full.pairs
        assert (quick.segments[0].costs[1] is not None) == measured
    for baseline in (same_index, Random()):
        quick = align_networks(nets, Calibration(VECTORS), baseline, slow, measure_all=False)
        assert quick.segments[0].costs == (None, None)


def test_the_layer_cost_decides():
    nets = networks(mlp(6, 9, 4, 5, 9, 3), mlp(6, 9, 5, 9, 3))
    nearest = align_networks(nets, Calibration(VECTORS), layer_cost=neuron_counts)
    assert nearest.pairs[0] == [("0", "0"), ("4", "2"), ("6", "4")]
    assert nearest.segments[0].costs[1][1] == (25.0, 1.0, 25.0)
    farthest = align_networks(
        nets, Calibration(VECTORS), layer_cost=lambda *sides: -neuron_counts(*sides)
    )
    assert farthest.pairs[0] == [("0", "0"), ("2", "2"), ("6", "4")]


def test_the_data_decide():
    nets = networks(mlp(6, *[8] * 8, 3), mlp(6, *[5] * 4, 3))
    parts = [Calibration(part) for part in VECTORS.split(10)]
    assert len({str(align_networks(nets, part)) for part in parts}) == 4


def test_activations_that_are_not_finite_name_layer_and_network():
    a, b = networks(mlp(6, 8, 8, 8, 3), mlp(6, 5, 5, 3))
    with torch.no_grad():
        b.module.get_submodule("2").weight.mul_(1e38)
    with pytest.raises(DataError, match="NaN or infinite") as caught:
        align_networks([a, b], Calibration(VECTORS))
    assert caught.value.where == "layer '2' of net 1"


class OneNumber(nn.Sequential):
    def forward(self, x):
        return super().forward(x).squeeze(-1)


def test_outputs_of_one_number_without_an_axis_are_compared():
    nets = [randomise(OneNumber(*mlp(6, *[8] * n, 1)), n) for n in (3, 2)]
    assert 0 <= fxfuse.align(nets, VECTORS).segments[-1].costs[1][0][0] <= 1
    assert fxfuse.fuse(nets, VECTORS)(VECTORS).shape == (len(VECTORS),)


# --- pairs by hand --------------------------------------------------------------------------------


def by_hand(*pairs, deep=(8, 8, 8, 8), shallow=(5, 5)):
    return aligned(mlp(6, *deep, 3), mlp(6, *shallow, 3), pairs=pairs)


def test_pairs_by_hand_are_kept_and_the_other_segments_aligned():
    given = [("2", "0"), ("4", "2")]
    alignment = by_hand(given)
    assert alignment.pairs == [given, [("8", "4")]]
    assert alignment.segments[0].slots[1] == (None, "0", "2", None)
    assert alignment.segments[0].cost_of(1, 1) > 0, "costs are measured all the same"
    assert by_hand(None, [("8", "4")]).pairs == by_hand().pairs != alignment.pairs


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_pairs_of_an_alignment_give_the_same_alignment(seed):
    nets = networks(stages([4] * 3, [5]), stages([3], [4] * 3), data=IMAGES_OF_EIGHT)
    data = Calibration(IMAGES_OF_EIGHT)
    alignment = align_networks(nets, data, Random(seed, first=False))
    assert align_networks(nets, data, pairs=alignment.pairs) == alignment


def test_networks_align_and_fuse_as_they_are_paired_by_hand():
    nets = [mlp(6, 8, 7, 6, 5, 3), mlp(6, 5, 4, 3)]
    pairs = [[("0", "0"), ("4", "2")], [("8", "4")]]
    alignment = fxfuse.align(nets, VECTORS, pairs=pairs)
    assert alignment.pairs == pairs
    fused = fxfuse.fuse(nets, VECTORS, alignment=alignment)
    assert fused.meta["fxfuse"].alignment == alignment


@pytest.mark.parametrize(
    ("pairs", "fault"),
    [
        ([("0", "0")], "each layer of the shallower network once"),
        ([("0", "0"), ("2", "2"), ("4", "2")], "each layer of the shallower network once"),
        ([("0", "2"), ("2", "0")], "each layer of the shallower network once, in order"),
        ([("0", "0"), ("1", "2")], "'1' is no layer of the deeper"),
        ([("0", "0"), ("8", "2")], "'8' is no layer of the deeper network here"),
        ([("4", "0"), ("2", "2")], "out of order"),
        ([("4", "0"), ("4", "2")], "out of order"),
    ],
)
def test_pairs_by_hand_that_are_no_increasing_map_are_refused(pairs, fault):
    with pytest.raises(ArgumentError, match=fault) as caught:
        by_hand(pairs)
    assert caught.value.where == "the argument `pairs`, segment 1 (features)"
    assert "deeper: 0, 2, 4, 6; shallower: 0, 2" in caught.value.expected


def test_pairs_by_hand_of_different_kinds_are_refused():
    nets = networks(Tokens(depth=3), Tokens(depth=2), data=IMAGES_OF_EIGHT)
    alignment = align_networks(nets, Calibration(IMAGES_OF_EIGHT))
    deep, pairs = alignment.segments[1].slots[0], alignment.pairs
    pairs[1] = list(zip(deep[1:], (b for _, b in pairs[1])))  # attention with MLPs
    with pytest.raises(ArgumentError, match="layers of different kinds") as caught:
        align_networks(nets, Calibration(IMAGES_OF_EIGHT), pairs=pairs)
    assert "'{}' and '{}'".format(*pairs[1][0]) in caught.value.met


def test_layers_of_equal_depth_can_be_paired_in_one_way_only():
    same = [("0", "0"), ("2", "2")]
    assert by_hand(same, deep=(8, 8)).pairs[0] == same
    with pytest.raises(ArgumentError, match="out of order"):
        by_hand([("2", "0"), ("0", "2")], deep=(8, 8))


def test_pairs_by_hand_are_lists_per_segment_of_two_models():
    with pytest.raises(ArgumentError, match="2 segments of 3 models"):
        aligned(*[mlp(6, 5, 3) for _ in range(3)], pairs=[[("0", "0")], None])
    with pytest.raises(ArgumentError, match="for 2 segments of 2 models"):
        by_hand(None, None, None)
    with pytest.raises(ArgumentError, match="expected: per segment of two models, a list"):
        by_hand(("0", "0"), ("2", "2"))


@dataclass
class _Found:
    scores: torch.Tensor
    boxes: torch.Tensor


class _TwoOutputs(nn.Module):
    """A trunk with two heads, returned in one of several forms."""

    def __init__(self, depth, width, returned):
        super().__init__()
        self.trunk = mlp(6, *[width] * depth, 5)
        self.scores, self.boxes, self.returned = nn.Linear(5, 3), nn.Linear(5, 4), returned

    def forward(self, x):
        x = self.trunk(x)
        return self.returned(self.scores(x), self.boxes(x))


@pytest.mark.parametrize(
    "returned",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, (b, a)],
        lambda a, b: {"scores": a, "boxes": b},
        _Found,
        lambda a, b: (a, None, b, 3),
        lambda a, b: (a,),
        lambda a, b: (a, b.argmax(1)),
        lambda a, b: (a[:, None].expand(-1, 2, -1), b.mean()),
        lambda a, b: a.mean() + b.mean(),
    ],
)
def test_networks_may_return_tensors_in_any_form(returned):
    torch.manual_seed(0)
    nets, x = [_TwoOutputs(d, w, returned).eval() for d, w in ((3, 8), (2, 6))], torch.randn(50, 6)
    plain = [copy.deepcopy(net) for net in nets]
    for net in plain:
        net.returned = lambda a, b: torch.cat([a, b], 1)
    alignment = fxfuse.align(nets, x)
    assert alignment.pairs[:-1] == fxfuse.align(plain, x).pairs[:-1]
    assert "trunk.0" in str(alignment)
    fused = fxfuse.fuse(nets, x, alignment=alignment)
    assert type(fused(x)) is type(nets[0](x))


class LastState(nn.Module):
    """Reads the last state of a recurrent layer, whose samples are its second axis."""

    def __init__(self, width):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, width, 2, batch_first=True), nn.Linear(width, 3)

    def forward(self, x):
        _, (h, _) = self.rnn(x)
        return self.head(h[-1])


def test_the_last_state_of_a_recurrent_layer_is_compared_sample_by_sample():
    nets, x = [randomise(LastState(width), seed=width) for width in (8, 6)], torch.randn(40, 5, 4)
    cost = fxfuse.align(nets, x).segments[0].cost_of(1, 0)
    with torch.no_grad():
        states = [net.rnn(x)[1][0].transpose(0, 1).flatten(1).double() for net in nets]
    grams = [(s - s.mean(0)) @ (s - s.mean(0)).T for s in states]
    products = [float((g * h).sum()) for g in grams for h in grams]
    expected = 1 - products[1] / (products[0] * products[3]) ** 0.5
    assert cost == pytest.approx(expected, abs=1e-5)
