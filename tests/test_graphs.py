"""Networks on graphs: plain message passing, and PyTorch Geometric where it is installed."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse import presets
from fxfuse.calibration import Calibration
from fxfuse.errors import DataError, TraceError
from fxfuse.graph.trace import trace
from tests.support.graphs import CLASSES, FEATURES, PLAIN, Means, Messages, Sums, graph, inputs
from tests.support.nets import gap, randomise
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION, PERMUTATION


def data_of(name):
    return [inputs(name, seed, nodes) for seed, nodes in enumerate((12, 20, 9, 15, 30))]


def other(name):
    return inputs(name, 7, 19)


@pytest.mark.parametrize("name", some(PLAIN, "Products"))
def test_units_are_free_whatever_passes_the_messages(name):
    net = randomise(PLAIN[name](2, 8), 1)
    spaces = fxfuse.find_spaces(net, inputs(name))
    assert sorted(s.size for s in spaces) == [8, 8]
    moved = fxfuse.permute(net, inputs(name), seed=2)
    assert gap(net, moved, *other(name)) < PERMUTATION
    assert not torch.equal(moved.state_dict()["out.weight"], net.out.weight)


@pytest.mark.parametrize("name", some(PLAIN, "Maxima"))
def test_a_permuted_copy_comes_back_and_other_widths_fuse(name):
    net, x = randomise(PLAIN[name](2, 8), 1), inputs(name)
    fused = fxfuse.fuse([net, fxfuse.permute(net, x, seed=2)], data_of(name))
    assert gap(net, fused, *other(name)) < FUNCTION
    narrow = randomise(PLAIN[name](2, 5), 2)
    fused = fxfuse.fuse([net, narrow], data_of(name))
    near = fused.meta["fxfuse"].nearness
    assert near.fused < max(near.networks)
    alone = fxfuse.fuse([net, narrow], data_of(name), weights=[1, 0], anchor=0)
    assert gap(net, alone, *other(name)) < FUNCTION


@pytest.mark.parametrize("method", some(sorted(presets.NAMED)))
def test_one_graph_is_data_enough_for_every_method(method):
    nets = [randomise(Sums(2, 8), seed) for seed in (1, 2)]
    x = graph(40)
    fused = fxfuse.fuse(nets, x, method=method)
    assert fused(*other("Sums")).shape == (19, CLASSES)


def test_networks_of_two_depths_fuse():
    nets = [randomise(Means(3, 6), 1), randomise(Means(2, 8), 2)]
    fused = fxfuse.fuse(nets, data_of("Means"))
    near = fused.meta["fxfuse"].nearness
    assert near.fused < max(near.networks)


# --- batches that are one sample ------------------------------------------------------------------


def test_a_batch_that_is_one_sample_is_neither_cut_nor_joined():
    data = Calibration(data_of("Sums"), models=[Sums()])
    assert data.whole and data.samples == 5
    assert [len(x) for x, _ in data.chunks(64)] == [12, 20, 9, 15, 30]
    assert [len(x) for x, _ in data.first(2).chunks(1)] == [12, 20]
    rest, held = data.parted(4)
    assert [len(x) for x, _ in held.own(3)] == [15] and rest.samples == 4
    assert Calibration(data_of("Sums"), models=[Sums()], limit=3).samples == 3


def test_models_say_whether_a_batch_can_be_cut():
    assert Calibration(graph(12)[0], models=[PLAIN["Known"]()]).whole
    assert not Calibration(graph(12)[0], models=[nn.Linear(FEATURES, 3)]).whole
    x = torch.randn(12, FEATURES)
    assert Calibration(x, models=[nn.Linear(FEATURES, 3)], whole=True).samples == 1


def test_tensors_of_unequal_lengths_that_no_model_takes_are_refused():
    class Both(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(DataError, match=r"inputs of \[12, 5\] samples"):
        Calibration((torch.randn(12, 3), torch.randn(5, 3)), models=[Both()])


# --- PyTorch Geometric ----------------------------------------------------------------------------

GEOMETRIC = ["GCN", "SAGE", "SAGEmax", "GAT", "GIN", "mean pool", "add pool", "max pool"]


def geometric(name, depth, width):
    """A network of PyTorch Geometric; skips the test if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        G = pytest.importorskip("torch_geometric.nn")
    make = {
        "SAGE": lambda i, o: G.SAGEConv(i, o),
        "SAGEmax": lambda i, o: G.SAGEConv(i, o, aggr="max"),
        "GAT": lambda i, o: G.GATConv(i, o // 2, heads=2),
        "GIN": lambda i, o: G.GINConv(nn.Sequential(nn.Linear(i, o), nn.ReLU(), nn.Linear(o, o))),
    }.get(name, lambda i, o: G.GCNConv(i, o))
    pools = {"mean pool": G.global_mean_pool, "add pool": G.global_add_pool}
    pool = {**pools, "max pool": G.global_max_pool}.get(name)

    class Net(Messages):
        def __init__(self):
            super().__init__(depth, width)
            self.layers = nn.ModuleList(make(width if i else FEATURES, width) for i in range(depth))

        def forward(self, x, edges, graph=None):
            for layer in self.layers:
                x = F.relu(layer(x, edges))
            return self.out(x if pool is None else pool(x, graph))

    return Net()


@pytest.mark.parametrize("name", some(GEOMETRIC, "GCN"))
def test_networks_of_pytorch_geometric(name):
    net = randomise(geometric(name, 2, 8), 1)
    kind = "Pooled" if "pool" in name else "Sums"
    x, new = inputs(kind), other(kind)
    spaces = fxfuse.find_spaces(net, x)
    assert {s.size for s in spaces} == {4 if name == "GAT" else 8}
    fused = fxfuse.fuse([net, fxfuse.permute(net, x, seed=2)], data_of(kind))
    assert gap(net, fused, *new) < FUNCTION
    fused = fxfuse.fuse([net, randomise(geometric(name, 2, 6), 2)], data_of(kind))
    near = fused.meta["fxfuse"].nearness
    assert near.fused < max(near.networks)


def test_a_number_of_nodes_that_became_a_constant_is_no_graph_of_the_network():
    class Fixed(Sums):
        def received(self, h, edges):
            source, target = edges
            count = int(h.shape[0])  # which is a number when the graph is recorded
            return torch.zeros(count, h.shape[1]).index_add(0, target, h[source])

    with pytest.raises(TraceError):
        trace(randomise(Fixed(1, 8)), graph(12))
