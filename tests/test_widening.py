import numpy as np
import torch
from conftest import FUNCTION
from hypothesis import given
from hypothesis import strategies as st
from nets import Concat, Pooled, conv, gap, randomise
from torch import nn

from fxfuse.network import Network
from fxfuse.tracing import trace
from fxfuse.widening import Room, _find

IMAGES = torch.randn(4, 3, 8, 8)


def network(layers=2, width=4, growth=2, seed=1):
    dense = [Concat(width + i * growth, growth) for i in range(layers)]
    last = width + layers * growth
    net = nn.Sequential(conv(3, width), *dense, nn.BatchNorm2d(last), Pooled(last, 3))
    return Network.of("net", trace(randomise(net, seed)), (IMAGES,))


@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 5))
def test_new_places_lie_behind_the_stream_and_are_read_with_zeros(layers, at, count):
    found = network(layers)
    nodes = ["_0_2", *[f"cat{f'_{i}' if i else ''}" for i in range(layers)]]
    node = nodes[min(at, layers)]
    edited = trace(found.module)
    room = Room(found)
    before = room.width(node)
    assert room.add(edited, node, count)
    assert room.width(node) == before + count
    head = edited.get_submodule(str(layers + 2)).fc.weight
    assert head.shape[1] == 4 + 2 * layers + count
    assert not head[:, before : before + count].any()
    rest = torch.cat([head[:, :before], head[:, before + count :]], 1)
    assert torch.equal(rest, found.module.get_submodule(str(layers + 2)).fc.weight)


def test_room_made_twice_lies_in_the_order_in_which_it_was_made():
    found = network(2)
    edited, room = trace(found.module), Room(found)
    assert room.add(edited, "cat", 1) and room.add(edited, "cat", 2)
    assert room.width("cat") == 9 and room.width("cat_1") == 11
    assert edited.get_submodule("3").running_mean.shape == (11,)
    assert edited.get_submodule("3").num_features == 11
    assert edited.get_submodule("2").a.get_submodule("0").in_channels == 9


def test_what_lies_before_the_stream_is_left_alone():
    found = network(2)
    edited, room = trace(found.module), Room(found)
    room.add(edited, "cat", 3)
    for name, tensor in found.module.state_dict().items():
        if name.startswith(("0.", "1.")):
            assert torch.equal(edited.state_dict()[name], tensor)


def test_the_widened_network_computes_the_same_with_anything_in_the_new_places():
    found = network(1)
    edited, room = trace(found.module), Room(found)
    room.add(edited, "cat", 2)

    class Fed(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Sequential(
                *[found.module.get_submodule(n) for n in ("0.0", "0.1", "0.2")]
            )
            self.inside = found.module.get_submodule("1.a.0"), found.module.get_submodule("1.a.1")
            self.norm, self.head = edited.get_submodule("2"), edited.get_submodule("3").fc

        def forward(self, x):
            x = self.before(x)
            y = torch.relu(self.inside[1](self.inside[0](x)))
            x = torch.cat([x, y, torch.randn(4, 2, 8, 8)], 1)
            return self.head(self.norm(x).mean((2, 3)))

    assert gap(found.module, Fed().eval(), IMAGES) <= FUNCTION


def test_a_stream_that_cannot_move_gets_no_room():
    found = network(1)
    assert not Room(found).add(trace(found.module), "x", 2)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 11), st.integers(1, 6))
def test_a_run_is_found_where_it_first_begins(units, start, length):
    units = np.array(units)
    run = units[start : start + length]
    if not len(run):
        return
    at = _find(units, run)
    assert at is not None and at <= start and np.array_equal(units[at : at + len(run)], run)
