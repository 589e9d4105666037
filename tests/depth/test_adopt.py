"""Networks of one function, whatever their spelling: they get one graph and fuse to themselves."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.depth import adopt
from fxfuse.errors import PairingError
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.nets import Pooled, Residual, conv, gap, mlp, random_nets, randomise, stages
from tests.support.respell import WAYS, respelled
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION

IMAGES, VECTORS = torch.randn(64, 3, 8, 8), torch.randn(64, 6)


def network(net, x):
    return Network.of("net", trace(net), (x,))


def assert_same_family(net, other, x):
    """Fused in either order, both give what they compute, with the first one's names."""
    assert gap(net, other, x) <= FUNCTION
    for first, second in ((net, other), (other, net)):
        fused = fxfuse.fuse([first, second], x)
        assert gap(net, fused, x) <= FUNCTION
        state, wanted = fused.state_dict(), trace(first).state_dict()
        assert state.keys() >= wanted.keys()
        assert all(state[name].shape == t.shape for name, t in wanted.items())


NET = nn.Sequential(
    conv(3, 4),
    Residual(4, 4),
    conv(4, 5, norm=False),
    conv(5, 5, norm=False, bias=False),
    nn.ConvTranspose2d(5, 6, 3, padding=1),
    nn.Conv2d(6, 6, 3, padding=1, groups=2),
    nn.ReLU(),
    nn.ConvTranspose2d(6, 6, 3, padding=1, groups=3),
    nn.ReLU(),
    nn.MaxPool2d(2),
    Pooled(6, 3),
)


@pytest.mark.parametrize("way", some(WAYS, *[*WAYS][::3]))
def test_each_spelling_of_a_network_is_one_family_with_it(way):
    net, x = (NET, IMAGES) if way != "reshape" else (stages([4], [5], hidden=(6,)), IMAGES)
    net = randomise(net)
    other = respelled(fxfuse.permute(net, x[:2], seed=1), [way])
    assert [n.name for n in other.graph.nodes] != [n.name for n in trace(net).graph.nodes] or (
        other.state_dict().keys() != net.state_dict().keys()
    )
    assert_same_family(net, other, x)


@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])
@given(random_nets(max_steps=3), st.permutations(sorted(WAYS)), st.integers(0, 99))
def test_a_network_and_a_respelled_copy_fuse_to_the_network(net, ways, seed):
    other = respelled(fxfuse.permute(net, IMAGES[:2], seed=seed), ways[:4], seed)
    fused = fxfuse.fuse([net, other], IMAGES)
    assert gap(net, fused, IMAGES) <= FUNCTION


def test_dropout_of_the_structure_stays_and_that_of_the_other_goes():
    plain = randomise(mlp(6, 8, 3))
    dropping = nn.Sequential(plain[0], plain[1], nn.Dropout(0.7), plain[2])
    fused = fxfuse.fuse([dropping, plain], VECTORS)
    assert any(isinstance(m, nn.Dropout) and m.p == 0.7 for m in fused.modules())
    assert not torch.equal(fused.train()(VECTORS), fused.eval()(VECTORS))
    other = fxfuse.fuse([plain, dropping], VECTORS)
    assert not any(isinstance(m, nn.Dropout) for m in other.modules())


@pytest.mark.parametrize("swapped", [False, True])
def test_with_and_without_norms_in_different_depth_and_width(swapped):
    nets = [randomise(stages([4, 4], [5])), randomise(stages([6], [7], norm=False), 1)]
    nets = nets[::-1] if swapped else nets
    deep = int(swapped)
    fused = fxfuse.fuse(nets, IMAGES)
    assert fused.state_dict().keys() == nets[deep].state_dict().keys()
    for net, balanced in zip(nets, fxfuse.balance(nets, IMAGES)):
        assert gap(net, balanced, IMAGES) <= FUNCTION
        assert balanced.state_dict().keys() == nets[deep].state_dict().keys()


def test_a_bias_that_the_structure_lacks_is_added_to_it():
    nets = [randomise(mlp(6, 8, 8, 3, bias=False)), randomise(mlp(6, 8, 8, 3), 1)]
    for net, balanced in zip(nets, fxfuse.balance(nets, VECTORS)):
        assert gap(net, balanced, VECTORS) <= FUNCTION
        assert balanced.state_dict().keys() == nets[1].state_dict().keys()


def test_a_function_without_a_bias_has_no_room_for_one():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(8, 6)), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(torch.relu(nn.functional.linear(x, self.weight)))

    bare, net = randomise(Bare()), randomise(mlp(6, 8, 3))
    with pytest.raises(PairingError, match="a layer without a bias") as caught:
        fxfuse.fuse([bare, net], VECTORS)
    assert "linear" in caught.value.where
    assert "list the network that has one first" in caught.value.do
    fused = fxfuse.fuse([net, bare], VECTORS, weights=[0, 1])
    assert gap(bare, fused, VECTORS) <= 10 * FUNCTION


def test_epsilons_of_norms_may_differ():
    nets = [randomise(nn.Sequential(conv(3, 4), Pooled(4, 3)), seed) for seed in (0, 1)]
    nets[1][0][1].eps = 0.3
    for net, balanced in zip(nets, fxfuse.balance(nets, IMAGES)):
        assert gap(net, balanced, IMAGES) <= FUNCTION
    other = respelled(nets[1], ["layers as functions"])
    for net, balanced in zip((nets[0], other), fxfuse.balance([nets[0], other], IMAGES)):
        assert gap(net, balanced, IMAGES) <= FUNCTION


def test_tied_layers_stay_tied_under_another_spelling():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
            self.b = self.a

        def forward(self, x):
            return self.head(torch.relu(self.b(torch.relu(self.a(x)))))

    net = randomise(Tied())
    other = respelled(net, ["dropout", "layers as functions"])
    assert_same_family(net, other, VECTORS)
    fused = fxfuse.fuse([net, other], VECTORS)
    assert sum(p.shape == (6, 6) for p in fused.parameters()) == 1


@pytest.mark.parametrize("depths", [(3, 2), (2, 3)])
def test_a_mask_of_each_layer_is_no_reason_to_refuse(depths):
    class Causal(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.register_buffer("mask", torch.empty(5, 5))

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            scores = q @ k.transpose(1, 2)
            hidden = self.mask[: x.shape[1], : x.shape[1]] == 0
            return x + self.out(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v)

    def language_model(depth):
        layers = [Causal(8) for _ in range(depth)]
        net = randomise(nn.Sequential(nn.Embedding(11, 8), *layers, nn.Linear(8, 11)), depth)
        for layer in layers:
            layer.mask.copy_(torch.ones(5, 5).tril())
        return net

    words, others = torch.randint(11, (64, 5)), torch.randint(11, (7, 4))
    nets = [language_model(depth) for depth in depths]
    for net, balanced in zip(nets, fxfuse.balance(nets, words)):
        assert gap(net, balanced, others) <= FUNCTION
    fused = fxfuse.fuse(nets, words)
    assert torch.equal(fused.state_dict()["3.mask"], nets[0][1].mask)


def test_sizes_written_as_numbers_are_those_of_the_network():
    class Viewed(nn.Module):
        def __init__(self, width, how):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, width, 3), nn.Linear(width * 36, 3)
            self.how = how

        def forward(self, x):
            return self.fc(self.how(torch.relu(self.conv(x))))

    nets = [
        randomise(Viewed(4, lambda x: x.view(-1, 144))),
        randomise(Viewed(5, lambda x: x.flatten(1)), 1),
        randomise(Viewed(6, lambda x: x.reshape(-1, 216)), 2),
    ]
    for order in (nets, nets[::-1]):
        for net, balanced in zip(order, fxfuse.balance(order, IMAGES)):
            assert gap(net, balanced, IMAGES) <= FUNCTION


def test_the_network_is_left_as_it_was():
    net, other = randomise(NET), randomise(NET, 1)
    given = network(respelled(net, ["norms folded", "layers as functions"]), IMAGES[:2])
    before = {name: t.clone() for name, t in given.module.state_dict().items()}
    adopted, absent = adopt(given, network(other, IMAGES[:2]))
    assert absent == () and gap(net, adopted.module, IMAGES) <= FUNCTION
    assert before.keys() == given.module.state_dict().keys()
    assert all(torch.equal(t, given.module.state_dict()[name]) for name, t in before.items())


def test_a_norm_in_the_place_of_an_identity_has_the_mode_of_the_model():
    plain = randomise(nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 3)), 1).eval()
    plain[1].train()  # which does nothing
    other = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    _, with_norm = fxfuse.balance([randomise(other, 2).eval(), plain], VECTORS)
    assert gap(plain, with_norm, VECTORS) < FUNCTION
