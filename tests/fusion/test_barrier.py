"""Accuracy and loss on labelled data.

Loss and accuracy between two networks."""

import sys

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.errors import ArgumentError, DataError, ModelError
from fxfuse.fusion.barrier import Barrier, compare, evaluate
from tests.support.nets import mlp, outputs, randomise

NET = nn.Linear(4, 3)
INPUTS = torch.randn(50, 4)
LABELS = torch.arange(50) % 3


def test_it_is_what_torch_computes_whatever_the_batches():
    scores = NET(INPUTS).detach()
    right = 100 * float((scores.argmax(1) == LABELS).float().mean())
    loss = float(nn.functional.cross_entropy(scores, LABELS))
    batches = list(zip(INPUTS.split(7), LABELS.split(7)))
    for data in (
        (INPUTS, LABELS),
        batches,
        iter(batches),
        [{"image": x, "label": y} for x, y in batches],
    ):
        assert evaluate(NET, data) == pytest.approx((right, loss), rel=1e-5)


@pytest.mark.parametrize(
    "data",
    [
        [],
        [INPUTS],
        [(INPUTS,)],
        3,
        "x",
        INPUTS,
        [(INPUTS, LABELS.float())],
        [(INPUTS, LABELS[:3])],
        [(INPUTS, "labels")],
    ],
)
def test_other_data_are_refused(data):
    with pytest.raises(DataError):
        evaluate(NET, data)


def test_networks_are_compared_on_the_first_samples_and_only_with_labels():
    batches = list(zip(INPUTS.split(7), LABELS.split(7)))
    found = compare({"a": NET}, batches, 20)
    assert found == {"a": pytest.approx(evaluate(NET, (INPUTS[:20], LABELS[:20])), rel=1e-5)}
    for unlabelled in (
        [INPUTS],
        INPUTS,
        [],
        [(INPUTS, LABELS.float())],
        [(INPUTS, LABELS + 9)],
        [(INPUTS, LABELS - 1)],
    ):
        assert compare({"a": NET}, unlabelled, 20) == {}


def test_the_ensemble_is_the_mean_of_the_outputs():
    nets = {name: nn.Linear(4, 3) for name in "abc"}
    found = compare(nets, [(INPUTS, LABELS)], ensemble=["a", "c"])
    assert list(found) == ["a", "b", "c", "ensemble"]
    mean = (nets["a"](INPUTS) + nets["c"](INPUTS)).detach() / 2
    assert found["ensemble"][1] == pytest.approx(float(nn.functional.cross_entropy(mean, LABELS)))


MODULE = sys.modules["fxfuse.fusion.fuse"]  # its name in the package is the function
X = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(80) % 3


@pytest.fixture(scope="module")
def nets():
    return [randomise(mlp(6, 8, 7, 6, 3), 0).eval(), randomise(mlp(6, 5, 4, 3), 1).eval()]


def test_it_is_what_fuse_gives_for_each_weight(nets):
    """One analysis for all weights gives the same networks, bit for bit."""
    curve = fxfuse.barrier(nets, X, (X, Y), weights=[0, 0.3, 1])
    for t, loss, accuracy in zip(curve.weights, curve.losses, curve.accuracies):
        fused = fxfuse.fuse(nets, X, weights=[1 - t, t]).eval()
        assert (accuracy, loss) == evaluate(fused, (X, Y))
    assert curve.names == ("Sequential 0", "Sequential 1") and "0.30" in str(curve)


def test_the_networks_are_analysed_once(nets, monkeypatch):
    calls = []
    for name in ("prepare", "align_networks"):
        original = getattr(MODULE, name)

        def counted(*args, name=name, original=original, **options):
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(MODULE, name, counted)
    fxfuse.barrier(nets, X, (X, Y), weights=[0, 0.5, 1])
    assert sorted(calls) == ["align_networks", "prepare"]


def test_options_reach_the_fusion_and_models_stay(nets):
    before = [outputs(n, X) for n in nets]
    usual = fxfuse.barrier(nets, X, (X, Y), weights=[0.2, 0.8])
    other = fxfuse.barrier(nets, X, (X, Y), weights=[0.2, 0.8], method=fxfuse.presets.clafusion)
    thin = fxfuse.barrier(nets, X, (X, Y), weights=[0.2, 0.8], anchor=1)
    automatic = fxfuse.align(nets, X).pairs[0]
    by_hand = next(p for p in ([("0", "0"), (d, "2")] for d in ("2", "4")) if p != automatic)
    given = fxfuse.align(nets, X, pairs=[by_hand])
    hand = fxfuse.barrier(nets, X, (X, Y), weights=[0.2, 0.8], alignment=given)
    assert len({c.losses for c in (usual, other, thin, hand)}) == 4
    squared = fxfuse.barrier(
        nets, X, (X, Y), weights=[0.2, 0.8], loss=lambda x, y: x.square().mean()
    )
    assert squared.accuracies == usual.accuracies and squared.losses != usual.losses
    assert all(torch.equal(a, b) for a, b in zip(before, [outputs(n, X) for n in nets]))


def test_a_fused_network_of_one_weight_is_left_alone_by_the_next(nets):
    all_weights = [(0.9, 0.1), (0.1, 0.9)]
    seen = [f for f in MODULE.fuse_along(nets, X, all_weights)]
    again = [outputs(f, X) for f in MODULE.fuse_along(nets, X, all_weights)]
    assert all(torch.equal(outputs(f, X), y) for f, y in zip(seen, again))


def test_the_height_is_above_the_straight_line():
    assert Barrier((0, 0.5, 1), (1.0, 4.0, 3.0), (1, 1, 1), ("a", "b")).height == 2.0
    assert Barrier((0, 0.5, 1), (1.0, 1.5, 3.0), (1, 1, 1), ("a", "b")).height == 0.0


@pytest.mark.parametrize("weights", [[0.5], [], [0.5, 0.2], [0, 2], [-0.1, 1], [0.0, float("nan")]])
def test_bad_weights_are_refused(nets, weights):
    with pytest.raises(ArgumentError, match="weights"):
        fxfuse.barrier(nets, X, (X, Y), weights=weights)


def test_two_models_are_asked_for(nets):
    with pytest.raises(ArgumentError, match="1 models"):
        fxfuse.barrier(nets[:1], X, (X, Y))


@pytest.mark.parametrize(
    "returned", [lambda a: (a.mean(), a), lambda a: a.mean(), lambda a: a[..., None]]
)
def test_outputs_that_are_no_scores_are_refused(returned):
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return returned(self.b(self.a(x).relu()))

    x = torch.randn(20, 4)
    with pytest.raises(ModelError, match="scores"):
        fxfuse.barrier([Returns(), Returns()], x, (x, torch.zeros(20).long()))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 5)

    def forward(self, a, b):
        return self.head(torch.relu(self.a(a) + self.b(b)))


def test_networks_of_several_inputs_have_their_labels_behind_them():
    nets = {name: randomise(TwoInputs(), seed) for seed, name in enumerate("ab")}
    a, b, labels = torch.randn(40, 4), torch.randn(40, 3), torch.randint(0, 5, (40,))
    scores = [fxfuse.compare(nets, data) for data in ([(a, b, labels)], [((a, b), labels)])]
    assert scores[0] == scores[1] != {}
    curve = fxfuse.barrier(list(nets.values()), [(a, b, labels)], [(a, b, labels)])
    assert curve.accuracies[0] == pytest.approx(scores[0]["a"][0])
    assert curve.accuracies[-1] == pytest.approx(scores[0]["b"][0])
