"""Graphs without checks and with nested concatenations compute the same."""

import pytest
import torch
from torch import nn

from fxfuse.graph.canonical import canonical
from fxfuse.graph.trace import trace
from tests.support.nets import conv, gap, outputs, randomise

IMAGES = torch.randn(2, 3, 8, 8)


class Dense(nn.Module):
    """Layers that each read all earlier ones, from a list that grows."""

    def __init__(self, layers=3, act=torch.relu):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(3 + 2 * i), nn.ReLU(), nn.Conv2d(3 + 2 * i, 2, 3, 1, 1))
            for i in range(layers)
        )
        self.act = act

    def forward(self, x):
        seen = [x]
        for layer in self.layers:
            seen.append(layer(self.act(torch.cat(seen, 1))))
        return torch.cat(seen, 1)


def joins(graph):
    return [n for n in graph.graph.nodes if n.target in (torch.cat, torch.concat)]


def test_a_stream_that_grows_is_concatenated_piece_by_piece():
    net = randomise(Dense(), 1)
    graph = canonical(trace(net), (IMAGES,))
    assert gap(net, graph, IMAGES) == 0
    assert [len(n.args[0]) for n in joins(graph)] == [2, 2, 2]
    first, second, third = joins(graph)
    assert second.args[0][0] is first and third.args[0][0] is second


def test_concatenations_along_other_axes_or_of_other_parts_stay():
    class Other(nn.Module):
        def forward(self, x):
            a, b = torch.cat([x, x * 2], 1), torch.cat([x, x * 2, x], 2)
            return a.sum() + b.sum() + torch.cat([x * 3, x, x], 1).sum()

    graph = canonical(trace(Other()), (IMAGES,))
    assert [len(n.args[0]) for n in joins(graph)] == [2, 3, 3]


def in_place(x):
    return x.mul_(2)


@pytest.mark.parametrize(
    "act",
    [in_place, torch.relu_, nn.ReLU(inplace=True), lambda x: torch.relu_(x.view(-1)).view_as(x)],
)
def test_a_concatenation_that_is_written_to_is_not_read_again(act):
    net = randomise(Dense(act=act), 2)
    expected = outputs(net, IMAGES.clone())
    graph = canonical(trace(net), (IMAGES.clone(),))
    assert torch.equal(outputs(graph, IMAGES.clone()), expected)


def test_parts_that_are_written_to_in_between_are_concatenated_anew():
    class Rewritten(nn.Module):
        def forward(self, x):
            y, z = x * 2, x * 3
            first = torch.cat([y, z], 1)
            y.add_(1)
            return first.sum() + torch.cat([y, z, x], 1)

    graph = canonical(trace(Rewritten()), (IMAGES,))
    assert torch.allclose(graph(IMAGES), Rewritten()(IMAGES))
    assert [len(n.args[0]) for n in joins(graph)] == [2, 3]


def test_assertions_and_what_only_they_need_are_dropped():
    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv(3, 4)

        def forward(self, x):
            torch._assert(x.dim() == 4, "four axes")
            torch._assert(x.shape[1] == 3, "three channels")
            return self.a(x).view(x.size(0), -1)

    graph = canonical(trace(Checked()), (IMAGES,))
    asked = [n.name for n in graph.graph.nodes if n.op in ("call_function", "call_method")]
    assert asked == ["size", "view"]


def test_a_step_that_writes_in_place_and_has_no_reader_stays():
    class Written(nn.Module):
        def forward(self, x):
            y = x * 1
            y.add_(1)
            y += 2
            return y

    graph = canonical(trace(Written()), (IMAGES,))
    assert torch.allclose(graph(IMAGES), IMAGES + 3)
