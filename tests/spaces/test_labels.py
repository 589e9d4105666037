"""Labels of tensors, and the two rules by which they meet."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxfuse.spaces._labels import (
    FIXED,
    NOTHING,
    LabelRun,
    Labels,
    Ledger,
    collapse,
    merge,
    rows_over,
    varying,
)
from fxfuse.spaces._products import contract

small = st.lists(st.integers(0, 5), min_size=6, max_size=6)


def run_of(*modules):
    return LabelRun(nn.ModuleList(modules).state_dict(keep_vars=True).items())


def test_new_labels_differ_from_all_others():
    ledger = Ledger()
    labels = torch.cat([ledger.new(3), ledger.new(0), ledger.new(4)])
    assert len(set(labels.tolist())) == 7
    assert not {NOTHING, FIXED} & set(labels.tolist())


@given(small, small)
def test_a_tie_pairs_labels_place_by_place_but_not_with_nothing(a, b):
    ledger = Ledger()
    result = ledger.tie(torch.tensor(a), torch.tensor(b))
    expected = {(x, y) for x, y in zip(a, b) if x != y and NOTHING not in (x, y)}
    assert {p for ties in ledger.ties for p in zip(*(t.tolist() for t in ties))} == expected
    assert result.tolist() == [y if x == NOTHING else x for x, y in zip(a, b)]


def test_a_tie_broadcasts():
    ledger = Ledger()
    ledger.tie(torch.tensor([[2], [3]]), torch.tensor([[4, 5]]))
    assert set(zip(*(t.tolist() for t in ledger.ties[0]))) == {(2, 4), (2, 5), (3, 4), (3, 5)}


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 3), st.booleans())
def test_collapse_keeps_the_values_and_only_the_axes_that_vary(shape, axis, strided):
    axis %= len(shape)
    line = torch.arange(2, 2 + shape[axis]).view(
        [-1 if d == axis else 1 for d in range(len(shape))]
    )
    full = line.expand(shape) if strided else line.expand(shape).contiguous()
    small = collapse(full)
    assert torch.equal(small.expand(shape), full)
    assert varying(small) == ((axis,) if shape[axis] > 1 else ())


def test_collapse_keeps_an_axis_that_varies_in_one_place_only():
    layer = torch.full((3, 4), 7)
    layer[2, 3] = 8
    assert varying(collapse(layer)) == (0, 1)


def test_every_axis_of_every_floating_tensor_starts_with_labels_of_its_own():
    run = run_of(nn.Linear(4, 3), nn.BatchNorm1d(3))
    axes = run.ledger.axes
    assert set(axes) == {
        ("0.weight", 0),
        ("0.weight", 1),
        ("0.bias", 0),
        ("1.weight", 0),
        ("1.bias", 0),
        ("1.running_mean", 0),
        ("1.running_var", 0),
    }
    labels = np.concatenate(list(axes.values()))
    assert len(np.unique(labels)) == len(labels) and labels.min() > FIXED


def test_a_tensor_with_two_names_gets_labels_once():
    tied = nn.Linear(4, 3)
    run = run_of(tied, tied)
    assert {tensor for tensor, _ in run.ledger.axes} == {"0.weight", "0.bias"}


def test_a_tensor_without_labels_stays_as_it_is():
    assert run_of().of(torch.zeros(3)) == Labels(fill=FIXED)


def test_an_axis_of_one_position_has_no_layer():
    weight = nn.Linear(1, 3, bias=False).weight
    run = LabelRun([("w", weight)])
    assert [varying(layer) for layer in run.of(weight).layers] == [(0,)]


def test_parameters_keep_their_own_labels():
    weight = nn.Parameter(torch.zeros(3))
    run = LabelRun([("w", weight)])
    run.put(weight, Labels())
    assert run.of(weight).sources == ("w",)


def test_labels_of_a_freed_tensor_are_forgotten():
    run = run_of()
    value = torch.zeros(3)
    run.put(value, Labels((run.ledger.new(3),)))
    assert len(run._labels) == 1
    del value
    gc.collect()
    assert len(run._labels) == 0


def test_freezing_names_the_running_node_and_the_reason():
    run = run_of()
    run.node = "here"
    run.freeze([torch.tensor([4, 2, 2])], "because")
    (labels, node, reason) = run.ledger.frozen[0]
    assert (labels.tolist(), node, reason) == ([2, 4], "here", "because")


def test_the_dense_axis_of_a_grouped_weight_replaces_the_stored_one():
    conv = nn.Conv2d(6, 6, 1, groups=3)
    run = LabelRun(conv.named_parameters(prefix="c"))
    units = run.ledger.new(6)
    run.dense_axis(conv.weight, 1, units, 3)
    assert run.ledger.axes["c.weight", 1].tolist() == units.tolist()
    assert run.ledger.grouped == {("c.weight", 1): 3}
    again = run.ledger.new(6)
    run.dense_axis(conv.weight, 1, again, 3)
    assert [t.tolist() for t in run.ledger.ties[-1]] == [units.tolist(), again.tolist()]


@pytest.mark.parametrize("contracted", [False, True])
def test_uses_are_noted_once_for_the_running_node(contracted):
    layer = nn.Linear(4, 3)
    run = run_of(layer)
    run.node = "fc"
    run.uses([layer.weight, layer.weight, torch.zeros(2)], contracted)
    ledger = run.ledger.weights if contracted else run.ledger.tensors
    assert ledger == {"fc": ["0.weight"]}


class Bench:
    """A run with a few parameters, and what it wrote down in plain sets."""

    def __init__(self, **shapes):
        self.tensors = {n: nn.Parameter(torch.zeros(s)) for n, s in shapes.items()}
        self.run = LabelRun(self.tensors.items())

    def axis(self, name, dim):
        return self.run.ledger.axes[name, dim].tolist()

    def operand(self, name):
        tensor = self.tensors[name]
        return self.run.of(tensor), tuple(tensor.shape)

    @property
    def ties(self):
        return {frozenset(p) for t in self.run.ledger.ties for p in zip(*(x.tolist() for x in t))}

    @property
    def frozen(self):
        return {int(u) for labels, _, _ in self.run.ledger.frozen for u in labels}

    @property
    def groups(self):
        return [rows for _, members in self.run.ledger.blocks for rows in members.tolist()]


def pairs(a, b):
    return {frozenset(p) for p in zip(a, b)}


def test_merging_ties_units_that_meet_and_hands_them_on_once():
    bench = Bench(a=(3, 4), b=(3, 4))
    out = merge(bench.run, [bench.operand("a"), bench.operand("b")], 2)
    expected = pairs(bench.axis("a", 0), bench.axis("b", 0))
    expected |= pairs(bench.axis("a", 1), bench.axis("b", 1))
    assert bench.ties == expected and not bench.frozen
    assert sorted(varying(x) for x in out.layers) == [(0,), (1,)]


def test_merging_aligns_ranks_from_the_right():
    bench = Bench(a=(3, 4), b=(4,))
    merge(bench.run, [bench.operand("a"), bench.operand("b")], 2)
    assert bench.ties == pairs(bench.axis("a", 1), bench.axis("b", 0))
    assert bench.frozen == set()


def test_broadcast_values_neither_tie_nor_freeze():
    bench = Bench(a=(3, 4), b=(3, 1))
    out = merge(bench.run, [bench.operand("a"), bench.operand("b")], 2)
    assert not bench.frozen
    assert {varying(x) for x in out.layers} == {(0,), (1,)}


def test_units_that_meet_unlabelled_values_are_frozen_and_not_handed_on():
    bench = Bench(a=(4,))
    out = merge(bench.run, [bench.operand("a"), (Labels(), (4,))], 1)
    assert bench.frozen == set(bench.axis("a", 0))
    assert out.layers == () and out.sources == ()


def test_units_that_meet_one_constant_stay_free():
    bench = Bench(a=(4,))
    out = merge(bench.run, [bench.operand("a"), (Labels(fill=NOTHING), (4,))], 1)
    assert not bench.frozen and len(out.layers) == 1
    assert out.fill == FIXED


def test_units_of_a_finer_layer_become_members_of_the_units_of_a_coarser_one():
    bench = Bench(blocks=(2, 1))
    units = bench.run.ledger.new(6).view(2, 3)
    merge(bench.run, [bench.operand("blocks"), (Labels((units,)), (2, 3))], 2)
    assert units.tolist() == bench.groups


def test_computed_parameters_remember_their_sources_and_activations_do_not():
    bench = Bench(a=(4,), b=(4,))
    both = merge(bench.run, [bench.operand("a"), bench.operand("b")], 1)
    assert set(both.sources) == {"a", "b"}
    mixed = merge(bench.run, [bench.operand("a"), (Labels((bench.run.ledger.new(4),)), (4,))], 1)
    assert mixed.sources == ()


def test_several_layers_along_one_axis_all_reach_the_result():
    """Two axes of a parameter, flattened into one, are two layers along this axis."""
    bench = Bench(a=(6,))
    outer = bench.run.ledger.new(2).repeat_interleave(3)
    inner = bench.run.ledger.new(3).repeat(2)
    flat = (Labels((outer, inner)), (6,))
    out = merge(bench.run, [flat, (Labels(fill=NOTHING), (6,))], 1)
    kept = {tuple(x.flatten().tolist()) for x in out.layers}
    lost = {tuple(outer.tolist()), tuple(inner.tolist())} - kept
    assert all(set(labels) <= bench.frozen for labels in lost)


def test_a_product_ties_units_that_are_summed_and_hands_on_the_others():
    bench = Bench(a=(3, 4), b=(4, 5))
    a, b = bench.tensors.values()
    out = contract(bench.run, a, "mk", b, "kn", "mn")
    assert bench.ties == pairs(bench.axis("a", 1), bench.axis("b", 0))
    assert not bench.frozen
    assert {varying(x): x.flatten().tolist() for x in out.layers} == {
        (0,): bench.axis("a", 0),
        (1,): bench.axis("b", 1),
    }


def test_a_product_with_unlabelled_values_freezes_only_units_that_it_sums():
    bench = Bench(a=(3, 4))
    contract(bench.run, bench.tensors["a"], "mk", torch.zeros(4, 5), "kn", "mn")
    assert bench.frozen == set(bench.axis("a", 1))


def test_a_product_notes_the_parameter_axes_that_it_reads():
    bench = Bench(w=(5, 4))
    units = torch.zeros(2, 4)
    bench.run.put(units, Labels((bench.run.ledger.new(4).view(1, 4),)))
    contract(bench.run, units, "mk", bench.tensors["w"], "nk", "mn")
    assert [r.tolist() for r in bench.run.ledger.reads] == [bench.axis("w", 1)]


def test_each_place_of_a_batched_product_is_a_block_of_the_units_summed_there():
    bench = Bench(a=(1,))
    a, b = torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)
    x, y = bench.run.ledger.new(8).view(2, 1, 4), bench.run.ledger.new(8).view(2, 4, 1)
    bench.run.put(a, Labels((x,)))
    bench.run.put(b, Labels((y,)))
    out = contract(bench.run, a, "bmk", b, "bkn", "bmn")
    assert bench.ties == pairs(x.flatten().tolist(), y.flatten().tolist())
    assert bench.groups == x[:, 0].tolist()
    assert [varying(layer) for layer in out.layers] == [(0,)]


def test_rows_with_the_same_units_are_one_block():
    bench = Bench(a=(1,))
    layer = torch.tensor([[7, 8], [5, 6], [7, 8]])
    blocks = rows_over(bench.run, layer, (0,))
    assert blocks.shape == (3, 1)
    assert blocks[0] == blocks[2] != blocks[1]
    assert sorted(bench.groups) == [[5, 6], [7, 8]]
