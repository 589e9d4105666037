"""The identities that presets keep: on a tiny network by default, on the zoo in the sweep."""

import math

import laws
import pytest
import torch

from tests.support.nets import mlp, randomise
from tests.support.zoo import ZOO


@pytest.fixture(scope="module")
def tiny():
    def inputs(samples, seed):
        return torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed))

    return laws.Case(lambda seed: randomise(mlp(6, 5, 3), seed), inputs)


@pytest.mark.parametrize("name", laws.PRESETS)
def test_all_the_weight_gives_a_network_back(name, tiny):
    assert tiny.gaps(laws.PRESETS[name], ("weight 1",))["weight 1"] < laws.TOLERANCE


def test_a_law_that_does_not_hold_is_seen_and_so_is_a_refusal(tiny):
    gaps = tiny.gaps(laws.PRESETS["average"], ("permuted",))
    assert gaps["permuted"] > laws.TOLERANCE and ("average", "permuted") in laws.MEANT
    wider = laws.Case(lambda seed: randomise(mlp(6, 4 + seed, 3), seed), tiny.inputs)
    assert math.isnan(wider.gaps(laws.PRESETS["git_rebasin"], ("order",))["order"])


@pytest.mark.sweep
@pytest.mark.parametrize("name", laws.PRESETS)
@pytest.mark.parametrize("network", sorted(ZOO))
def test_every_law_holds_on_every_network_unless_the_method_means_it_otherwise(network, name):
    for law, gap in laws.Case.of_zoo(network).gaps(laws.PRESETS[name]).items():
        assert not gap > 1e-3 or (name, law) in laws.MEANT, (law, gap)
