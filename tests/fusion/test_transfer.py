"""Weights transferred along the longest chain, and along an alignment."""

import copy

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.alignment.chain import data_graph
from fxfuse.calibration.data import analyse
from fxfuse.errors import ArgumentError
from fxfuse.fusion.transfer import _fitted, longest_chain
from tests.support.nets import (
    Concat,
    Gate,
    Pooled,
    build,
    conv,
    gap,
    mlp,
    moved,
    random_nets,
    randomise,
    residual,
    stages,
)

IMAGES = torch.randn(6, 3, 8, 8)


@settings(max_examples=12)
@given(random_nets())
def test_no_path_holds_more_contractions_than_the_chain(net):
    network = analyse(net, IMAGES[:2], "net")
    chain = longest_chain(network)
    graph, best = data_graph(network), {"source": 0}
    for node in nx.topological_sort(graph):
        here = int(node != "source" and node.name in network.weights)
        best[node] = here + max((best[n] for n in graph.predecessors(node)), default=0)
    assert len(chain) == max(best.values())
    assert all(nx.has_path(graph, a, b) for a, b in zip(chain, chain[1:]))


@given(st.tuples(*[st.integers(1, 5)] * 4), st.tuples(*[st.integers(1, 5)] * 4), st.integers(0, 99))
def test_filters_are_repeated_and_kernels_centred(old, new, seed):
    old, new = ((*s[:2], 2 * s[2] - 1, 2 * s[3] - 1) for s in (old, new))
    given = torch.randn(old, generator=torch.Generator().manual_seed(seed))
    found = _fitted(given, new)
    assert found.shape == new
    centre = [(a - b) // 2 for a, b in zip(old[2:], new[2:])]
    for index in torch.cartesian_prod(*[torch.arange(n) for n in new]).view(-1, 4).tolist():
        u, v = index[2] + centre[0], index[3] + centre[1]
        inside = 0 <= u < old[2] and 0 <= v < old[3]
        wanted = given[index[0] % old[0], index[1] % old[1], u, v] if inside else 0.0
        assert float(found[tuple(index)]) == float(wanted)


@pytest.mark.parametrize("name", ["plain", "functional", "batch norm", "flatten", "tokens"])
def test_all_of_a_chain_moves_between_networks_of_one_structure(name):
    source, x = build(name)
    target = randomise(copy.deepcopy(source), 5)
    before = copy.deepcopy(target.state_dict())
    moved_over = fxfuse.transfer(source, target, x, output=True)
    state = moved_over.state_dict()
    left = {n for n, t in state.items() if t.is_floating_point() and torch.equal(t, before[n])}
    if name == "tokens":  # tables are no layers, and the head reads a slice
        assert left == {"token", "position", "norm.weight", "norm.bias"}
    else:
        assert not left and gap(source, moved_over, x) <= 1e-6
    for key, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_shortcuts_and_the_last_layer_stay_as_they_are():
    source, target = randomise(residual((6, 1), (8, 1))), randomise(residual((6, 2), (8, 2)), 1)
    result = fxfuse.transfer(source, target, IMAGES)
    names = moved(target, result)
    assert not [n for n in names if "skip" in n or "fc" in n]
    assert result.meta["fxfuse"].pairs == (
        ("0.0", "0.0"),
        *(("1.0.a.0", "1.0.a.0"), ("1.0.b.0", "1.0.b.0")),
        *(("2.0.a.0", "1.1.a.0"), ("2.0.b.0", "1.1.b.0")),
    )
    taken = source.get_submodule("2.0.a.0").weight[:6, :6]
    assert torch.equal(result.get_submodule("1.1.a.0").weight, taken)
    assert "0.1.running_mean" in names and "0.1.weight" in names


def test_an_alignment_decides_which_layers_match():
    source, target = randomise(residual((6, 2), (8, 1))), randomise(residual((6, 3), (8, 2)), 1)
    alignment = fxfuse.align([source, target], IMAGES)
    pairs = fxfuse.transfer(source, target, IMAGES, alignment).meta["fxfuse"].pairs
    blocks = {(a.rpartition(".")[0][:3], b.rpartition(".")[0][:3]) for a, b in pairs}
    assert blocks == {("0", "0"), ("1.0", "1.0"), ("1.1", "1.2"), ("2.0", "2.0")}
    assert pairs != fxfuse.transfer(source, target, IMAGES).meta["fxfuse"].pairs


def test_an_alignment_of_the_other_order_is_refused():
    source, target = randomise(residual((6, 1))), randomise(residual((6, 2)), 1)
    alignment = fxfuse.align([target, source], IMAGES)
    with pytest.raises(ArgumentError, match="alignment"):
        fxfuse.transfer(source, target, IMAGES, alignment)


def test_convolutions_and_linear_layers_match_apart():
    source = randomise(stages([4], hidden=(7, 6)))
    target = randomise(stages([4, 5], [6], hidden=(9,)), 1)
    pairs = fxfuse.transfer(source, target, IMAGES).meta["fxfuse"].pairs
    assert pairs == (("0.0.0", "0.0.0"), ("2.0", "2.0"))


def test_biases_and_norms_can_be_left():
    source, target = randomise(stages([4], [5])), randomise(stages([4], [5]), 1)
    result = fxfuse.transfer(source, target, IMAGES, weights_only=True)
    assert moved(target, result) == {"0.0.0.weight", "0.2.0.weight"}


def test_the_longest_chain_goes_through_gates_and_past_skips():
    net = nn.Sequential(conv(3, 4), Concat(4, 3), Gate(7, 2), Pooled(7, 3))
    chain = longest_chain(analyse(randomise(net), IMAGES, "net"))
    assert [n.name for n in chain] == ["_0_0", "_1_a_0", "_2_down", "_2_up", "_3_fc"]


def test_heads_may_differ_and_the_result_trains_like_the_target():
    source, target = randomise(mlp(6, 8, 3)), randomise(mlp(6, 8, 5), 1).train()
    result = fxfuse.transfer(source, target, torch.randn(4, 6))
    assert result.training and torch.equal(result.get_submodule("0").weight, source[0].weight)
    result(torch.randn(4, 6)).sum().backward()
    assert all(p.grad is not None for p in result.parameters())


def test_transfer_with_alignment_is_a_start_for_fusing_with_the_target():
    source, target = randomise(residual((6, 1), (8, 1))), randomise(residual((6, 2), (8, 2)), 1)
    alignment = fxfuse.align([source, target], IMAGES)
    result = fxfuse.transfer(source, target, IMAGES, alignment)
    fused = fxfuse.fuse([result, target], IMAGES)
    target.load_state_dict(fused.state_dict())
