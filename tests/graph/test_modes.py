"""Modules that know the mode, and networks without what only training computes."""

import copy

import pytest
import torch

from fxfuse.graph.modes import (
    Choice,
    Mode,
    Tap,
    cut_to,
    evaluating_part,
    is_choice,
    only_in_training,
)
from fxfuse.graph.trace import trace
from tests.support.modes import HEADS, Body, same, seeded
from tests.support.nets import Functional, mlp, randomise


@pytest.mark.parametrize("training", [False, True])
def test_modules_that_know_the_mode_follow_it(training):
    value = [torch.zeros(2)]
    assert Mode().train(training)(torch.ones(1)) is training
    assert Choice().train(training)("eval", "train") == ("train" if training else "eval")
    given = Tap().train(training)(value)
    assert torch.equal(given[0], value[0]) and (given[0] is value[0]) == training


def test_nodes_that_only_training_needs_are_told_by_the_graph():
    graph = trace(Body())
    extra = {n.name for n in only_in_training(graph)}
    assert "head" in extra and not extra & {"a_0", "b", "out"}
    assert [n.target for n in graph.graph.nodes if is_choice(graph, n)] == ["training_output"]


@pytest.mark.parametrize("net", [mlp(6, 8, 3), Functional()])
def test_without_heads_there_is_nothing_to_leave_out(net):
    graph = trace(net)
    assert only_in_training(graph) == set() and evaluating_part(graph) is None


@pytest.mark.parametrize("traced", [trace, lambda net: trace(trace(net))], ids=["once", "twice"])
@pytest.mark.parametrize("name", HEADS)
def test_the_part_for_eval_mode_computes_the_same(name, traced):
    net, x = randomise(HEADS[name]()), torch.randn(7, 6)
    graph = traced(net)
    part = evaluating_part(graph)
    assert same(seeded(net, x), seeded(part.eval(), x))
    whole = copy.deepcopy(graph)
    cut_to(graph, part)
    graph.graph.lint()
    assert same(seeded(net, x), seeded(graph, x))
    kept = {k for k in whole.state_dict() if not k.startswith(("head", "part.head"))}
    assert set(graph.state_dict()) == kept or name in ("supervised", "features")
    used = {str(n.target) for n in graph.graph.nodes}
    assert all(any(k.startswith(u) for u in used) for k in graph.state_dict())
    assert same(seeded(part.train(), x), seeded(graph.train(), x))
    assert evaluating_part(graph) is None
