import torch
from torch import nn

from fxfuse.contraction import contract, merge, rows_over
from fxfuse.labels import FIXED, NOTHING, LabelRun, Labels, varying


class Bench:
    """A run with a few parameters, and what it wrote down in plain sets."""

    def __init__(self, **shapes):
        self.tensors = {n: nn.Parameter(torch.zeros(s)) for n, s in shapes.items()}
        self.run = LabelRun(self.tensors.items())

    def axis(self, name, dim):
        found = [a.labels for a in self.run.book.axes if (a.tensor, a.dim) == (name, dim)]
        return found[0].tolist()

    def operand(self, name):
        tensor = self.tensors[name]
        return self.run.of(tensor), tuple(tensor.shape)

    @property
    def ties(self):
        return {frozenset(p) for t in self.run.book.ties for p in zip(*(x.tolist() for x in t))}

    @property
    def frozen(self):
        return {int(u) for labels, _, _ in self.run.book.frozen for u in labels}

    @property
    def groups(self):
        return [rows for _, members in self.run.book.groups for rows in members.tolist()]


def pairs(a, b):
    return {frozenset(p) for p in zip(a, b)}


def test_merging_ties_what_meets_and_hands_it_on_once():
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


def test_units_that_meet_unknown_values_are_frozen_and_not_handed_on():
    bench = Bench(a=(4,))
    out = merge(bench.run, [bench.operand("a"), (Labels(), (4,))], 1)
    assert bench.frozen == set(bench.axis("a", 0))
    assert out.layers == () and out.sources == ()


def test_units_that_meet_one_constant_stay_free():
    bench = Bench(a=(4,))
    out = merge(bench.run, [bench.operand("a"), (Labels(fill=NOTHING), (4,))], 1)
    assert not bench.frozen and len(out.layers) == 1
    assert out.fill == FIXED


def test_a_finer_layer_makes_its_units_members_of_the_coarser_ones_blocks():
    bench = Bench(blocks=(2, 1))
    units = bench.run.book.new(6).view(2, 3)
    merge(bench.run, [bench.operand("blocks"), (Labels((units,)), (2, 3))], 2)
    assert units.tolist() == bench.groups


def test_computed_parameters_remember_their_sources_and_activations_do_not():
    bench = Bench(a=(4,), b=(4,))
    both = merge(bench.run, [bench.operand("a"), bench.operand("b")], 1)
    assert set(both.sources) == {"a", "b"}
    mixed = merge(bench.run, [bench.operand("a"), (Labels((bench.run.book.new(4),)), (4,))], 1)
    assert mixed.sources == ()


def test_several_layers_along_one_axis_all_reach_the_result():
    """Two axes of a parameter, flattened into one, are two layers along this axis."""
    bench = Bench(a=(6,))
    outer = bench.run.book.new(2).repeat_interleave(3)
    inner = bench.run.book.new(3).repeat(2)
    flat = (Labels((outer, inner)), (6,))
    out = merge(bench.run, [flat, (Labels(fill=NOTHING), (6,))], 1)
    kept = {tuple(x.flatten().tolist()) for x in out.layers}
    lost = {tuple(outer.tolist()), tuple(inner.tolist())} - kept
    assert all(set(labels) <= bench.frozen for labels in lost)


def test_a_product_ties_what_is_summed_and_hands_the_rest_on():
    bench = Bench(a=(3, 4), b=(4, 5))
    a, b = bench.tensors.values()
    out = contract(bench.run, a, "mk", b, "kn", "mn")
    assert bench.ties == pairs(bench.axis("a", 1), bench.axis("b", 0))
    assert not bench.frozen
    assert {varying(x): x.flatten().tolist() for x in out.layers} == {
        (0,): bench.axis("a", 0),
        (1,): bench.axis("b", 1),
    }


def test_a_product_with_unknown_values_freezes_what_it_sums_and_nothing_else():
    bench = Bench(a=(3, 4))
    contract(bench.run, bench.tensors["a"], "mk", torch.zeros(4, 5), "kn", "mn")
    assert bench.frozen == set(bench.axis("a", 1))


def test_a_product_notes_which_parameter_axes_are_read():
    bench = Bench(w=(5, 4))
    units = torch.zeros(2, 4)
    bench.run.put(units, Labels((bench.run.book.new(4).view(1, 4),)))
    contract(bench.run, units, "mk", bench.tensors["w"], "nk", "mn")
    assert [r.tolist() for r in bench.run.book.reads] == [bench.axis("w", 1)]


def test_each_place_of_a_batched_product_is_a_block_of_what_is_summed_there():
    bench = Bench(a=(1,))
    a, b = torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)
    x, y = bench.run.book.new(8).view(2, 1, 4), bench.run.book.new(8).view(2, 4, 1)
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
