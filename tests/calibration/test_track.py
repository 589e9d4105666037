"""Networks from stop to stop: they give what the network gives, wherever their values wait."""

import pytest
import torch
from torch import nn

from fxfuse.calibration.data import Calibration
from fxfuse.calibration.spill import SpillStore
from fxfuse.calibration.track import Track
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.nets import mlp, outputs, randomise, residual


def track_of(net, x, budget, size=4, samples=None):
    network, store = Network.of("net", trace(net), (x[:2],)), SpillStore(budget)
    order = list(network.module.graph.nodes)
    return Track(network, Calibration(x), samples or len(x), size, order, store), store


@pytest.mark.parametrize("budget", [0, 1 << 12, 1 << 30])
@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_track_gives_what_the_network_gives(budget, step):
    net, x = randomise(residual((6, 2), (8, 1))), torch.randn(10, 3, 8, 8)
    track, store = track_of(net, x, budget, samples=9)
    end, last = len(track.order), {}
    with torch.no_grad(), store:
        for stop in [*range(0, end, step), end]:
            for batch in range(len(track.sizes)):
                _, value = track.go(batch, stop)
                last[batch] = value if value is not None else last.get(batch)
                track.rest(batch)
    assert track.sizes == [4, 4, 1]
    expected = [outputs(net, part) for part in x[:9].split(4)]
    assert all(torch.equal(last[i], part) for i, part in enumerate(expected))


def test_nodes_on_the_way_are_shown_with_their_values():
    net, x = randomise(mlp(6, 8, 3)), torch.randn(4, 6)
    track, store = track_of(net, x, 0)
    seen = []
    with torch.no_grad(), store:
        track.go(0, len(track.order), lambda node, value: seen.append(node))
    assert seen == track.order


class Shared(nn.Module):
    """Writes over a value through a view of it, and reads a parameter by name."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        x = x + 1.0
        view = x.view(-1, 2, 3).transpose(1, 2)
        tail = x[:, 4:]
        view.mul_(2.0)
        return x * self.scale + view.reshape(-1, 6), tail


@pytest.mark.parametrize("stop", range(1, 9))
def test_values_that_share_memory_share_it_after_a_stop(stop):
    net, x = Shared(), torch.randn(3, 6)
    track, store = track_of(net, x, 0)
    with torch.no_grad(), store:
        track.go(0, stop)
        track.rest(0)
        run, _ = track.go(0, stop)
        if "scale" in [n.name for n in run.env]:
            assert run.value_of("scale") is run.network.module.scale  # not a copy that goes stale
        track.rest(0)
        _, value = track.go(0, len(track.order))
    assert all(torch.equal(a, b) for a, b in zip(value, outputs(net, x)))


def test_room_in_the_file_is_used_again():
    net, x = randomise(mlp(6, 8, 8, 8, 3)), torch.randn(8, 6)
    track, store = track_of(net, x, 0)
    sizes = []
    with torch.no_grad(), store:
        for stop in range(1, len(track.order)):
            for batch in range(2):
                track.go(batch, stop)
                track.rest(batch)
            sizes.append(store._file.seek(0, 2))
    assert max(sizes) <= 2 * 4 * 4 * (6 + 8 + 3)  # one place for each size and batch
