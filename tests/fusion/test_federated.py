"""Aggregation of what federated clients send."""

import numpy as np
import pytest
import torch
from torch import nn

from fxfuse import presets
from fxfuse.errors import ArgumentError
from fxfuse.fusion import Aggregation
from fxfuse.fusion.federated import arrays_of, load_arrays
from tests.support.nets import gap, mlp, randomise
from tests.support.tolerances import FUNCTION

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def test_clients_of_unlike_networks_are_fused_by_their_sample_counts():
    kinds = [mlp(6, 8, 3), mlp(6, 5, 4, 3)]
    clients = [
        randomise(mlp(6, 8, 3), 1),
        randomise(mlp(6, 5, 4, 3), 2),
        randomise(mlp(6, 8, 3), 3),
    ]
    sent = [(arrays_of(net), count) for net, count in zip(clients, (70, 10, 20))]
    server = Aggregation(kinds, X)
    fused = server.fused(sent)
    assert fused.meta["fxfuse"].weights == (0.7, 0.1, 0.2)
    assert gap(presets.fedma(clients, X, weights=[7, 1, 2]), fused, X) < FUNCTION
    for ours, theirs in zip(server(sent), fused.state_dict().values()):
        assert isinstance(ours, np.ndarray) and np.array_equal(ours, theirs.numpy())


def test_what_the_server_returns_loads_into_the_clients_class():
    nets = [randomise(mlp(6, 8, 3, norm=True), seed) for seed in (1, 2)]
    server = Aggregation([mlp(6, 8, 3, norm=True)], X, method="average")
    global_net = mlp(6, 8, 3, norm=True).eval()
    load_arrays(global_net, server([(arrays_of(net), 5) for net in nets]))
    assert gap(server.fused([(arrays_of(net), 5) for net in nets]), global_net, X) < FUNCTION
    assert server.models[0].state_dict()["1.num_batches_tracked"] == 0  # nothing is modified


@pytest.mark.parametrize("method", [presets.best, presets.hmt])
def test_methods_options_and_counts_reach_the_fusion(method):
    kinds = [mlp(6, 8, 8, 3), mlp(6, 5, 3)]
    sent = [(arrays_of(randomise(net, k)), 1) for k, net in enumerate(kinds)]
    if method is presets.hmt:  # whose transfer has no weights
        with pytest.raises(ArgumentError, match="weights of a transfer"):
            Aggregation(kinds, X, method=method)(sent)
        return
    server = Aggregation(kinds, X, method=method, options={"anchor": 1})
    assert server(sent)[0].shape == (5, 6)


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ([], "no results"),
        ([(arrays_of(mlp(6, 8, 3)), -1)], "sample counts"),
        ([(arrays_of(mlp(6, 7, 3)), 1)], "no model"),
        ([(arrays_of(nn.Linear(6, 3)), 1)], "no model"),
    ],
)
def test_results_that_cannot_be_used_are_refused(results, said):
    with pytest.raises(ArgumentError, match=said):
        Aggregation([mlp(6, 8, 3)], X)(results)


def test_one_client_alone_keeps_its_network():
    net = randomise(mlp(6, 8, 3), 1)
    arrays = Aggregation([net], X)([(arrays_of(net), 3)])
    assert all(map(np.array_equal, arrays, arrays_of(net)))
