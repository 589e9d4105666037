import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxfuse.labels import FIXED, NOTHING, LabelRun, Labels, Ledger, collapse, varying

small = st.lists(st.integers(0, 5), min_size=6, max_size=6)


def run_of(*modules):
    return LabelRun(nn.ModuleList(modules).state_dict(keep_vars=True).items())


def test_new_labels_are_never_given_twice_nor_special():
    book = Ledger()
    labels = torch.cat([book.new(3), book.new(0), book.new(4)])
    assert len(set(labels.tolist())) == 7
    assert not {NOTHING, FIXED} & set(labels.tolist())


@given(small, small)
def test_a_tie_pairs_labels_place_by_place_and_lets_nothing_pass(a, b):
    book = Ledger()
    result = book.tie(torch.tensor(a), torch.tensor(b))
    expected = {(x, y) for x, y in zip(a, b) if x != y and NOTHING not in (x, y)}
    assert {p for ties in book.ties for p in zip(*(t.tolist() for t in ties))} == expected
    assert result.tolist() == [y if x == NOTHING else x for x, y in zip(a, b)]


def test_a_tie_broadcasts():
    book = Ledger()
    book.tie(torch.tensor([[2], [3]]), torch.tensor([[4, 5]]))
    assert set(zip(*(t.tolist() for t in book.ties[0]))) == {(2, 4), (2, 5), (3, 4), (3, 5)}


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
    axes = {(a.tensor, a.dim): a.labels for a in run.book.axes}
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


def test_a_tensor_of_two_names_gets_labels_once():
    tied = nn.Linear(4, 3)
    run = run_of(tied, tied)
    assert {a.tensor for a in run.book.axes} == {"0.weight", "0.bias"}


def test_what_is_not_known_stays_as_it_is():
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


def test_labels_of_a_dead_tensor_are_forgotten():
    run = run_of()
    value = torch.zeros(3)
    run.put(value, Labels((run.book.new(3),)))
    assert len(run._labels) == 1
    del value
    gc.collect()
    assert len(run._labels) == 0


def test_freezing_names_the_running_node_and_the_reason():
    run = run_of()
    run.node = "here"
    run.freeze([torch.tensor([4, 2, 2])], "because")
    (labels, node, reason) = run.book.frozen[0]
    assert (labels.tolist(), node, reason) == ([2, 4], "here", "because")


def test_the_dense_axis_of_a_grouped_weight_replaces_the_stored_one():
    conv = nn.Conv2d(6, 6, 1, groups=3)
    run = LabelRun(conv.named_parameters(prefix="c"))
    units = run.book.new(6)
    run.dense_axis(conv.weight, 1, units, 3)
    (axis,) = [a for a in run.book.axes if (a.tensor, a.dim) == ("c.weight", 1)]
    assert axis.groups == 3 and axis.labels.tolist() == units.tolist()
    again = run.book.new(6)
    run.dense_axis(conv.weight, 1, again, 3)
    assert [t.tolist() for t in run.book.ties[-1]] == [units.tolist(), again.tolist()]


def test_a_grouped_weight_that_is_computed_freezes_what_it_reads():
    run = run_of()
    units = run.book.new(4)
    run.dense_axis(torch.zeros(4, 2, 1, 1), 1, units, 2)
    assert run.book.frozen[0][0].tolist() == units.tolist()


@pytest.mark.parametrize("contracted", [False, True])
def test_uses_are_noted_once_under_the_running_node(contracted):
    layer = nn.Linear(4, 3)
    run = run_of(layer)
    run.node = "fc"
    run.uses([layer.weight, layer.weight, torch.zeros(2)], contracted)
    book = run.book.weights if contracted else run.book.tensors
    assert book == {"fc": ["0.weight"]}
