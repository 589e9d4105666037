"""Tiny networks of transformers: the class loads what is made of them and computes the same."""

import pytest

import fxfuse
from tests.support.coverage import coverage
from tests.support.tolerances import FUNCTION, PERMUTATION

pytest.importorskip("transformers")

QUICK = ["bert"]
DEPTHS = ["bart", "beit", "bert", "big_bird", "deberta-v2", "gpt2", "llama", "vit"]
ALL = [name.partition("/")[2] for name in coverage.names_in("transformers")]
CASES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.sweep) for n in ALL]


@pytest.mark.parametrize("kind", CASES)
def test_the_class_loads_the_permuted_and_the_fused_network(kind):
    name = f"transformers/{kind}"
    net, twin = coverage.build(name), coverage.build(name)
    x = coverage.example(name, net)
    shuffled = fxfuse.permute(net, x, seed=1)
    assert coverage.difference(net, shuffled, x) < PERMUTATION
    fused = fxfuse.fuse([net, shuffled], x)
    assert coverage.difference(net, fused, x) < 10 * FUNCTION
    twin.load_state_dict(fused.state_dict(), strict=True)
    assert coverage.difference(twin, fused, x) < FUNCTION


@pytest.mark.sweep
@pytest.mark.parametrize(
    "kind", ["bart", "beit", "bert", "big_bird", "deberta-v2", "gpt2", "llama", "vit"]
)
def test_networks_of_two_depths_are_balanced_and_fused(kind):
    name = f"transformers/{kind}"
    deep, shallow = coverage.build(f"{name}?deeper=1", seed=1), coverage.build(name)
    few, x = coverage.example(name, shallow, 8), coverage.example(name, shallow)
    for net, balanced in zip([deep, shallow], fxfuse.balance([deep, shallow], few)):
        assert coverage.difference(net, balanced, x) < FUNCTION
    fused = fxfuse.fuse([deep, shallow], few, weights=[1, 0])
    assert coverage.difference(deep, fused, x) < FUNCTION


def test_reports_speak_of_modules():
    net = coverage.build("transformers/bert")
    text = str(fxfuse.inspect(net, coverage.example("transformers/bert", net)))
    assert "encoder.layer.0.intermediate" in text.replace("_", ".") and "linear_default" not in text
