"""What `weights="auto"` chooses from, by how near it comes to the ensemble on samples held out."""

import copy

import pytest
import torch

import fxfuse
from fxfuse import presets
from fxfuse.coupling.transport import Transport
from fxfuse.errors import ArgumentError
from fxfuse.fusion import selection
from fxfuse.refit.sweep import LeastSquares
from tests.support.nets import gap, mlp, outputs, randomise, residual

FULL_SAY = fxfuse.Method(coupling=Transport())  # so that strangers' units are mixed all the same
X = torch.randn(600, 6, generator=torch.Generator().manual_seed(0))
FRESH = torch.randn(3000, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def strangers(*all_widths):
    return [randomise(mlp(6, *widths, 4), seed) for seed, widths in enumerate(all_widths)]


def divergence(nets, fused, x):
    mean = (sum(outputs(n, x) for n in nets) / len(nets)).log_softmax(1)
    return float((mean.exp() * (mean - outputs(fused, x).log_softmax(1))).sum(1).mean())


def quiet_and_loud(*widths):
    """Return a network that says little and one that the ensemble follows."""
    nets = [randomise(mlp(6, *[width] * 3, 4), seed) for seed, width in enumerate(widths, 2)]
    for net, loudness in zip(nets, (0.05, 4.0)):
        with torch.no_grad():
            net[-1].weight.mul_(loudness)
            net[-1].bias.mul_(loudness)
    return nets


def preferring(monkeypatch, number):
    """Let the candidate of a number be the nearest."""
    far = selection.Choice._far

    def other(self, ensemble, networks):
        found = far(self, ensemble, networks)
        if len(networks) == len(self.leads):  # these are the parents
            return found
        return [float(k != number) for k in range(len(found))]

    monkeypatch.setattr(selection.Choice, "_far", other)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (strangers((9, 9), (9, 9)), X),
        lambda: (strangers((9, 9), (7,)), X),
        lambda: (quiet_and_loud(9, 9), X),
        lambda: ([randomise(residual((6, 3), (8, 1)), seed) for seed in (1, 2)], IMAGES),
        lambda: ([randomise(mlp(6, 9, 9, 1), seed) for seed in (1, 2)], X),
        lambda: (strangers((9, 9), (9, 9)), X[:3]),
    ],
    ids=["two", "other widths", "loud", "images", "value", "few"],
)
def test_no_network_of_its_size_is_nearer_than_what_is_chosen(make):
    nets, x = make()
    require_near(nets, x, FULL_SAY)


@pytest.mark.parametrize("method", ["best", "zipit"])
def test_what_is_chosen_is_so_with_any_method(method):
    require_near(strangers((9, 9), (9, 9)), X, method)


def require_near(nets, x, method):
    fused = fxfuse.fuse(nets, x, weights="auto", method=method)
    report = fused.meta["fxfuse"]
    near, sizes = report.nearness, [[p.shape for p in n.parameters()] for n in (fused, *nets)]
    alike = [d for d, size in zip(near.networks, sizes[1:]) if size == sizes[0]]
    assert alike and near.fused <= 1.002 * min(alike) + 2e-6
    assert near.fused == pytest.approx(min(report.candidates.values()), rel=2e-3, abs=2e-6)
    assert near.held_out == (len(x) > 3)
    nets[report.anchor].load_state_dict(fused.state_dict(), strict=True)


def test_the_choice_holds_on_fresh_samples():
    nets = strangers((9, 9), (9, 9))
    fused, mixed = (FULL_SAY(nets, X, weights=weights) for weights in ("auto", None))
    alone = min(divergence(nets, net, FRESH) for net in nets)
    assert divergence(nets, fused, FRESH) < min(alone, divergence(nets, mixed, FRESH))


NAMES = (
    "the fused network",
    "the fused network, outputs as mixed",
    "the plain average",
    "Sequential 0 with its outputs fitted",
    "Sequential 0 alone",
)


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_each_candidate_is_what_its_name_says(monkeypatch, number):
    nets = strangers((9, 9), (9, 9))
    preferring(monkeypatch, number)
    fused = fxfuse.fuse(nets, X, weights="auto", anchor=0)
    report = fused.meta["fxfuse"]
    assert tuple(report.candidates) == NAMES
    assert f"of 5 candidates, {NAMES[number]} is nearest to the ensemble" in report.verdict
    assert report.mixed == (number == 1) and ("as mixed" in str(report)) == (number == 1)
    same = {2: presets.average(nets, X), 4: nets[0]}
    if number in same:
        assert gap(same[number], fused, X) < 1e-5
    if number == 3:  # all but the last layer is the network's
        state, own = fused.state_dict(), nets[0].state_dict()
        moved = {name for name in own if not torch.equal(state[name], own[name])}
        assert moved == {"4.weight", "4.bias"}
        assert divergence(nets, fused, FRESH) < divergence(nets, nets[0], FRESH)
        assert [layer.node for layer in report.layers] == ["_4"]


def test_only_the_fit_of_the_outputs_is_left_out(monkeypatch):
    nets, made = strangers((9, 9), (9, 9)), []
    for number in (0, 1):
        with monkeypatch.context() as patch:
            preferring(patch, number)
            made.append(fxfuse.fuse(nets, X, weights="auto", anchor=0).state_dict())
    differ = {name for name in made[0] if not torch.equal(made[0][name], made[1][name])}
    assert differ == {"4.weight", "4.bias"}


def test_of_siblings_no_candidate_is_fitted():
    net = randomise(mlp(6, 9, 9, 4), 1)
    nets = [copy.deepcopy(net), copy.deepcopy(net)]
    with torch.no_grad():
        nets[1][-1].weight.add_(torch.randn(4, 9, generator=torch.Generator().manual_seed(2)))
    fused = fxfuse.fuse(nets, X, weights="auto", anchor=0)
    report = fused.meta["fxfuse"]
    assert tuple(report.candidates) == (NAMES[0], NAMES[4]) and not report.layers
    assert gap(presets.average(nets, X), fused, X) < 1e-5


def test_networks_that_agree_come_back():
    net = randomise(mlp(6, 9, 4), 1)
    fused = fxfuse.fuse([net, fxfuse.permute(net, X, seed=1)], X, weights="auto")
    assert gap(net, fused, X) < 1e-4


def test_the_units_may_be_those_of_another_network_as_wide():
    nets = quiet_and_loud(9, 9)
    free, bound = (fxfuse.fuse(nets, X, weights="auto", anchor=anchor) for anchor in (None, 0))
    reports = [fused.meta["fxfuse"] for fused in (free, bound)]
    assert [r.anchor for r in reports] == [0, 0] and [r.lead for r in reports] == [1, 0]
    assert "units of network 1" in str(reports[0]) and "units" not in str(reports[1])
    assert divergence(nets, free, X) < 0.5 * divergence(nets, bound, X)
    nets[0].load_state_dict(free.state_dict(), strict=True)


def test_networks_of_another_size_are_not_chosen():
    for nets in (quiet_and_loud(9, 8), strangers((9, 9), (9,))):
        report = fxfuse.fuse(nets, X, weights="auto").meta["fxfuse"]
        assert report.lead == 0 and not any("Sequential 1" in name for name in report.candidates)


def test_a_wider_network_is_chosen_by_itself():
    report = fxfuse.fuse(strangers((9, 9), (9, 9)), X, weights="auto", width=1.5).meta["fxfuse"]
    assert set(report.candidates) == set(NAMES[:2])


def test_a_sweep_of_the_outputs_leaves_all_else():
    refit = LeastSquares(rows=3)
    assert refit.of_outputs == LeastSquares(rows=3, only_outputs=True)
    assert presets.zipit.refit.of_outputs is None


def test_choosing_sweeps_over_the_data_once_and_over_the_outputs_once(monkeypatch):
    whole, swept = LeastSquares.__call__, []

    def counted(self, *args, **options):
        swept.append(self.only_outputs)
        return whole(self, *args, **options)

    monkeypatch.setattr(LeastSquares, "__call__", counted)
    fxfuse.fuse(strangers((9, 9), (9, 9), (9, 9)), X, weights="auto")
    assert swept == [False, True]


@pytest.mark.parametrize("options", [{"weights": "equal"}, {"weights": "auto", "heads": True}])
def test_words_that_mean_nothing_are_refused(options):
    heads = fxfuse.heads.Separate() if options.pop("heads", None) else None
    nets = [randomise(mlp(6, 5, 5, 3), s) for s in (1, 2)]
    with pytest.raises(ArgumentError, match="weights '") as caught:
        fxfuse.fuse(nets, X, heads=heads, **options)
    assert all([caught.value.met, caught.value.where, caught.value.expected, caught.value.do])
