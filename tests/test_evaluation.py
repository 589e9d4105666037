"""Accuracy and loss on labelled data."""

import pytest
import torch
from torch import nn

from fxfuse.errors import DataError
from fxfuse.evaluation import compare, evaluate

NET = nn.Linear(4, 3)
X = torch.randn(50, 4)
Y = torch.arange(50) % 3


def test_it_is_what_torch_computes_whatever_the_batches():
    scores = NET(X).detach()
    right = 100 * float((scores.argmax(1) == Y).float().mean())
    loss = float(nn.functional.cross_entropy(scores, Y))
    batches = list(zip(X.split(7), Y.split(7)))
    for data in ((X, Y), batches, iter(batches), [{"image": x, "label": y} for x, y in batches]):
        assert evaluate(NET, data) == pytest.approx((right, loss), rel=1e-5)


@pytest.mark.parametrize(
    "data", [[], [X], [(X,)], 3, "x", X, [(X, Y.float())], [(X, Y[:3])], [(X, "labels")]]
)
def test_other_data_are_refused(data):
    with pytest.raises(DataError):
        evaluate(NET, data)


def test_networks_are_compared_on_the_first_samples_and_only_with_labels():
    batches = list(zip(X.split(7), Y.split(7)))
    found = compare({"a": NET}, batches, 20)
    assert found == {"a": pytest.approx(evaluate(NET, (X[:20], Y[:20])), rel=1e-5)}
    for unlabelled in ([X], X, [], [(X, Y.float())], [(X, Y + 9)], [(X, Y - 1)]):
        assert compare({"a": NET}, unlabelled, 20) == {}
