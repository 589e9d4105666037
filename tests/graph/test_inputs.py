"""Inputs as people have them: by place, by name, with labels behind or beside them."""

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.errors import DataError, ModelError
from fxfuse.graph.inputs import Inputs
from fxfuse.graph.trace import trace
from tests.support.nets import randomise
from tests.support.tolerances import FUNCTION


class Two(nn.Module):
    """Adds what it makes of two inputs; a third is optional, and a fourth asks for a loss."""

    def __init__(self, width=8):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, width), nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, left, right, scale=None, labels=None, flag=False):
        h = torch.relu(self.a(left) + self.b(right))
        if scale is not None:
            h = h * scale
        h = self.c(h)
        if labels is not None:
            return (h - labels).square().mean()
        return h if not flag else h * 2


LEFT, RIGHT, SCALE = torch.randn(20, 6), torch.randn(20, 4), torch.rand(20, 1)
LABELS = torch.randn(20, 3)
BATCHES = {
    "a tuple": (LEFT, RIGHT),
    "tuples with labels": [(LEFT, RIGHT, LABELS)],
    "lists": [[LEFT, RIGHT]],
    "nested": [((LEFT, RIGHT), LABELS)],
    "a mapping": {"left": LEFT, "right": RIGHT, "labels": LABELS},
    "mappings": [{"right": RIGHT, "left": LEFT, "index": LABELS}],
    "a mapping that is no dict": [UserDict(left=LEFT, right=RIGHT)],
}


@pytest.mark.parametrize("name", BATCHES)
def test_networks_are_fused_on_data_of_every_form(name):
    nets = [randomise(Two(8), seed=1), randomise(Two(6), seed=2)]
    fused = fxfuse.fuse(nets, BATCHES[name])
    alone = fxfuse.fuse(nets, [((LEFT, RIGHT),)])
    with torch.no_grad():
        error = (fused(left=LEFT, right=RIGHT) - alone(left=LEFT, right=RIGHT)).abs().max()
    assert error <= 1e-3
    assert len(fxfuse.align(nets, BATCHES[name]).names) == 2


@pytest.mark.parametrize(
    "example",
    [
        (LEFT, RIGHT),
        {"left": LEFT, "right": RIGHT, "labels": LABELS},
        UserDict(right=RIGHT, left=LEFT),
    ],
)
def test_examples_are_taken_by_place_and_by_name(example):
    net = randomise(Two())
    assert fxfuse.find_spaces(net, example).free_units == 8
    moved = fxfuse.permute(net, example, seed=1)
    with torch.no_grad():
        assert torch.allclose(moved(left=LEFT, right=RIGHT), net(LEFT, RIGHT), atol=FUNCTION)
    fxfuse.verify(net, moved, example)
    assert "a" in str(fxfuse.inspect(net, example))


def test_optional_arguments_that_are_given_are_inputs_and_others_have_their_defaults():
    net = randomise(Two())
    graph = trace(net, {"left": LEFT, "right": RIGHT, "scale": SCALE})
    names = [n.target for n in graph.graph.nodes if n.op == "placeholder"]
    assert names == ["left", "right", "scale"]
    assert torch.allclose(graph(LEFT, RIGHT, SCALE), net(LEFT, RIGHT, SCALE))
    graph = trace(net, (LEFT, RIGHT))
    assert torch.allclose(graph(LEFT, RIGHT), net(LEFT, RIGHT))


def test_without_an_example_arguments_with_defaults_have_them():
    net = randomise(Two())
    assert torch.allclose(trace(net)(LEFT, RIGHT), net(LEFT, RIGHT))


def test_networks_may_take_different_arguments_of_one_mapping():
    class One(Two):
        def forward(self, left):
            return self.c(torch.relu(self.a(left)))

    one = randomise(One())
    assert Inputs.of(one, {"left": LEFT, "right": RIGHT}).names == ("left",)
    graph = trace(one, {"left": LEFT})
    assert torch.allclose(graph(left=LEFT), one(LEFT))


def test_a_forward_of_any_number_of_inputs_is_traced_with_as_many():
    class Sum(nn.Module):
        def forward(self, *parts):
            return sum(parts[1:], parts[0])

    graph = trace(Sum(), (LEFT, LEFT, LEFT))
    assert torch.allclose(graph(LEFT, LEFT, LEFT), 3 * LEFT)


def test_a_keyword_of_forward_is_an_input():
    class Named(Two):
        def forward(self, left, *, right):
            return super().forward(left, right)

    net = randomise(Named())
    moved = fxfuse.permute(net, {"left": LEFT, "right": RIGHT})
    with torch.no_grad():
        assert torch.allclose(moved(LEFT, RIGHT), net(LEFT, right=RIGHT), atol=FUNCTION)


@pytest.mark.parametrize("example", [3, "text", [1.0], {"left": 3}])
def test_other_examples_are_refused(example):
    with pytest.raises(DataError, match="first entry is of type|refuses a batch"):
        fxfuse.find_spaces(Two(), example)


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


STRUCTURES = {
    "a dictionary": (lambda b: (b["left"], b["right"]), {"left": LEFT, "right": RIGHT}),
    "a tuple": (lambda b: b, (LEFT, RIGHT)),
    "a data class": (lambda b: (b.left, b.right), Pair(LEFT, RIGHT)),
    "nested": (lambda b: (b["x"][0], b["x"][1]["r"]), {"x": [LEFT, {"r": RIGHT}], "how": "so"}),
}


class OfStructure(Two):
    """Takes one argument that is a structure of tensors."""

    def __init__(self, read, width=8):
        super().__init__(width)
        self.read = read

    def forward(self, batch):
        return super().forward(*self.read(batch))


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_may_be_the_one_argument_of_forward(name, tmp_path):
    read, batch = STRUCTURES[name]
    nets = [randomise(OfStructure(read, width), seed=width) for width in (8, 6)]
    plain = [randomise(Two(width), seed=width) for width in (8, 6)]
    fused, alone = fxfuse.fuse(nets, [(batch, LABELS)]), fxfuse.fuse(plain, [(LEFT, RIGHT)])
    with torch.no_grad():
        expected = alone(LEFT, RIGHT)
        assert torch.allclose(fused(batch), expected, atol=FUNCTION)
        nets[0].load_state_dict(fused.state_dict())
        assert torch.allclose(nets[0](batch), expected, atol=FUNCTION)
    moved = fxfuse.permute(nets[0], (batch,), seed=1)
    fxfuse.verify(nets[0], moved, (batch,))
    assert fxfuse.find_spaces(moved, (batch,)).free_units == 8
    if name != "a data class":
        fxfuse.save(moved, tmp_path / "net.safetensors")
        assert torch.equal(fxfuse.load(tmp_path / "net.safetensors")(batch), moved(batch))


def test_a_function_says_what_forward_is_called_with():
    nets = [randomise(Two(width), seed=width) for width in (8, 6)]
    rows = [(torch.cat([LEFT, RIGHT], 1), LABELS.argmax(1))]

    def inputs(batch):
        return (batch[0][:, :6],), {"right": batch[0][:, 6:], "flag": True}

    fused = fxfuse.fuse(nets, rows, inputs=inputs)
    alone = fxfuse.fuse(nets, {"left": LEFT, "right": RIGHT, "flag": True})
    with torch.no_grad():
        assert torch.allclose(fused(LEFT, RIGHT), alone(LEFT, RIGHT), atol=FUNCTION)
    moved = fxfuse.permute(nets[0], rows[0], inputs=inputs)
    with torch.no_grad():
        assert torch.allclose(moved(LEFT, RIGHT), nets[0](LEFT, RIGHT, flag=True), atol=FUNCTION)
    fxfuse.verify(moved, moved, rows[0], inputs=lambda b: ((b[0][:, :6], b[0][:, 6:]), {}))
    assert fxfuse.inspect(nets[0], rows[0], inputs=inputs).layers
    made = [
        fxfuse.net2wider(nets[0], rows[0], inputs=inputs),
        fxfuse.net2deeper(nets[0], nets[1], rows, inputs=inputs),
        fxfuse.transfer(nets[1], nets[0], rows, inputs=inputs),
        fxfuse.narrow(nets[0], rows, refit=None, inputs=inputs),
    ]
    with torch.no_grad():
        for other in made[:2]:
            assert torch.allclose(other(LEFT, RIGHT), nets[0](LEFT, RIGHT, flag=True), atol=1e-4)
        assert all(len(other(LEFT, RIGHT)) == len(LEFT) for other in made)
    scores = fxfuse.compare({"a": nets[0], "b": nets[1]}, rows, ensemble=["a", "b"], inputs=inputs)
    assert scores["a"] == fxfuse.compare({"a": moved}, [((LEFT, RIGHT), rows[0][1])])["a"]
    curve = fxfuse.barrier(nets, rows, rows, weights=[0, 1], inputs=inputs)
    loss = nn.functional.cross_entropy(nets[0](LEFT, RIGHT, flag=True), rows[0][1])
    assert curve.losses[0] == pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [(lambda b: b, "inputs of type"), (lambda b: ((b[0], {1, 2}), {}), "an argument with a set")],
)
def test_calls_that_cannot_be_are_refused(inputs, told):
    with pytest.raises(DataError, match=told):
        fxfuse.align([Two(), Two()], [(LEFT, RIGHT)], inputs=inputs)


def test_batches_may_differ_in_tensors_only():
    nets = [randomise(OfStructure(STRUCTURES["a dictionary"][0])) for _ in range(2)]
    batches = [{"left": LEFT, "right": RIGHT, "name": name} for name in "ab"]
    with pytest.raises(DataError, match="after batches with"):
        fxfuse.fuse(nets, batches)


class Several(Two):
    """Returns what it computes before its scores, too."""

    def forward(self, left, right):
        hidden = torch.relu(self.a(left) + self.b(right))
        return {"hidden": hidden, "logits": self.c(hidden)}


def test_scores_are_found_among_several_outputs_and_can_be_named():
    net, wanted = randomise(Several()), LABELS.argmax(1)
    labelled = {"left": LEFT, "right": RIGHT, "labels": wanted}
    pair, data = {"a": net, "b": net}, {"left": LEFT, "right": RIGHT}
    with torch.no_grad():
        outputs = net(LEFT, RIGHT)
    losses = {n: float(nn.functional.cross_entropy(t, wanted)) for n, t in outputs.items()}
    for name in (None, "logits", "hidden"):
        scores = fxfuse.compare(pair, labelled, ensemble=["a", "b"], output=name).values()
        assert [loss for _, loss in scores] == pytest.approx([losses[name or "logits"]] * 3)
    curve = fxfuse.barrier([net, net], data, labelled, weights=[0, 1])
    assert curve.losses == pytest.approx([losses["logits"]] * 2, rel=1e-3)
    with pytest.raises(ModelError, match="without 'other'"):
        fxfuse.compare(pair, labelled, output="other")
