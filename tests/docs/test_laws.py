"""The identities that presets keep: on a tiny network by default, on the zoo in the sweep."""

import json
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


@pytest.mark.parametrize("name", laws.PRESETS)
def test_all_the_weight_gives_the_weights_back_too(name, tiny):
    a, b, _ = tiny.nets
    fused = tiny.fused(laws.PRESETS[name], [a, b], weights=[1, 0]).state_dict()
    for path, tensor in a.state_dict().items():
        assert torch.allclose(fused[path], tensor, atol=1e-4)


def test_the_page_is_that_of_the_record_and_names_what_breaks_a_law():
    held = json.loads(laws.RECORD.read_text())["held"]
    assert (laws.HERE / "laws.md").read_text() == laws.page(held)
    assert "| `zipit` | 1 of 2, not `B` | 2 of 2 | 1 of 1 | - |" in laws.page(
        {"A": {"zipit": "++.."}, "B": {"zipit": "-++."}}
    )


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
