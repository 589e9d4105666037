"""Cutting: the two parts make the whole, where others are cut, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxfuse.alignment.align import align_networks
from fxfuse.alignment.layers import partition
from fxfuse.calibration.data import Calibration
from fxfuse.errors import ArgumentError, PairingError
from fxfuse.fusion._cut import cut_networks, trunk_segments
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.nets import conv, gap, mlp, outputs, random_nets, randomise, residual, stages
from tests.support.tolerances import FUNCTION


def images(count=16):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def networks(*nets, data=None):
    data = images() if data is None else data
    return [Network.of(f"net {i}", trace(n), (data[:2],)) for i, n in enumerate(nets)]


def layers(network):
    return [x.name for s in partition(network) for x in s.layers]


def cut(found, after, anchor=0, data=None):
    data = Calibration(images() if data is None else data)
    alignment = align_networks(found, data, segments=trunk_segments(found, anchor, after))
    return cut_networks(found, alignment, anchor, after)


@settings(max_examples=15)
@given(random_nets(), st.data())
def test_trunk_and_head_together_are_the_network(net, draw):
    (found,), x = networks(net), images()
    if float(outputs(net, x).abs().max()) < 0.01 or len(layers(found)) < 2:
        return
    after = draw.draw(st.sampled_from([None, *layers(found)[:-1]]))
    (trunk,), alignment, (head,) = cut([found], after)
    together = nn.Sequential(trunk.module.eval(), head.module.eval())
    assert gap(net, together, x) < FUNCTION and not head.inputs
    kept = layers(found)[: layers(found).index(after) + 1] if after else layers(found)[:-1]
    assert [x for s in alignment.segments for x in s.slots[0]] == kept == layers(trunk)


def test_the_units_of_the_value_at_the_cut_are_free_in_the_trunk_alone():
    (found,) = networks(mlp(6, 5, 4, 3), data=torch.randn(4, 6))
    (trunk,), _, _ = cut([found], "2", data=torch.randn(4, 6))
    assert [s.size for s in trunk.spaces] == [5, 4]
    assert [s.size for s in networks(trunk.module, data=torch.randn(4, 6))[0].spaces] == [5]


def test_the_others_are_cut_behind_the_layer_that_is_aligned():
    found = networks(residual((6, 3), (8, 2)), residual((6, 2), (8, 1)))
    trunks, alignment, _ = cut(found, "1.2")
    assert [layers(t) for t in trunks] == [["0.0", "1.0", "1.1", "1.2"], ["0.0", "1.0", "1.1"]]
    whole = align_networks(found, Calibration(images()))
    again = cut_networks(found, whole, 0, "1.2")[1]
    assert [s.slots for s in again.segments] == [s.slots for s in alignment.segments]
    assert [s.slots for s in whole.segments[: len(again.segments)]] == [
        s.slots for s in again.segments
    ]


def test_an_alignment_is_cut_in_the_middle_of_a_segment_with_its_costs():
    found = networks(stages([4, 4, 4]), stages([4, 4]))
    whole = align_networks(found, Calibration(images()))
    _, alignment, _ = cut_networks(found, whole, 1, "0.0")
    (segment,) = alignment.segments
    assert segment.slots == (("0.0.0",), ("0.0.0",)) and len(segment.costs[1]) == 1
    assert segment.cost_of(1, 0) == whole.segments[0].cost_of(1, 0)


def test_a_module_stands_for_its_last_layer():
    (found,) = networks(residual((6, 2), (8, 1)))
    (by_module,), _, _ = cut([found], "1")
    assert layers(by_module) == ["0.0", "1.0", "1.1"]


def test_what_lies_behind_the_cut_need_not_pair():
    found = networks(stages([5, 6], hidden=(9, 4)), stages([5, 6, 6]))
    with pytest.raises(PairingError):
        cut(found, None)
    trunks, _, heads = cut(found, "0.0")
    assert len(trunks) == len(heads) == 2


class Sized(nn.Module):
    """Reads the batch size of its input, or of an early value, at the very end."""

    def __init__(self, early):
        super().__init__()
        self.a, self.b, self.fc = conv(3, 4), conv(4, 4), nn.Linear(256, 3)
        self.early = early

    def forward(self, x):
        y = self.a(x)
        count = (y if self.early else x).shape[0]
        return self.fc(self.b(y).view(count, -1))


def test_a_head_may_read_the_sizes_of_the_input():
    net = randomise(Sized(early=False))
    (trunk,), _, (head,) = cut(networks(net), "b")
    x = images()
    assert head.inputs == (0,)
    whole = outputs(head.module.eval(), outputs(trunk.module.eval(), x), x)
    assert torch.allclose(whole, outputs(net, x), atol=1e-5)
    assert [n.op for n in trunk.module.graph.nodes].count("call_function") == 0


def test_a_head_that_reads_an_earlier_value_is_refused():
    found = networks(Sized(early=True))
    with pytest.raises(PairingError, match="second value"):
        cut(found, "b")
    assert cut(found, None)


class Halved(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(4, 3)

    def forward(self, x):
        left, right = torch.relu(self.a(x)).chunk(2, -1)
        return self.b(left * right)


def test_a_node_of_several_tensors_is_no_place_to_cut():
    (found,) = networks(Halved(), data=torch.randn(4, 6))
    assert cut([found], "a", data=torch.randn(4, 6))
    split = next(n.name for n in found.module.graph.nodes if n.target == "chunk")
    from fxfuse.fusion._cut import _head

    with pytest.raises(PairingError, match="several tensors"):
        _head(found, split)


def test_wrong_places_are_refused_with_the_right_ones():
    found = networks(residual((6, 3), (8, 1)), residual((6, 1), (8, 1)))
    for after, words in (("nope", "is not a layer"), ("3.fc", "is the last layer")):
        with pytest.raises(ArgumentError, match=words) as caught:
            cut(found, after)
        assert "1.0, 1.1, 1.2, 2.0" in caught.value.expected
    with pytest.raises(ArgumentError, match="net 1 does not have") as caught:
        cut(found, "1.1")
    assert caught.value.expected.endswith("0.0, 1.0")
    with pytest.raises(ArgumentError, match="fewer than two layers"):
        cut(networks(nn.Linear(6, 3), data=torch.randn(4, 6)), None)


def test_an_alignment_of_other_networks_is_refused():
    found = networks(residual((6, 3), (8, 1)), residual((6, 1), (8, 1)))
    other = align_networks(networks(*[stages([5, 6], [7])] * 2), Calibration(images()))
    with pytest.raises(ArgumentError, match="alignment"):
        cut_networks(found, other, 0, "1.0")
