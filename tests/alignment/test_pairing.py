"""Blocks that keep segments from pairing are taken apart."""

from functools import partial

import pytest
import torch
from torch import nn

import fxfuse
from tests.support.nets import gap, randomise
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))


def hidden(depth, act=nn.ReLU):
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(6, 6), act())])


class Trunk(nn.Module):
    """Layers with a skip around all of them."""

    def __init__(self, depth):
        super().__init__()
        self.inp, self.body, self.out = nn.Linear(6, 6), hidden(depth), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(self.inp(x))
        return self.out(x + self.body(x))


class Towers(nn.Module):
    """Two towers on the parts of the input, one of them deeper."""

    def __init__(self, depth):
        super().__init__()
        self.a, self.b = hidden(depth), hidden(1, nn.Tanh)
        self.left, self.right, self.out = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(12, 2)

    def forward(self, x):
        a, b = x[:, :3], x[:, 3:]
        a, b = self.a(torch.relu(self.left(a))), self.b(self.right(b))
        return self.out(torch.cat([a, b], 1))


class Conditioned(nn.Module):
    """Layers that read what a network beside them made of the input."""

    def __init__(self, depth):
        super().__init__()
        self.beside = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), hidden(depth))
        self.inp, self.out = nn.Linear(6, 6), nn.Linear(6, 2)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))
        self.shifts = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))

    def forward(self, x):
        memory, h = self.beside(x), torch.relu(self.inp(x))
        for layer, shift in zip(self.layers, self.shifts):
            h = h + torch.relu(layer(h)) * torch.sigmoid(shift(memory))
        return self.out(h)


class Levels(nn.Module):
    """A network around a smaller one of its kind, as the levels of a U-Net are."""

    def __init__(self, levels, depth):
        super().__init__()
        self.down, self.up = hidden(1), nn.Sequential(nn.Linear(12, 6), nn.ReLU())
        self.inner = Levels(levels - 1, depth) if levels else hidden(depth)

    def forward(self, x):
        x = self.down(x)
        return self.up(torch.cat([x, self.inner(x)], 1))


class Stepping(nn.Module):
    """Layers that each have a step of their own, in front or behind."""

    def __init__(self, depth, inputs=6, front=lambda x: x, behind=lambda x: x):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs, 6) for _ in range(depth))
        self.out, self.front, self.behind = nn.Linear(6, 2), front, behind

    def forward(self, x):
        for layer in self.layers:
            x = self.behind(torch.relu(layer(self.front(x))))
        return self.out(x)


def shuffled(x):
    return x.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)


def padded(x):
    return nn.functional.pad(x, (0, 2), value=0.5)


PAIRS = {
    "a shuffle behind each layer": tuple(
        partial(Stepping, depth, behind=shuffled) for depth in (3, 1)
    ),
    "a pad in front of each layer": tuple(
        partial(Stepping, depth, 8, front=padded) for depth in (3, 1)
    ),
    "a skip around all layers": (lambda: Trunk(3), lambda: Trunk(1)),
    "towers": (lambda: Towers(3), lambda: Towers(1)),
    "a value that all layers read": (lambda: Conditioned(3), lambda: Conditioned(1)),
    "levels": (
        lambda: nn.Sequential(Levels(2, 3), nn.Linear(6, 2)),
        lambda: nn.Sequential(Levels(2, 1), nn.Linear(6, 2)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_networks_whose_blocks_differ_in_depth_pair_inside_them(name):
    deep, shallow = (randomise(make(), seed) for seed, make in enumerate(PAIRS[name]))
    fused = fxfuse.fuse([deep, shallow], X, weights=[1, 0])
    assert gap(deep, fused, 2 * X) < FUNCTION


@pytest.mark.parametrize("name", ["a skip around all layers", "towers", "levels"])
def test_networks_that_are_deepened_inside_blocks_keep_their_functions(name):
    nets = [randomise(make(), seed) for seed, make in enumerate(PAIRS[name])]
    for net, balanced in zip(nets, fxfuse.balance(nets, X)):
        assert gap(net, balanced, 2 * X) < FUNCTION
    copy = fxfuse.balance(nets, X)[1]
    fused = fxfuse.fuse([nets[1], fxfuse.permute(copy, X, seed=1)], X)
    assert gap(nets[1], fused, 2 * X) < FUNCTION


def stages(*acts, width=4):
    parts = []
    for i, act in enumerate(acts):
        parts += [nn.Conv2d(width if i else 3, width, 3, padding=1), act(), nn.MaxPool2d(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(width * (8 >> len(acts)) ** 2, 3))


def test_a_refusal_says_what_differs_and_its_advice_works():
    nets = [stages(nn.ReLU, nn.ReLU), stages(nn.ReLU, nn.GELU)]
    x = torch.randn(40, 3, 8, 8)
    with pytest.raises(fxfuse.FuseError) as caught:
        fxfuse.fuse(nets, x)
    assert caught.value.met.splitlines()[0].endswith(
        "'3' of Sequential 0 has relu, '3' of Sequential 1 has gelu"
    )
    advice = caught.value.do.partition(": ")[2]
    options = eval(f"dict({advice})", {"fxfuse": fxfuse})  # as a user would paste it
    fused = fxfuse.fuse([nets[0], nets[0]], x, **options)
    assert gap(nets[0], lambda x: fused(x)[0], x) < FUNCTION
    assert len(fxfuse.fuse(nets, x, **options)(x)) == 2


@pytest.mark.parametrize(
    ("net", "line"),
    [
        (lambda: stages(nn.ReLU), "'3' of Sequential 0 has conv3x3, relu, '4' of Sequential 1 has"),
        (lambda: stages(nn.ReLU, nn.ReLU, nn.ReLU), "has linear, '6' of Sequential 1 has conv3x3"),
    ],
)
def test_the_first_line_of_a_refusal_names_two_layers(net, line):
    with pytest.raises(fxfuse.FuseError) as caught:
        fxfuse.align([stages(nn.ReLU, nn.ReLU), net()], torch.randn(4, 3, 8, 8))
    assert line in caught.value.met.splitlines()[0]


def images(*parts):
    return nn.Sequential(nn.Conv2d(3, 4, 3), *parts, nn.Flatten(), nn.Linear(4, 3))


def mixed(*acts):
    return nn.Sequential(*[m for act in acts for m in hidden(1, act)], nn.Linear(6, 2))


def encoder(**options):
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True, **options)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Linear(3, 6), body, nn.Flatten(), nn.Linear(12, 2)
    )


class Skipping(nn.Module):
    """Layers with a skip around each, or with none."""

    def __init__(self, skip):
        super().__init__()
        self.a, self.b, self.out, self.skip = (
            *(nn.Linear(6, 6) for _ in "ab"),
            nn.Linear(6, 2),
            skip,
        )

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.out(x + torch.relu(self.b(x)) if self.skip else torch.relu(self.b(x)))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.out = kind(3, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.body(x.unflatten(1, (2, 3)))[0][:, -1])


P = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
REST = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
NO_FAMILY = {  # two networks, their data, and what is said of them
    "kernels": (lambda: (stages(nn.ReLU), images(*REST)), P, "conv3x3"),
    "activations": (
        lambda: (hidden(2), hidden(2, nn.Tanh)),
        X,
        "has relu, '0' of Sequential 1 has tanh",
    ),
    "order": (lambda: (mixed(nn.ReLU, nn.Tanh), mixed(nn.Tanh, nn.ReLU)), X, "in another order"),
    "dilation": (
        lambda: tuple(images(nn.Conv2d(4, 4, 3, padding=d, dilation=d), *REST) for d in (1, 2)),
        P,
        "has conv3x3 with padding (1, 1), dilation (1, 1), '1' of Sequential 1 has conv3x3",
    ),
    "groups": (
        lambda: tuple(images(nn.Conv2d(4, 4, 3, groups=g), *REST) for g in (1, 2)),
        P,
        "conv3x3 grouped",
    ),
    "poolings": (
        lambda: (images(*REST), images(nn.ReLU(), nn.AdaptiveMaxPool2d(1))),
        P,
        "outside of their aligned layers",
    ),
    "norms in front and behind": (
        lambda: (encoder(norm_first=True), encoder()),
        X,
        "has layer_norm, linear, add ..., '2.layers.0.self_attn' of Sequential 1 has linear",
    ),
    "gelu in a transformer": (lambda: (encoder(), encoder(activation="gelu")), X, "has gelu"),
    "skips": (
        lambda: (Skipping(True), Skipping(False)),
        X,
        "'b' of Skipping 0 has add",
    ),
    "recurrent": (lambda: (Recurrent(nn.LSTM), Recurrent(nn.GRU)), X, "has 4 add, 2 sub"),
}


@pytest.mark.parametrize("name", some(NO_FAMILY, "dilation", "poolings"))
def test_what_is_no_family_is_told_apart_and_can_be_fused_as_the_refusal_says(name):
    make, x, line = NO_FAMILY[name]
    nets = [randomise(net, seed) for seed, net in enumerate(make())]
    with pytest.raises(fxfuse.FuseError) as caught:
        fxfuse.fuse(nets, x)
    assert line in caught.value.met.splitlines()[0]
    assert "across=True" in caught.value.do
    fused = fxfuse.fuse(nets, x, across=True)
    assert fused(x).shape == nets[0](x).shape and bool(fused(x).isfinite().all())
