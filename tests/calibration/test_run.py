"""Runs: the values of the forward, layers that are not run, and what is held in between."""

import weakref

import pytest
import torch
from hypothesis import given
from torch import nn

from fxfuse.calibration.data import Calibration
from fxfuse.calibration.run import Run, Track, batch_size, record, walk, working_batch
from fxfuse.calibration.spill import SpillStore
from fxfuse.errors import DataError
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.nets import NETS, build, mlp, outputs, random_nets, randomise, residual
from tests.support.nets import values as values_of


def network(net, x, name="net"):
    return Network.of(name, trace(net), (x,))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and (not isinstance(a, tuple) or all(map(same, a, b)))


@given(random_nets())
def test_a_walk_visits_every_node_with_the_value_of_the_forward(net):
    x = torch.randn(2, 3, 8, 8)
    traced, seen = network(net, x), {}
    walk([traced], (x,), lambda node, values: seen.update({node.name: values[0]}))
    expected = values_of(traced.module, x)
    assert list(seen) == list(expected)
    assert all(same(seen[name], value) for name, value in expected.items())


def test_networks_of_different_widths_advance_together():
    x = torch.randn(4, 3, 8, 8)
    nets = [randomise(residual((w, 2), (2 * w, 1), stem=w), w) for w in (4, 6)]
    networks, seen = [network(n, x) for n in nets], {}
    walk(networks, (x,), lambda node, values: seen.update({node.name: list(values)}))
    for k, traced in enumerate(networks):
        for name, value in values_of(traced.module, x).items():
            assert same(seen[name][k], value)
    assert torch.equal(seen["output"][1], outputs(nets[1], x))


def test_a_walk_is_in_eval_mode_and_needs_no_gradients():
    x, seen = torch.randn(4, 6), []
    traced = network(randomise(mlp(6, 8, 3, norm=True, act=lambda: nn.Dropout(0.9))), x)
    traced.module.train()
    state = {k: t.clone() for k, t in traced.module.state_dict().items()}
    for _ in range(2):
        walk([traced], (x,), lambda node, values: seen.append(values[0]))
    assert torch.equal(seen[len(seen) // 2 - 1], seen[-1])
    assert not seen[-1].requires_grad
    assert all(torch.equal(t, state[k]) for k, t in traced.module.state_dict().items())


def test_recording_stops_behind_the_last_node_that_is_asked_for():
    class Stop(nn.Module):
        def forward(self, x):
            raise AssertionError("this should not run")

    x = torch.randn(2, 6)
    traced = network(mlp(6, 8, 7, 3), x)
    setattr(traced.module, "4", Stop())
    assert list(record(traced, (x,), dict.fromkeys(["_2", "_1"], torch.clone))) == ["_1", "_2"]


def test_recording_in_parts_gives_the_values_of_the_whole_batch():
    x = torch.randn(300, 6)  # more than is run at a time
    traced = network(randomise(mlp(6, 8, 7, 3)), x)
    parts = record(traced, (x,), dict.fromkeys(["_1", "_2"], torch.clone))
    whole = values_of(traced.module, x)
    assert all(torch.allclose(parts[n], whole[n], atol=1e-6) for n in ("_1", "_2"))


def test_recording_reduces_the_named_values_only():
    net, x = build("plain")
    traced = network(net, x)
    shapes = record(traced, (x,), dict.fromkeys(["_2", "_1"], lambda value: tuple(value.shape)))
    assert shapes == {"_1": (2, 8), "_2": (2, 7)}
    assert record(traced, (x,), dict.fromkeys([], pytest.fail)) == {}


def test_a_network_may_get_a_batch_of_another_size_than_its_example():
    net, x = build("residual")
    larger = torch.randn(7, *x.shape[1:])
    values = record(network(net, x), (larger,), {"_3_fc": torch.clone})
    assert torch.allclose(values["_3_fc"], outputs(net, larger))


# --- bypass ---------------------------------------------------------------------------------------


def test_bypassed_nodes_are_not_run_and_stand_for_their_entry():
    """Of a layer that one network lacks, the last node has the entry's value, the others none."""
    x, seen = torch.randn(2, 6), {}
    full = network(randomise(mlp(6, 8, 8, 3)), x)
    lacking = network(randomise(mlp(6, 8, 8, 3), 1), x)
    setattr(lacking.module, "2", nn.Identity())
    getattr(lacking.module, "2").register_forward_hook(lambda *_: pytest.fail("it ran"))
    bypass = [{}, {"_2": ("_1", False), "_3": ("_1", True)}]
    walk([full, lacking], (x,), lambda n, values: seen.update({n.name: list(values)}), bypass)
    assert seen["_2"][1] is None
    assert seen["_3"][1] is seen["_1"][1]
    with torch.no_grad():
        assert torch.equal(seen["_4"][1], lacking.module.get_submodule("4")(seen["_1"][1]))
    assert torch.equal(seen["output"][0], outputs(full.module, x))


def test_bypassed_layers_may_follow_each_other():
    x, seen = torch.randn(2, 6), {}
    traced = network(randomise(mlp(6, 8, 8, 8, 3)), x)
    bypass = {n: ("_1", True) for n in ("_2", "_3", "_4", "_5")}
    walk([traced], (x,), lambda n, values: seen.update({n.name: values[0]}), [bypass])
    assert all(seen[n] is seen["_1"] for n in bypass)
    with torch.no_grad():
        assert torch.equal(seen["_6"], traced.module.get_submodule("6")(seen["_1"]))


class Sized(nn.Module):
    """Reads a size of a value inside a layer, for what comes behind it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        inside = self.b(torch.relu(self.a(x)))
        count = inside.size(0)
        return self.c(x + inside).view(-1, 3)[: count + 0]


def test_what_is_made_of_a_value_that_is_not_computed_is_not_run_either():
    traced, x, seen = network(randomise(Sized()), torch.randn(2, 6)), torch.randn(2, 6), {}
    bypass = {n: ("x", n == "add") for n in ("a", "relu", "b", "add")}
    walk([traced], (x,), lambda n, values: seen.update({n.name: values[0]}), [bypass])
    assert seen["size"] is None and seen["c"] is not None
    assert seen["output"] is None


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "live"), [(lambda: mlp(6, *[8] * 20, 3), 2), (lambda: residual((6, 8)), 3)]
)
def test_only_the_frontier_is_held(make, live):
    net = randomise(make())
    x = torch.randn(2, 6) if isinstance(net[0], nn.Linear) else torch.randn(2, 3, 8, 8)
    traced = network(net, x)
    run, most = Run(traced, (x,)), 0
    with torch.no_grad():
        for node in traced.module.graph.nodes:
            run.step(node)
            most = max(most, len(run.env))
    assert most <= live


@pytest.mark.parametrize("name", sorted(set(NETS) - {"shuffle", "tokens", "states"}))
def test_values_are_freed_once_nothing_reads_them(name):
    """In networks without views: a view keeps the value that it looks into."""
    net, x = build(name)
    traced, alive, done = network(net, x), {}, set()
    readers = {n.name: {u.name for u in n.users} for n in traced.module.graph.nodes}

    def visit(node, values):
        for old, value in alive.items():
            assert value() is None or not readers[old] <= done, f"{old} is held at {node.name}"
        done.add(node.name)
        if isinstance(values[0], torch.Tensor) and node.op == "call_module":
            alive[node.name] = weakref.ref(values[0])

    walk([traced], (x,), visit)
    assert len(alive) >= 3


def test_a_run_returns_values_that_are_still_to_be_read():
    net, x = build("plain")
    traced = network(net, x)
    run, nodes = Run(traced, (x,)), list(traced.module.graph.nodes)
    with torch.no_grad():
        for node in nodes[:2]:
            run.step(node)
        assert torch.equal(run.value_of("_0"), traced.module.get_submodule("0")(x))


# --- batches --------------------------------------------------------------------------------------


def test_batches_fit_the_budget_for_the_largest_value():
    net = randomise(mlp(6, 100, 3))
    traced = network(net, torch.randn(2, 6))
    assert batch_size([traced], 4 * 100 * 12, 1000) == 12
    assert batch_size([traced], 4 * 100 * 12, 5) == 5
    assert batch_size([traced], 1, 1000) == 1
    assert batch_size([traced], 1, 1000, least=8) == 8
    wide = network(randomise(mlp(6, 400, 3)), torch.randn(4, 6))
    assert batch_size([traced, wide], 4 * 400 * 3, 1000) == 3


def test_a_batch_that_is_refused_names_node_and_network():
    net, x = build("plain")
    with pytest.raises(DataError, match="refuses") as caught:
        record(network(net, x, "net 3"), (torch.zeros(2, 5),), {"_4": torch.clone})
    assert caught.value.where == "node '_0' of net 3"


def test_a_node_can_be_asked_what_it_gives_for_another_value():
    x = torch.randn(2, 6)
    traced = network(randomise(mlp(6, 8, 3)), x)
    run, nodes = Run(traced, (x,)), list(traced.module.graph.nodes)
    with torch.no_grad():
        for node in nodes[:2]:
            run.step(node)
        before, other = run.value_of("_0").clone(), torch.randn(2, 8)
        assert torch.equal(run.apply(nodes[2], nodes[1], other), other.relu())
        assert torch.equal(run.value_of("_0"), before)
        assert torch.equal(run.peek(nodes[2]), before.relu())


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
        track.go(0, len(track.order), lambda run, node, value: seen.append(node))
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


def test_weights_that_outweigh_the_values_are_read_for_more_samples(monkeypatch):
    monkeypatch.setattr("fxfuse.calibration.run.CACHED_BYTES", 1)
    net = randomise(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)))
    small, large = (working_batch([network(net, torch.randn(2, 64, n, n))]) for n in (4, 32))
    assert large == 4 < small
