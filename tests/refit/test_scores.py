"""Fits of class scores by their divergence: never farther on samples held out, and downhill."""

import pytest
import torch

import fxfuse
from fxfuse.refit import _scores
from fxfuse.refit._scores import Scores
from tests.support.nets import mlp, outputs, randomise


def scores_of(seed, biased, noise=0.0, rows=400):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    if biased:
        x[:, -1] = 1.0
    weights = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    extra = noise * torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    return Scores(x, 2 * x @ weights + extra, rows * 3 // 4, biased), weights


@pytest.mark.parametrize("biased", [True, False])
def test_each_step_is_nearer(biased):
    scores, weights = scores_of(0, biased, noise=3.0)
    every = slice(None)
    path = list(scores._descend(-weights, 0.0, every, 30))
    far = [float(scores._apart(w, every).sum()) for w in path]
    assert len(far) == 31 and all(after < before for before, after in zip(far, far[1:]))


@pytest.mark.parametrize("biased", [True, False])
def test_what_is_wanted_is_met_on_other_samples(biased):
    scores, weights = scores_of(1, biased)
    found = scores.nearest((weights, weights * 1.5), (1e-4, 1e-2))
    rest = slice(scores.fit, None)
    missed = [float(scores._apart(w, rest).mean()) for w in (weights, found, 2 * weights)]
    assert missed[1] - missed[2] < 0.1 * (missed[0] - missed[2])


def test_weights_stay_where_nothing_is_clearly_nearer():
    scores, weights = scores_of(2, True, noise=1.0)
    assert scores.nearest((weights,), (1e-4,)) is not weights
    exact, weights = scores_of(2, True)
    own = 2 * weights
    assert exact.nearest((own, weights), (1e-4, 1e-2)) is own


def test_without_work_to_spare_only_the_starts_are_compared(monkeypatch):
    monkeypatch.setattr(_scores, "WORK", 0)
    scores, weights = scores_of(3, True)
    nearer, farther = weights, -weights
    assert scores.nearest((farther, nearer), (1e-4,)) is nearer


def test_scores_that_are_too_large_are_scaled_and_decide_as_before():
    scores, weights = scores_of(5, True)
    for factor in (0.5, 2.0, 5.0):
        found = scores.nearest((2 * factor * weights,), ())
        assert torch.allclose(found, 2 * weights, rtol=1e-3)


def test_a_fit_has_to_be_clearly_nearer_than_a_factor():
    scores, weights = scores_of(6, True, noise=0.3, rows=40)
    own = 6 * weights
    found = scores.nearest((own, weights), (1e-4, 1e-2))
    ratio = found / own
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio)) and ratio[0, 0] < 1


def test_a_much_wider_network_changes_the_outputs_of_a_narrow_one_alone():
    share = 0.9
    teacher, student = (randomise(mlp(6, *w, 4), i) for i, w in enumerate([(20, 20), (5, 5)]))
    x = torch.randn(1300, 6, generator=torch.Generator().manual_seed(0))
    fused = fxfuse.fuse([teacher, student], x[:300], weights=[share, 1 - share], anchor=1)
    own, given = student.state_dict(), fused.state_dict()
    last = [*own][-2:]
    for name in own:
        alike = torch.allclose(own[name], given[name], atol=1e-4)
        assert alike or name in last, name
    fresh = x[300:]
    p = (share * outputs(teacher, fresh) + (1 - share) * outputs(student, fresh)).softmax(1)
    far = [-(p * outputs(n, fresh).log_softmax(1)).sum(1).mean() for n in (fused, student)]
    assert far[0] < far[1]
