"""What `inspect` says of a network, printed and as JSON."""

import json

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.alignment.inspection import described, shortened
from tests.support.nets import mlp, randomise, residual


class Attention(nn.Module):
    """One whose spaces lie in blocks, with names that are too long for a line."""

    def __init__(self):
        super().__init__()
        self.the_attention_layer_of_the_only_block_of_this_network = nn.MultiheadAttention(
            8, 2, batch_first=True
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        attend = self.the_attention_layer_of_the_only_block_of_this_network
        return self.head(attend(x, x, x, need_weights=False)[0].mean(1))


CASES = {
    "mlp": (lambda: mlp(6, 8, 5, 3), (2, 6)),
    "residual": (lambda: residual((6, 2), (8, 2)), (2, 3, 16, 16)),
    "attention": (Attention, (2, 4, 8)),
    "nothing": (nn.Identity, (2, 4)),
}


@pytest.fixture(params=CASES)
def case(request):
    make, shape = CASES[request.param]
    return randomise(make()), torch.randn(shape)


def test_it_says_what_other_functions_say(case):
    net, x = case
    inspection = fxfuse.inspect(net, x)
    spaces = fxfuse.find_spaces(net, x)
    assert inspection.name == type(net).__name__
    assert inspection.parameters == sum(p.numel() for p in net.parameters())
    assert inspection.spaces.free_units == spaces.free_units
    assert sorted(s.size for s in inspection.spaces) == sorted(s.size for s in spaces)
    assert sum(map(len, inspection.reasons.values())) == len(inspection.frozen)
    assert {x.kind for x in inspection.layers} == set(inspection.kinds)
    if inspection.layers:
        names = [x.name for x in inspection.layers]
        pairs = fxfuse.align([net, net], x).pairs
        assert names == [a for segment in pairs for a, _ in segment]
        exits = {x.merge for x in inspection.layers}
        assert exits <= set(inspection.chain) and inspection.chain[-1] == "output"


def test_the_printed_form_names_everything_within_80_columns(case):
    net, x = case
    inspection = fxfuse.inspect(net, x)
    text = str(inspection)
    assert all(len(line) <= 80 for line in text.splitlines())
    squeezed = "".join(text.split())
    for name in [s.name for s in inspection.spaces] + [x.name for x in inspection.layers]:
        assert name in squeezed
    assert all("".join(reason.split()) in squeezed for reason in inspection.reasons)


def test_the_json_form_has_fixed_keys_and_all_facts(case):
    net, x = case
    inspection = fxfuse.inspect(net, x)
    facts = json.loads(inspection.to_json())
    assert list(facts) == [
        *("name", "parameters", "free_units", "chain", "segments", "spaces", "frozen")
    ]
    assert facts["chain"] == list(inspection.chain)
    layers = [layer for segment in facts["segments"] for layer in segment["layers"]]
    assert [x["name"] for x in layers] == [x.name for x in inspection.layers]
    assert all(list(x) == ["name", "kind", "block", "width", "nodes"] for x in layers)
    assert [s["size"] for s in facts["spaces"]] == [s.size for s in inspection.spaces]
    for space in facts["spaces"]:
        assert list(space) == ["name", "size", "parent", "axes", "features"]
    for fixed in facts["frozen"]:
        assert list(fixed) == ["tensor", "dim", "count", "node", "reason"]


def test_long_lists_of_fixed_places_are_cut_short():
    fixed = fxfuse.inspect(mlp(6, 8, 3), torch.randn(2, 6)).frozen
    assert described(fixed[:1]) == f"{fixed[0].count} of {fixed[0].tensor}[{fixed[0].dim}]"
    assert described(fixed[:1] * 5).endswith("and 2 more places")


def test_very_long_kinds_lose_their_middle_only():
    kind = "linear, add, " * 50 + "[a43d32b3]"
    assert len(shortened(kind)) < 240 and shortened(kind).endswith("[a43d32b3]")
    assert shortened(kind[-200:]) == kind[-200:]


def test_a_notebook_shows_tables_of_layers_spaces_and_what_is_fixed():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    shown = fxfuse.inspect(net, torch.randn(2, 4))._repr_html_()
    assert shown.count("<table>") == 3 and shown.count("<table>") == shown.count("</table>")
    assert "8 free units" in shown and "an output of the network" in shown
