"""Runs at rest: what comes back is what went, shared memory stays shared, space is used again."""

import weakref

import pytest
import torch
from hypothesis import given
from torch import nn

from fxfuse.calibration.data import Calibration
from fxfuse.calibration.run import Frontier, Run, Track, batch_size, record, walk
from fxfuse.errors import DataError
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.nets import NETS, build, mlp, outputs, random_nets, randomise, residual
from tests.support.nets import values as values_of


def network_of(net, x):
    return Network.of("net", trace(net), (x[:2],))


def track(net, x, budget, size=4, samples=None):
    one, frontier = network_of(net, x), Frontier(budget)
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
    run = Run(network_of(net, x), (x,))
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


def network(net, x, name="net"):
    return Network.of(name, trace(net), (x,))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and (not isinstance(a, tuple) or all(map(same, a, b)))


@given(random_nets())
def test_a_walk_visits_every_node_with_the_value_of_the_forward(net):
    x = torch.randn(2, 3, 8, 8)
    one, seen = network(net, x), {}
    walk([one], (x,), lambda node, values: seen.update({node.name: values[0]}))
    expected = values_of(one.module, x)
    assert list(seen) == list(expected)
    assert all(same(seen[name], value) for name, value in expected.items())


def test_networks_of_different_widths_advance_together():
    x = torch.randn(4, 3, 8, 8)
    nets = [randomise(residual((w, 2), (2 * w, 1), stem=w), w) for w in (4, 6)]
    networks, seen = [network(n, x) for n in nets], {}
    walk(networks, (x,), lambda node, values: seen.update({node.name: list(values)}))
    for k, one in enumerate(networks):
        for name, value in values_of(one.module, x).items():
            assert same(seen[name][k], value)
    assert torch.equal(seen["output"][1], outputs(nets[1], x))


def test_a_walk_is_in_eval_mode_and_needs_no_gradients():
    x, seen = torch.randn(4, 6), []
    one = network(randomise(mlp(6, 8, 3, norm=True, act=lambda: nn.Dropout(0.9))), x)
    one.module.train()
    state = {k: t.clone() for k, t in one.module.state_dict().items()}
    for _ in range(2):
        walk([one], (x,), lambda node, values: seen.append(values[0]))
    assert torch.equal(seen[len(seen) // 2 - 1], seen[-1])
    assert not seen[-1].requires_grad
    assert all(torch.equal(t, state[k]) for k, t in one.module.state_dict().items())


def test_recording_stops_behind_the_last_node_wanted():
    class Stop(nn.Module):
        def forward(self, x):
            raise AssertionError("this was not to be run")

    x = torch.randn(2, 6)
    one = network(mlp(6, 8, 7, 3), x)
    setattr(one.module, "4", Stop())
    assert list(record(one, (x,), dict.fromkeys(["_2", "_1"], torch.clone))) == ["_1", "_2"]


def test_recording_in_parts_gives_the_values_of_the_whole_batch():
    x = torch.randn(300, 6)  # more than is run at a time
    one = network(randomise(mlp(6, 8, 7, 3)), x)
    found, whole = (
        record(one, (x,), dict.fromkeys(["_1", "_2"], torch.clone)),
        values_of(one.module, x),
    )
    assert all(torch.allclose(found[n], whole[n], atol=1e-6) for n in ("_1", "_2"))


def test_recording_reduces_the_named_values_only():
    net, x = build("plain")
    one = network(net, x)
    found = record(one, (x,), dict.fromkeys(["_2", "_1"], lambda value: tuple(value.shape)))
    assert found == {"_1": (2, 8), "_2": (2, 7)}
    assert record(one, (x,), dict.fromkeys([], pytest.fail)) == {}


def test_a_network_may_get_a_batch_of_another_size_than_its_example():
    net, x = build("residual")
    larger = torch.randn(7, *x.shape[1:])
    found = record(network(net, x), (larger,), dict.fromkeys(["_3_fc"], lambda value: value))
    assert torch.allclose(found["_3_fc"], outputs(net, larger))


# --- bypass ---------------------------------------------------------------------------------------


def test_bypassed_nodes_are_not_run_and_hand_on_their_entry():
    """A layer that one network lacks: the carriers hold the entry's value, the others nothing."""
    x, seen = torch.randn(2, 6), {}
    full = network(randomise(mlp(6, 8, 8, 3)), x)
    lacking = network(randomise(mlp(6, 8, 8, 3), 1), x)
    setattr(lacking.module, "2", nn.Identity())  # would be seen if it ran: it is not even asked
    getattr(lacking.module, "2").register_forward_hook(lambda *_: pytest.fail("it ran"))
    bypass = [{}, {"_2": ("_1", False), "_3": ("_1", True)}]
    walk([full, lacking], (x,), lambda n, values: seen.update({n.name: list(values)}), bypass)
    assert seen["_2"][1] is None
    assert seen["_3"][1] is seen["_1"][1]
    with torch.no_grad():
        assert torch.equal(seen["_4"][1], lacking.module.get_submodule("4")(seen["_1"][1]))
    assert torch.equal(seen["output"][0], outputs(full.module, x))


def test_several_bypassed_layers_may_follow_each_other():
    x, seen = torch.randn(2, 6), {}
    one = network(randomise(mlp(6, 8, 8, 8, 3)), x)
    bypass = {n: ("_1", True) for n in ("_2", "_3", "_4", "_5")}
    walk([one], (x,), lambda n, values: seen.update({n.name: values[0]}), [bypass])
    assert all(seen[n] is seen["_1"] for n in bypass)
    with torch.no_grad():
        assert torch.equal(seen["_6"], one.module.get_submodule("6")(seen["_1"]))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "live"), [(lambda: mlp(6, *[8] * 20, 3), 2), (lambda: residual((6, 8)), 3)]
)
def test_only_the_frontier_is_held(make, live):
    net = randomise(make())
    x = torch.randn(2, 6) if isinstance(net[0], nn.Linear) else torch.randn(2, 3, 8, 8)
    one = network(net, x)
    run, most = Run(one, (x,)), 0
    with torch.no_grad():
        for node in one.module.graph.nodes:
            run.step(node)
            most = max(most, len(run.env))
    assert most <= live


@pytest.mark.parametrize("name", sorted(set(NETS) - {"shuffle", "tokens", "states"}))
def test_values_die_once_nothing_reads_them(name):
    """Of networks without views, which hold the value they look into."""
    net, x = build(name)
    one, alive, done = network(net, x), {}, set()
    readers = {n.name: {u.name for u in n.users} for n in one.module.graph.nodes}

    def visit(node, values):
        for old, value in alive.items():
            assert value() is None or not readers[old] <= done, f"{old} is held at {node.name}"
        done.add(node.name)
        if isinstance(values[0], torch.Tensor) and node.op == "call_module":
            alive[node.name] = weakref.ref(values[0])

    walk([one], (x,), visit)
    assert len(alive) >= 3


def test_a_run_can_be_asked_for_a_live_value():
    net, x = build("plain")
    one = network(net, x)
    run, nodes = Run(one, (x,)), list(one.module.graph.nodes)
    with torch.no_grad():
        for node in nodes[:2]:
            run.step(node)
        assert torch.equal(run.value_of("_0"), one.module.get_submodule("0")(x))


# --- batches --------------------------------------------------------------------------------------


def test_batches_fit_the_budget_for_the_largest_value():
    net = randomise(mlp(6, 100, 3))
    one = network(net, torch.randn(2, 6))
    assert batch_size([one], 4 * 100 * 12, 1000) == 12
    assert batch_size([one], 4 * 100 * 12, 5) == 5
    assert batch_size([one], 1, 1000) == 1
    assert batch_size([one], 1, 1000, least=8) == 8
    wide = network(randomise(mlp(6, 400, 3)), torch.randn(4, 6))
    assert batch_size([one, wide], 4 * 400 * 3, 1000) == 3


def test_a_batch_that_is_refused_names_node_and_network():
    net, x = build("plain")
    with pytest.raises(DataError, match="refuses") as caught:
        record(
            network(net, x, "net 3"),
            (torch.zeros(2, 5),),
            dict.fromkeys(["_4"], lambda value: value),
        )
    assert caught.value.where == "node '_0' of net 3"
