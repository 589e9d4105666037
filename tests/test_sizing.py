import pytest
import torch
from nets import GroupedBottleneck, Inverted, Pooled, Residual, Tokens, conv, mlp, randomise, stages
from torch import nn

from fxfuse.checks import sizes_of
from fxfuse.errors import PassError
from fxfuse.network import Network
from fxfuse.rewrites import Insertion
from fxfuse.segments import partition
from fxfuse.sizing import resized_copy
from fxfuse.tracing import trace

IMAGES, VECTORS = torch.randn(2, 3, 8, 8), torch.randn(2, 6)


def network(net, x):
    return Network.of("net", trace(randomise(net)), (x,))


def plan(template, into, x=IMAGES, layer=-1, after=None):
    """Put a layer of the template's last hidden segment behind the other's."""
    template, into = network(template, x), network(into, x)
    found = partition(template)[-2].layers[layer]
    return Insertion(template, found, into, after or partition(into)[-2].layers[-1].nodes[-1])


def stack(make, width, blocks=1):
    return nn.Sequential(conv(3, width), *[make(width) for _ in range(blocks)], Pooled(width, 3))


def shapes(insertion, *paths):
    parts = [resized_copy(insertion, path) for path in paths]
    for part in parts:
        assert all(getattr(part, k) == v for k, v in sizes_of(part).items())
    return [tuple(part.weight.shape) for part in parts]


def test_a_plain_layer_takes_the_width_of_the_stream_on_both_sides():
    insertion = plan(mlp(6, 9, 7, 3), mlp(6, 5, 3), VECTORS)
    assert shapes(insertion, "2") == [(5, 5)]
    insertion = plan(stages([9, 7], norm=True), stages([5]))
    insertion = Insertion(
        insertion.template, partition(insertion.template)[0].layers[1], insertion.into, "_0_0_2"
    )
    assert shapes(insertion, "0.1.0", "0.1.1") == [(5, 5, 3, 3), (5,)]


def test_a_block_takes_the_width_of_the_stream_and_keeps_its_own_inside():
    insertion = plan(
        stack(lambda w: Residual(w, w, inner=9), 6), stack(lambda w: Residual(w, w), 4)
    )
    assert shapes(insertion, "1.a.0", "1.a.1", "1.b.0", "1.b.1") == [
        (9, 4, 3, 3),
        (9,),
        (4, 9, 3, 3),
        (4,),
    ]


def test_groups_inside_a_block_stay():
    insertion = plan(
        stack(lambda w: GroupedBottleneck(w, 8, 4), 6), stack(lambda w: Residual(w, w), 4)
    )
    assert shapes(insertion, "1.a.0", "1.b.0", "1.c.0") == [
        (8, 4, 1, 1),
        (8, 2, 3, 3),
        (4, 8, 1, 1),
    ]


def test_channels_of_a_depthwise_convolution_inside_a_block_stay():
    insertion = plan(stack(lambda w: Inverted(w, 9, gate=4), 6), stack(lambda w: Residual(w, w), 4))
    assert shapes(insertion, "1.b.0", "1.gate.down", "1.c.0") == [
        (9, 1, 3, 3),
        (4, 9, 1, 1),
        (4, 9, 1, 1),
    ]
    assert resized_copy(insertion, "1.b.0").groups == 9


def test_a_depthwise_convolution_on_the_stream_takes_its_width():
    class Depthwise(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a = nn.Conv2d(width, width, 3, padding=1, groups=width)

        def forward(self, x):
            return x + self.a(x)

    insertion = plan(stack(Depthwise, 6), stack(Depthwise, 4))
    part = resized_copy(insertion, "1.a")
    assert tuple(part.weight.shape) == (4, 1, 3, 3)
    assert (part.groups, part.in_channels, part.out_channels) == (4, 4, 4)
    assert part(torch.zeros(1, 4, 5, 5)).shape == (1, 4, 5, 5)


def test_a_grouped_convolution_on_a_stream_of_another_width_is_refused():
    class Grouped(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a = nn.Conv2d(width, width, 3, padding=1, groups=2)

        def forward(self, x):
            return x + self.a(x)

    assert shapes(plan(stack(Grouped, 6), stack(Grouped, 6)), "1.a") == [(6, 3, 3, 3)]
    with pytest.raises(PassError, match="a stream of 6 units, to be rebuilt for 4"):
        resized_copy(plan(stack(Grouped, 6), stack(Grouped, 4)), "1.a")


def test_parameters_without_a_module_are_resized_alike():
    class Scaled(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.gamma = nn.Conv2d(width, width, 1), nn.Parameter(torch.ones(width, 1, 1))
            self.register_buffer("shift", torch.ones(1, width, 1, 1))

        def forward(self, x):
            return x + self.gamma * (self.a(x) + self.shift)

    insertion = plan(stack(Scaled, 6), stack(Scaled, 4))
    gamma, shift = (resized_copy(insertion, path) for path in ("1.gamma", "1.shift"))
    assert isinstance(gamma, nn.Parameter) and gamma.shape == (4, 1, 1)
    assert not isinstance(shift, nn.Parameter) and shift.shape == (1, 4, 1, 1)


def test_attention_keeps_its_heads_and_takes_the_streams_width():
    insertion = plan(Tokens(8, 2, 12), Tokens(8, 2, 10), layer=0)
    part = resized_copy(insertion, "blocks.0.attention")
    assert part.num_heads == 2 and part.embed_dim == 8
    assert part.in_proj_weight.shape == (24, 8) and part.out_proj.weight.shape == (8, 8)


def test_a_copy_is_freshly_initialised_and_shares_nothing():
    insertion = plan(stack(lambda w: Residual(w, w), 6), stack(lambda w: Residual(w, w), 6))
    original = insertion.template.module.get_submodule("1.a.0").weight
    first, second = (resized_copy(insertion, "1.a.0").weight for _ in range(2))
    assert first.shape == original.shape
    assert not torch.equal(first, original)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert float(first.std()) > 0.01


def test_initial_values_do_not_depend_on_nor_move_the_global_seed():
    insertion = plan(mlp(6, 9, 7, 3), mlp(6, 5, 3), VECTORS)
    torch.manual_seed(1)
    first = resized_copy(insertion, "2").weight
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, resized_copy(insertion, "2").weight)


def test_precision_and_trainability_come_along():
    template, into = (network(mlp(6, w, w, 3).double(), VECTORS.double()) for w in (7, 5))
    template.module.get_submodule("2").weight.requires_grad_(False)
    insertion = Insertion(template, partition(template)[0].layers[1], into, "_1")
    part = resized_copy(insertion, "2")
    assert part.weight.dtype == part.bias.dtype == torch.float64


def test_the_template_is_left_as_it_was():
    insertion = plan(mlp(6, 9, 7, 3), mlp(6, 5, 3), VECTORS)
    before = insertion.template.module.get_submodule("2").weight.clone()
    resized_copy(insertion, "2")
    assert torch.equal(insertion.template.module.get_submodule("2").weight, before)
