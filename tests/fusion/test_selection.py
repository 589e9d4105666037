"""Weights that are chosen: never farther from the ensemble than the anchor, on what judged them."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxfuse
from fxfuse.calibration.data import Calibration
from fxfuse.coupling.transport import Transport
from fxfuse.errors import ArgumentError
from fxfuse.fusion import selection as weighing
from fxfuse.fusion.selection import _between, nearest
from fxfuse.refit.sweep import LeastSquares
from tests.support.nets import fitted, gap, mlp, outputs, randomise, residual

FULL_SAY = fxfuse.Method(coupling=Transport())  # so that weights matter where units have no match
X = torch.randn(600, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def divergence(nets, fused, x):
    mean = (sum(outputs(n, x) for n in nets) / len(nets)).log_softmax(1)
    return float((mean.exp() * (mean - outputs(fused, x).log_softmax(1))).sum(1).mean())


@pytest.mark.parametrize(
    "make",
    [
        lambda: ([mlp(6, 9, 9, 4), mlp(6, 7, 4)], X),
        lambda: ([mlp(6, 9, 9, 4), mlp(6, 7, 4), mlp(6, 8, 8, 4)], X),
        lambda: ([residual((6, 3), (8, 1)), residual((6, 2), (7, 1))], IMAGES),
    ],
    ids=["two", "three", "residual"],
)
def test_chosen_weights_are_nearer_to_the_ensemble_than_equal_ones(make):
    nets, x = make()
    nets = [randomise(net, seed) for seed, net in enumerate(nets)]
    chosen, equal = (FULL_SAY(nets, x, weights=weights) for weights in ("auto", None))
    weights = chosen.meta["fxfuse"].weights
    assert sum(weights) == pytest.approx(1) and max(weights) == weights[0] >= 1 / len(nets)
    assert all(w == pytest.approx(weights[1]) for w in weights[1:])
    if weights[0] > 1 / len(nets):  # equal ones may be the best
        assert divergence(nets, chosen, x) < divergence(nets, equal, x)
    expected = divergence(nets, chosen, fitted(x))
    assert chosen.meta["fxfuse"].divergence == pytest.approx(expected, rel=1e-3)


def test_networks_that_agree_may_have_any_weights():
    net = randomise(mlp(6, 9, 4), 1)
    fused = fxfuse.fuse([net, fxfuse.permute(net, X, seed=1)], X, weights="auto")
    assert gap(net, fused, X) < 1e-4


def quiet_and_loud(*widths):
    """Return a deep network that says little and a shallow one that the ensemble follows."""
    nets = [randomise(mlp(6, *[width] * depth, 4), depth) for width, depth in zip(widths, (3, 2))]
    for net, loudness in zip(nets, (0.05, 4.0)):
        with torch.no_grad():
            net[-1].weight.mul_(loudness)
            net[-1].bias.mul_(loudness)
    return nets


def test_the_units_may_be_those_of_another_network_as_wide():
    nets = quiet_and_loud(9, 9)
    free, bound = (fxfuse.fuse(nets, X, weights="auto", anchor=anchor) for anchor in (None, 0))
    reports = [fused.meta["fxfuse"] for fused in (free, bound)]
    assert [r.anchor for r in reports] == [0, 0] and [r.lead for r in reports] == [1, 0]
    assert "units of network 1" in str(reports[0]) and "units" not in str(reports[1])
    assert divergence(nets, free, X) < 0.5 * divergence(nets, bound, X)
    nets[0].load_state_dict(free.state_dict(), strict=True)


def test_units_of_other_numbers_cannot_lead():
    nets = quiet_and_loud(9, 8)
    assert fxfuse.fuse(nets, X, weights="auto").meta["fxfuse"].lead == 0


@dataclass(frozen=True)
class Shares:
    """All that the search sees of networks and their maps."""

    lead: int = 0
    weights: tuple[float, ...] = (0.5, 0.5)

    @property
    def problem(self):
        both = {"output_weights": (0.5, 0.5), "networks": ("a", "b")}
        return SimpleNamespace(lead=self.lead, **both)

    def weighted(self, weights):
        return replace(self, weights=weights)


@pytest.mark.parametrize(
    ("missed", "chosen"), [((1.0, 0.9, 0.8), 1), ((1.0, 1.1, 0.8), 0), ((1.0, 0.9, 0.7), 2)]
)
def test_another_way_is_taken_if_it_is_nearer_by_its_margin(monkeypatch, missed, chosen):
    monkeypatch.setattr(weighing, "_distance", lambda voices, way, data: missed[way])
    ways = [Shares(), Shares(), Shares(lead=1)]  # the last has to come clearly nearer
    way, shares = nearest(ways, lambda way, *_: way, Calibration(X))
    assert way == chosen and shares.problem.output_weights == (0.5, 0.5)


@pytest.mark.parametrize("fitted", [True, False])
def test_a_last_layer_may_stay_as_it_was_mixed(monkeypatch, fitted):
    """Whichever comes nearer, as told here by the norm of its weights."""
    nets = [randomise(mlp(6, 9, 9, 4), 1), randomise(mlp(6, 8, 4), 2)]

    def distance(voices, network, data):
        return float(network.module.get_parameter("4.weight").detach().norm()) * (
            1 if fitted else -1
        )

    both = [fxfuse.Method(refit=LeastSquares(outputs=o))(nets, X) for o in (True, False)]
    larger = distance(None, SimpleNamespace(module=both[0]), None) > distance(
        None, SimpleNamespace(module=both[1]), None
    )
    monkeypatch.setattr(weighing, "_distance", distance)
    report = fxfuse.fuse(nets, X, weights="auto").meta["fxfuse"]
    assert report.mixed == larger and ("as mixed" in str(report)) == larger
    assert ("_4" in {layer.node for layer in report.layers}) != larger


def test_few_samples_judge_themselves():
    nets = [randomise(mlp(6, 9, 4), seed) for seed in (1, 2)]
    assert bool(outputs(fxfuse.fuse(nets, X[:3], weights="auto"), X).isfinite().all())


def test_outputs_that_are_no_classes_are_compared_by_their_errors():
    nets = [randomise(mlp(6, *[9] * depth, 1), depth) for depth in (3, 1)]
    fused, equal = (FULL_SAY(nets, X, weights=w) for w in ("auto", None))
    x = torch.randn(6000, 6)
    mean = sum(outputs(n, x) for n in nets) / 2
    wrong = [float((outputs(f, x) - mean).square().mean()) for f in (fused, equal)]
    assert wrong[0] < wrong[1]


@settings(max_examples=30)
@given(st.dictionaries(st.floats(0.1, 1), st.floats(0, 1), min_size=1, max_size=6))
def test_a_new_share_lies_beside_the_best(found):
    share, best = _between(found), min(found, key=found.__getitem__)
    others = [s for s in found if min(share, best) < s < max(share, best)]
    assert 0 < share <= 1 and share != best and not others


@pytest.mark.parametrize("options", [{"weights": "equal"}, {"weights": "auto", "heads": True}])
def test_words_that_mean_nothing_are_refused(options):
    heads = fxfuse.heads.Separate() if options.pop("heads", None) else None
    nets = [randomise(mlp(6, 5, 5, 3), s) for s in (1, 2)]
    with pytest.raises(ArgumentError, match="weights '") as caught:
        fxfuse.fuse(nets, X, heads=heads, **options)
    assert all([caught.value.met, caught.value.where, caught.value.expected, caught.value.do])
