"""Runs at rest: what comes back is what went, shared memory stays shared, space is used again."""

import pytest
import torch
from nets import mlp, outputs, randomise, residual
from torch import nn

from fxfuse.data import Calibration
from fxfuse.errors import DataError
from fxfuse.frontier import Frontier, Track
from fxfuse.network import Network
from fxfuse.statistics import Run
from fxfuse.tracing import trace


def network(net, x):
    return Network.of("net", trace(net), (x[:2],))


def track(net, x, budget, size=4, samples=None):
    one, frontier = network(net, x), Frontier(budget)
    order = list(one.module.graph.nodes)
    return Track(one, Calibration(x), samples or len(x), size, order, frontier), frontier


@pytest.mark.parametrize("budget", [0, 1 << 12, 1 << 30])
@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_track_gives_what_the_network_gives(budget, step):
    net, x = randomise(residual((6, 2), (8, 1))), torch.randn(10, 3, 8, 8)
    way, frontier = track(net, x, budget, samples=9)
    end, found = len(way.order), {}
    with torch.no_grad(), frontier:
        for stop in [*range(0, end, step), end]:
            for batch in range(len(way.sizes)):
                _, value = way.go(batch, stop)
                found[batch] = value if value is not None else found.get(batch)
                way.rest(batch)
    assert way.sizes == [4, 4, 1]
    expected = [outputs(net, part) for part in x[:9].split(4)]
    assert all(torch.equal(found[i], part) for i, part in enumerate(expected))


def test_nodes_on_the_way_are_shown_with_their_values():
    net, x = randomise(mlp(6, 8, 3)), torch.randn(4, 6)
    way, frontier = track(net, x, 0)
    seen = []
    with torch.no_grad(), frontier:
        way.go(0, len(way.order), lambda node, value: seen.append(node))
    assert seen == way.order


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
def test_values_that_share_memory_share_it_afterwards(stop):
    net, x = Shared(), torch.randn(3, 6)
    way, frontier = track(net, x, 0)
    with torch.no_grad(), frontier:
        way.go(0, stop)
        way.rest(0)
        run, _ = way.go(0, stop)
        if "scale" in [n.name for n in run.env]:
            assert run.value_of("scale") is run.network.module.scale  # not a copy that goes stale
        way.rest(0)
        _, value = way.go(0, len(way.order))
    assert all(torch.equal(a, b) for a, b in zip(value, outputs(net, x)))


def test_the_place_of_what_was_read_is_used_again():
    net, x = randomise(mlp(6, 8, 8, 8, 3)), torch.randn(8, 6)
    way, frontier = track(net, x, 0)
    sizes = []
    with torch.no_grad(), frontier:
        for stop in range(1, len(way.order)):
            for batch in range(2):
                way.go(batch, stop)
                way.rest(batch)
            sizes.append(frontier._file.seek(0, 2))
    assert max(sizes) <= 2 * 4 * 4 * (6 + 8 + 3)  # one place for each size and batch


def test_kinds_of_values_come_back_as_they_were():
    net, x = randomise(mlp(6, 8, 3)), torch.randn(4, 6)
    run = Run(network(net, x), (x,))
    node = next(iter(run.module.graph.nodes))
    values = {
        "half": torch.randn(3, 4).half(),
        "complex": torch.randn(3, dtype=torch.complex64),
        "flags": torch.tensor([True, False]),
        "wide": torch.randn(1, 3).expand(4, 3),
        "empty": torch.empty(0, 3),
        "number": torch.tensor(2.5),
        "parts": (torch.arange(3), [torch.ones(2), 7], None),
    }
    run.env = {node: dict(values)}
    with Frontier(0) as frontier:
        frontier.rest(run)
        assert not frontier._storages(run)
        frontier.wake(run)
    back = run.env[node]
    for name in ("half", "complex", "flags", "wide", "empty", "number"):
        assert torch.equal(back[name], values[name]) and back[name].dtype == values[name].dtype
        assert back[name].stride() == values[name].stride()
    parts, [ones, seven], nothing = back["parts"]
    assert torch.equal(parts, torch.arange(3)) and torch.equal(ones, torch.ones(2))
    assert seven == 7 and nothing is None


def test_a_disk_without_room_is_said_to_be_one(monkeypatch):
    class Full:
        def seek(self, *where):
            return 0

        def write(self, raw):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: Full())
    way, frontier = track(randomise(mlp(6, 8, 3)), torch.randn(4, 6), 0)
    with torch.no_grad(), frontier, pytest.raises(DataError, match="No space left"):
        way.go(0, 2)
        way.rest(0)
