"""Recurrent modules of several layers are taken apart and put together."""

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.graph.recurrent import depths_of, put_together, take_apart
from fxfuse.graph.trace import trace
from tests.support.nets import gap, randomise
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION

X = torch.randn(40, 4, 5, generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    """A recurrent module, and what reads its outputs or its last states."""

    def __init__(self, kind, depth, width=6, read="outputs", both=False, zeros=False, **options):
        super().__init__()
        self.rnn = kind(5, width, depth, bidirectional=both, **{"batch_first": True, **options})
        self.read, self.zeros, self.ways = read, zeros, 1 + both
        self.fc = nn.Linear(width * self.ways, 3)

    def forward(self, x):
        first = self.rnn.batch_first
        x = x if first else x.transpose(0, 1)
        states = ()
        if self.zeros:
            h = torch.zeros(self.rnn.num_layers * self.ways, x.shape[0], self.rnn.hidden_size)
            states = ((h, h) if isinstance(self.rnn, nn.LSTM) else h,)
        out, h = self.rnn(x, *states)
        h = h[0] if isinstance(h, tuple) else h
        if self.read == "outputs":
            return self.fc(out[:, -1] if first else out[-1])
        if self.read == "all states":
            return self.fc(h.mean(0))
        if self.ways == 2:
            return self.fc(torch.cat((h[-2, :, :], h[-1]), dim=1))
        return self.fc(h[self.rnn.num_layers - 1])


WAYS = {
    "outputs": {},
    "states": {"read": "states", "batch_first": False},
    "states of both directions": {"read": "states", "both": True},
    "given zeros, no biases, dropout": {"zeros": True, "bias": False, "dropout": 0.1},
}


@pytest.mark.filterwarnings("ignore:dropout option")
@pytest.mark.parametrize("kind", some([nn.LSTM, nn.GRU, nn.RNN], nn.GRU))
@pytest.mark.parametrize("way", WAYS)
def test_layers_compute_what_their_module_did_apart_and_together(kind, way):
    net = randomise(Reader(kind, 3, **WAYS[way]), 1)
    module = trace(net, X)
    take_apart(module, (X,))
    assert depths_of(module) == [1, 1, 1]
    assert gap(net, module, 2 * X) < FUNCTION
    put_together(module)
    assert depths_of(module) == [3] and gap(net, module, 2 * X) < FUNCTION
    net.load_state_dict(module.state_dict())
    assert str(module.rnn) == str(net.rnn)


@pytest.mark.filterwarnings("ignore:dropout option")
@pytest.mark.parametrize("kind", some([nn.LSTM, nn.GRU, nn.RNN], nn.LSTM))
@pytest.mark.parametrize("way", some(WAYS, "states of both directions"))
@pytest.mark.parametrize("first, second", some([(3, 1), (1, 2), (2, 3)], (1, 2)))
def test_networks_of_unlike_depth_fuse_into_a_module_of_the_deeper_one(kind, way, first, second):
    depths = (first, second)
    nets = [randomise(Reader(kind, d, 6 - i, **WAYS[way]), i) for i, d in enumerate(depths)]
    deep = max(nets, key=lambda net: net.rnn.num_layers)
    fused = fxfuse.fuse(nets, X, weights=[net is deep for net in nets], anchor=nets.index(deep))
    assert gap(deep, fused, 2 * X) < FUNCTION
    deep.load_state_dict(fxfuse.fuse(nets, X, anchor=nets.index(deep)).state_dict())


def test_two_modules_are_two_again():
    class Two(nn.Module):
        def __init__(self, *depths):
            super().__init__()
            self.a, self.b = nn.GRU(5, 5, depths[0]), nn.GRU(5, 5, depths[1])
            self.fc = nn.Linear(5, 2)

        def forward(self, x):
            return self.fc(self.b(self.a(x)[0])[0])

    module = trace(randomise(Two(2, 3), 1), X)
    take_apart(module, (X,))
    put_together(module)
    assert depths_of(module) == [2, 3]


def test_what_is_read_of_all_states_or_starts_from_others_is_left_whole():
    class Started(Reader):
        def forward(self, x):
            return self.fc(self.rnn(x, x[:2, :, :1].repeat(1, 10, 6).contiguous())[0])

    for net in (Reader(nn.GRU, 2, read="all states"), Started(nn.GRU, 2)):
        module = trace(net, X)
        take_apart(module, (X,))
        assert depths_of(module) == [2]
