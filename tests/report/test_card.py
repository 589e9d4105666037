"""The model card of a fused network."""

import torch
import yaml

import fxfuse
from fxfuse.report import card_of
from tests.support.nets import mlp, randomise


def report():
    nets = [randomise(mlp(6, 8, 3), 0), randomise(mlp(6, 5, 3), 1)]
    return fxfuse.fuse(nets, torch.randn(40, 6), weights=[3, 1]).meta["fxfuse"]


def test_the_head_is_what_hubs_read_and_the_rest_says_what_was_done():
    parents = {"A": "nets:a@a.safetensors", "B": "nets:b|x"}
    scores = {"A": 50.0, "fused": (62.5, 1.0)}
    card = card_of(report(), "fused.safetensors", parents, scores, {"recipe": "models: [a]"})
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model_relation"] == "merge" and "license" in head and "fxfuse" in head["tags"]
    assert "| A | 0.75 | nets:a@a.safetensors |" in card and r"nets:b\|x" in card
    assert "| fused | 62.50 % |" in card and "```yaml\nmodels: [a]\n```" in card
    assert "| ensemble | 136 | 117 |" in card and "| fused | 83 | 72 |" in card
    assert 'fxfuse.load("fused.safetensors")' in card and torch.__version__ in card


def test_what_only_a_person_knows_is_left_to_be_filled_in():
    card = card_of(report(), "f", {"A": "a", "B": "b"}, {}, {})
    assert "TODO: accuracy" in card and "license: other  # TODO" in card
