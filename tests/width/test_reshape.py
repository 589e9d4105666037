"""Networks of other widths: how many units each space gets, and sizes written in the graph."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxfuse.calibration.data import analyse
from fxfuse.errors import PassError
from fxfuse.graph.verify import lint
from fxfuse.spaces.network import Network
from fxfuse.width.reshape import _variants, reshaped, scaled_sizes, spaces_under_norms
from tests.support.nets import NETS, Pooled, build, conv, outputs, random_nets, randomise
from tests.support.sweeps import crossed

IMAGES = torch.randn(2, 3, 8, 8)


def sizes_of(network, factor):
    every = dict.fromkeys((s.name for s in network.spaces), factor)
    return scaled_sizes(network, every, spaces_under_norms(network))


def grown(net, x=IMAGES, factor=2):
    network = analyse(net, x, "net")
    sizes = sizes_of(network, factor)
    return network, sizes, reshaped(network, sizes)


@pytest.mark.parametrize(("name", "factor"), crossed(sorted(NETS), [2, 3]))
def test_the_spaces_have_the_sizes_that_were_asked_for(name, factor):
    net, x = build(name)
    network, sizes, module = grown(net, x, factor)
    lint(module)
    wanted = {}  # by the places of the units; two spaces may lie in the same places
    for space in network.spaces:
        wanted.setdefault(space.signature, []).append(sizes[space.name])
    for space in Network.of("wide", module, network.example).spaces:
        assert space.size in wanted[space.signature], space.name
    assert outputs(module, x).shape == outputs(net, x).shape


@settings(max_examples=6)
@given(random_nets(), st.sampled_from([2, 3]))
def test_random_networks_take_other_widths(net, factor):
    network, sizes, module = grown(net, IMAGES, factor)
    lint(module)
    total = sum(s.size for s in Network.of("wide", module, network.example).spaces)
    assert total == sum(sizes.values())


def test_blocks_change_inside_and_keep_two_units_at_least():
    net, x = build("grouped")
    network = analyse(net, x, "net")
    blocks = next(s.name for s in network.spaces if s.name in {t.parent for t in network.spaces})
    for factor, inside in ((1.5, 3), (2, 4), (0.5, 2)):
        sizes = sizes_of(network, factor)
        assert sizes[blocks] == 4
        assert {sizes[s.name] for s in network.spaces if s.parent == blocks} == {4 * inside}


def test_groups_that_are_units_of_a_space_change_in_number():
    twice = nn.Conv2d(4, 8, 3, padding=1, groups=4)
    net = randomise(nn.Sequential(conv(3, 4), twice, nn.ReLU(), Pooled(8, 3)))
    network, sizes, module = grown(net)
    assert sorted(sizes.values()) == [8, 16]
    wide = module.get_submodule("1")
    assert (wide.groups, wide.in_channels, wide.out_channels) == (8, 8, 16)


def test_spaces_under_a_norm_grow_by_whole_factors():
    network = analyse(*build("layer norm"), "net")
    assert [sizes_of(network, f)["0"] for f in (1.5, 2, 2.7, 3, 0.5)] == [8, 16, 16, 24, 4]


class Literals(nn.Module):
    """A network whose code holds sizes, each of which has to change with the widths."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.width, self.heads, self.inside = width, heads, width // heads
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.Parameter(torch.ones(width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.plain = nn.LayerNorm(width, elementwise_affine=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        n = x.shape[0]
        x = self.embed(x).reshape(n, self.width, -1).permute(0, 2, 1)
        x = F.layer_norm(x, (self.width,), self.norm)
        q, k, v = self.qkv(x).split(self.width, -1)
        q, k, v = (t.reshape(n, 4, self.heads, self.inside).transpose(1, 2) for t in (q, k, v))
        scores = torch.softmax(q @ k.transpose(2, 3) * self.inside**-0.5, -1)
        x = self.out((scores @ v).transpose(1, 2).reshape(n, 4, self.width))
        return self.head(self.plain(x)[..., : self.width].mean(1))


def test_sizes_in_the_code_change_where_they_must():
    network, sizes, module = grown(randomise(Literals()))
    spaces = Network.of("wide", module, network.example).spaces
    assert sorted(s.size for s in spaces) == sorted(sizes.values())
    args = {n.name: n.args for n in module.graph.nodes}
    assert args["reshape"][2] == 16 and args["permute"][1:] == (0, 2, 1)
    assert args["reshape_1"][2:] == (4, 2, 8)
    assert module.get_submodule("plain").normalized_shape == (16,)


@pytest.mark.parametrize("between", [False, True])
def test_a_padded_shortcut_grows_with_what_it_is_added_to(between):
    net, x = build("padded")
    if between:  # a module that does nothing may lie between the padding and the sum

        class Block(type(net[1])):
            def __init__(self, block):
                super().__init__(4, 10)
                self.a, self.b, self.nothing = block.a, block.b, nn.Identity()

            def forward(self, x):
                skip = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3))
                return torch.relu(self.b(self.a(x)) + self.nothing(skip))

        net[1] = Block(net[1])
    module = grown(net.eval(), x)[2]
    pad = next(n for n in module.graph.nodes if n.name == "pad")
    assert pad.args[1] == (0, 0, 0, 0, 6, 6)


def test_sizes_that_cannot_change_are_refused():
    with pytest.raises(PassError, match="sizes that cannot be changed") as caught:
        grown(*build("padded"), factor=0.5)  # three zeros on each side: half of that is no number
    assert "'pad'" in caught.value.where and "like" in caught.value.do


def test_variants_with_few_changes_come_first_and_change_the_last_sizes():
    given = ((5, 4, [4, 7]), {"dim": 4})
    variants = list(_variants(given, lambda n: [2 * n] if n == 4 else []))
    assert variants[0] == given and len(variants) == 8
    assert variants[1] == ((5, 4, [4, 7]), {"dim": 8})
    assert variants[2] == ((5, 4, [8, 7]), {"dim": 4})
    assert variants[-1] == ((5, 8, [8, 7]), {"dim": 8})


def test_the_network_is_not_modified():
    net, x = build("tokens")
    network = analyse(net, x, "net")
    before = outputs(network.module, x)
    reshaped(network, sizes_of(network, 3))
    assert torch.equal(outputs(network.module, x), before)
