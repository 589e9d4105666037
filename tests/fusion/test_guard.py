"""What is said of a fused network that one of its networks does as well as alone."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse import FusionWarning, presets
from fxfuse.calibration.data import Calibration, analyse
from fxfuse.errors import DataError
from fxfuse.fusion._guard import _nearer, advice_for, lost_heads, split_to_judge
from tests.support.nets import fitted, gap, mlp, outputs, randomise, residual

X = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def strangers(outputs=4):
    """Return two networks whose units have nothing in common."""
    return [randomise(mlp(6, 9, 9, outputs), seed) for seed in (1, 2)]


def permuted_pair(net, x):
    net = randomise(net, 1)
    return [net, fxfuse.permute(net, x, seed=1)]


def held_of(x):
    return next(split_to_judge(Calibration(x), fits=True).judge.chunks(len(x)))[0]


def quietly(*args, **options):
    """Fuse; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fxfuse.fuse(*args, **options)


def distance(nets, net, x):
    """Divergence of the class probabilities, or the relative error of one output."""
    mean = sum(outputs(n, x) for n in nets).double() / len(nets)
    got = outputs(net, x).double()
    if mean.shape[1] == 1:
        return float((got - mean).square().sum() / mean.square().sum()) ** 0.5
    p, q = mean.log_softmax(1), got.log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("count", [4, 1], ids=["classes", "value"])
@pytest.mark.parametrize("samples", [200, 60], ids=["many", "few"])
def test_distances_are_those_on_samples_that_nothing_is_fitted_to(count, samples):
    nets, x = strangers(count), X[:samples]
    fused = fxfuse.fuse(nets, x)
    near, held = fused.meta["fxfuse"].nearness, held_of(x)
    assert near.held_out == (samples == 200) and near.samples == len(held) == (12, 60)[samples < 99]
    assert near.in_nats == (count == 4)
    expected = [distance(nets, net, held) for net in (fused, *nets)]
    assert [near.fused, *near.networks] == pytest.approx(expected, rel=1e-4)


def test_held_out_samples_change_nothing():
    nets, other = strangers(), X.clone()
    held = torch.isin(other[:, 0], held_of(X)[:, 0])
    other[held] = -3.0
    fused, same = (fxfuse.fuse(nets, x) for x in (X, other))
    assert held.sum() == 12 and len(fitted(X)) == 188
    assert gap(fused, same, X) == 0.0


def test_methods_that_fit_nothing_use_all_samples():
    nets, other = strangers(), X.clone()
    other[torch.isin(other[:, 0], held_of(X)[:, 0])] = -3.0
    fused, same = (presets.zipit(nets, x) for x in (X, other))
    assert gap(fused, same, X) > 1e-3
    near = fused.meta["fxfuse"].nearness
    assert near.samples == 12 and not near.held_out


def test_a_network_that_does_better_alone_is_named_in_one_sentence():
    nets = permuted_pair(mlp(6, 9, 9, 4), X)  # averaged in place: nonsense
    with pytest.warns(FusionWarning) as caught:
        fused = presets.average(nets, X)
    (warning,), report = caught, fused.meta["fxfuse"]
    near, text = report.nearness, str(warning.message)
    best = min((0, 1), key=near.networks.__getitem__)
    assert f"{near.fused:.3g} nats against {near.networks[best]:.3g} nats" in text
    name = f"Sequential {best}"
    assert f"{name} alone" in text and "12 samples" in text
    assert 'the default method, weights="auto"' in text
    assert report.warnings == (text,) and f"warning: {text}" in str(report)
    assert warning.filename == __file__  # the caller's line


def test_a_larger_network_is_no_choice():
    nets = [randomise(mlp(6, *widths, 4), seed) for seed, widths in enumerate(((30, 30), (5, 5)))]
    fused = quietly(nets, X, anchor=1, weights=[0.9, 0.1])
    near = fused.meta["fxfuse"].nearness
    assert near.clear == (True, False)


def wider_pair():
    net = randomise(mlp(6, 9, 7, 4), 1)
    return [fxfuse.net2wider(net, X), net]


@pytest.mark.parametrize(
    "fusion",
    [
        lambda: quietly(permuted_pair(mlp(6, 9, 4), X), X),
        lambda: quietly(permuted_pair(mlp(6, 9, 4), X), X[:20]),
        lambda: quietly(permuted_pair(residual((6, 3)), IMAGES), IMAGES),
        lambda: quietly(strangers(), X, weights=[1, 0], anchor=0),
        lambda: quietly(strangers(1), X, weights=[1, 0], anchor=0),
        lambda: quietly(strangers()[:1], X),
        lambda: quietly(strangers(), X, width=float("inf")),
        lambda: quietly(wider_pair(), X, anchor=1),
    ],
    ids=["copies", "few", "images", "one counts", "value", "one", "beside", "wider"],
)
def test_rounding_is_no_reason(fusion):
    near = fusion().meta["fxfuse"].nearness
    assert near.fused < 1e-4 and not any(near.clear)


@pytest.mark.parametrize(
    ("totals", "nearer"),
    [
        ([(2, 1), (3, 1), (2, 1)], True),
        ([(9, 1), (1, 2), (1, 2)], False),  # on one part only: by chance
        ([(2, 1)], True),
        ([(1, 2)], False),
        ([(math.nan, 1), (1, 2)], True),
        ([(math.inf, 1)], True),
        ([(1, math.nan), (9, 1)], False),
    ],
)
def test_nearer_is_by_more_than_chance_and_than_what_is_not_finite(totals, nearer):
    parts = [[SimpleNamespace(total=float(t)) for t in part] for part in totals]
    assert _nearer(parts, 1) == nearer


def test_class_indices_beside_values_have_no_mean():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(6, 9, 4)

        def forward(self, x):
            y = self.net(x)
            return {"scores": y, "best": y.argmax(1)}

    net = randomise(Both(), 1)
    assert quietly([net, fxfuse.permute(net, X)], X).meta["fxfuse"].nearness.fused < 1e-4


def normed(width=8):
    return nn.Sequential(nn.Linear(6, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 4))


def test_a_width_that_changes_nothing_is_said():
    nets = [randomise(normed(), seed) for seed in (1, 2)]
    with pytest.warns(FusionWarning, match=r"width=1\.5 changed nothing \(units that a norm"):
        report = fxfuse.fuse(nets, X, width=1.5).meta["fxfuse"]
    assert set(report.narrow) == {space.name for space in report.spaces}
    assert "1 space not wider: units that a norm" in str(report)
    with pytest.warns(FusionWarning, match="less than one more unit"):
        fxfuse.fuse(strangers(), X, width=1.001)
    assert not any(
        "width" in s for s in fxfuse.fuse(strangers(), X, width=1.5).meta["fxfuse"].warnings
    )


def test_advice_is_what_was_not_done():
    assert advice_for(False, 1.0, True, 100) == (
        'weights="auto", width=1.5 or more calibration samples'
    )
    assert advice_for(True, 2.0, False, 1000) == "the default method or a larger width"
    assert advice_for(True, float("inf"), True, 1000) == "that network itself"


def test_tasks_apart_have_no_ensemble():
    fused = fxfuse.fuse(strangers(), X, heads=fxfuse.heads.Separate())
    assert fused.meta["fxfuse"].nearness is None


def test_heads_that_lost_their_task_are_named():
    nets = [analyse(net, X, name) for net, name in zip(strangers(), "ab")]
    p = outputs(strangers()[0], X).double().softmax(1)
    constant = float((p * (p.log() - p.mean(0).log())).sum(1).mean())  # as far as the mean is
    for apart, lost in ((0.99 * constant, False), (1.01 * constant, True), (None, False)):
        report = SimpleNamespace(alignment=SimpleNamespace(names=("a", "b")), apart=(apart, 0.0))
        said = lost_heads(report, nets, Calibration(X))
        assert bool(said) == lost and (not lost or f"a ({apart:.3g} nats against" in said)
    fused = quietly(permuted_pair(mlp(6, 9, 4), X), X, heads=fxfuse.heads.Separate())
    assert not fused.meta["fxfuse"].warnings


@pytest.mark.parametrize("x", [X[:1], X[:1].expand(140, 6)], ids=["one", "repeated"])
def test_one_sample_says_nothing_and_copies_still_come_back(x):
    nets = permuted_pair(mlp(6, 9, 9, 4), X)
    with pytest.warns(FusionWarning, match="are one sample"):
        fused = fxfuse.fuse(nets, x)
    assert gap(nets[0], fused, X) < 1e-5
    assert not any("one sample" in s for s in fxfuse.fuse(nets, X[:2]).meta["fxfuse"].warnings)


class WordModel(nn.Module):
    """A language model of one word, whose head may be its table."""

    def __init__(self, tied):
        super().__init__()
        self.table, self.body, self.head = (
            nn.Embedding(9, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 9, False),
        )
        if tied:
            self.head.weight = self.table.weight

    def forward(self, words):
        x = self.table(words)
        return self.head(x + torch.relu(self.body(x)))


@pytest.mark.parametrize("tied", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("method", ["best", "average", "git_rebasin"])
def test_one_weight_of_a_network_may_be_two_of_another(tied, method):
    words = torch.arange(9).repeat(6)[:, None]
    nets = [randomise(WordModel(tie), seed) for seed, tie in enumerate(tied)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fused = fxfuse.fuse(nets, words, method=method, weights=[1, 0])
    assert gap(nets[0], fused, words) < 1e-5
    two = [str(w.message) for w in said if "one tensor" in str(w.message)]
    assert bool(two) == (tied == (True, False))
    assert (fused.table.weight is fused.head.weight) == (tied == (True, True))


def test_a_tied_network_comes_back_from_a_copy_that_is_not_tied():
    words = torch.arange(9).repeat(6)[:, None]
    net, copy = randomise(WordModel(True)), WordModel(False).eval()
    copy.load_state_dict(fxfuse.permute(net, words, seed=1).state_dict())
    assert gap(net, fxfuse.fuse([net, copy], words), words) < 1e-5


class Even(nn.Module):
    """A network that refuses an odd number of samples."""

    def __init__(self):
        super().__init__()
        self.net = mlp(6, 8, 3)

    def forward(self, x):
        return self.net(x) + F.glu(x.sum(1), -1).sum()


def test_a_network_that_refuses_some_of_the_batches_is_named():
    with pytest.raises(DataError, match="refuses a batch of shape"):
        fxfuse.presets.average([randomise(Even(), seed) for seed in (1, 2)], torch.randn(24, 6))
