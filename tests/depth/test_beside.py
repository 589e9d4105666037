"""Layers that read values besides those of the layer before them."""

import pytest
import torch
from torch import nn

import fxfuse
from tests.support.nets import gap, randomise
from tests.support.tolerances import FUNCTION, PERMUTATION

TOKENS, WIDTH = 6, 8


class Attending(nn.Module):
    """Blocks of attention that read a mask and rotations, computed once or for each."""

    def __init__(self, depth, once=True):
        super().__init__()
        self.inp, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(depth))
        self.once = once
        self.register_buffer("speeds", torch.tensor([1.0, 0.1, 0.5, 0.2, 0.3, 0.05, 0.4, 0.6]))

    def beside(self, x):
        places = torch.ones_like(x[..., :1]).cumsum(1)
        return x[:, None, :, 0] < 1, (places * self.speeds).cos()

    def forward(self, x):
        mask, turn = self.beside(x)
        h = self.inp(x)
        for qkv in self.qkv:
            if not self.once:
                mask, turn = self.beside(x)
            q, k, v = qkv(h).chunk(3, -1)
            a = (q * turn) @ (k * turn).transpose(1, 2) / 4
            h = h + a.masked_fill(~mask, -9.0).softmax(-1) @ v
        return self.out(h)


def attending(depth, seed=1, **options):
    return randomise(Attending(depth, **options), seed)


X = torch.randn(20, TOKENS, 3)


@pytest.mark.parametrize("once", [False, True])
def test_layers_of_networks_of_other_depth_read_their_masks_and_positions(once):
    deep, shallow = attending(3, once=once), attending(1, 2)
    balanced = fxfuse.balance([deep, shallow], X)
    assert all(gap(a, b, 2 * X) < FUNCTION for a, b in zip([deep, shallow], balanced))
    fused = fxfuse.fuse([deep, shallow], X, weights=[1, 0])
    assert gap(deep, fused, 2 * X) < FUNCTION


def test_a_value_may_be_computed_once_or_for_each_layer():
    net = attending(2)
    each = attending(2, once=False)
    each.load_state_dict(net.state_dict())
    fused = fxfuse.fuse([net, fxfuse.permute(each, X, seed=1)], X)
    assert gap(net, fused, 2 * X) < PERMUTATION


class Biased(nn.Module):
    """Blocks of attention with one table of biases for all, and with layers on all positions."""

    def __init__(self, depth, flat=False, once=True):
        super().__init__()
        self.inp, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.table = nn.Embedding(2 * TOKENS, 1)
        self.flat, self.once = flat, once
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, WIDTH))
            for _ in range(depth)
        )

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        far = places[:, None] - places
        bias = self.table(far + TOKENS)[..., 0]
        seen = (far >= 0)[None] & (x[:, None, :, 0] < 1)
        mask, h = torch.where(seen, bias, -9.0), self.inp(x)
        for qkv, mlp in zip(self.qkv, self.mlp):
            if not self.once:
                mask = torch.where(seen, bias, -9.0)
            q, k, v = qkv(h).chunk(3, -1)
            h = h + (q @ k.transpose(1, 2) / 4 + mask).softmax(-1) @ v
            rows = h.reshape(-1, WIDTH) if self.flat else h
            h = (rows + mlp(rows)).view(h.shape)
        return self.out(h)


@pytest.mark.parametrize(("flat", "once"), [(False, True), (True, False)])
def test_blocks_share_biases_under_a_mask_and_may_work_on_all_positions(flat, once):
    nets = [randomise(Biased(depth, flat, once), seed) for seed, depth in enumerate((3, 1))]
    balanced = fxfuse.balance(nets, X)
    assert all(gap(a, b, 2 * X) < FUNCTION for a, b in zip(nets, balanced))
    fused = fxfuse.fuse(nets, X, weights=[1, 0])
    assert gap(nets[0], fused, 2 * X) < FUNCTION


class Counting(nn.Module):
    """Pairs of blocks; the second of each weighs the places of a value that it makes itself."""

    def __init__(self, depth):
        super().__init__()
        self.inp, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.mix = nn.ModuleList(nn.Linear(TOKENS, TOKENS) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 12) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(12, WIDTH) for _ in range(depth))

    def forward(self, x):
        h = self.inp(x)
        for mix, up, down in zip(self.mix, self.up, self.down):
            h = h + mix(h.transpose(1, 2)).transpose(1, 2)
            inner = up(h)
            places = torch.arange(inner.shape[1], device=x.device)
            h = h + down(inner.relu() * places[:, None].cos())
        return self.out(h)


def test_what_has_a_size_of_a_layers_own_values_is_copied_with_the_layer():
    nets = [randomise(Counting(depth), seed) for seed, depth in enumerate((2, 1))]
    balanced = fxfuse.balance(nets, X)
    assert all(gap(a, b, 2 * X) < FUNCTION for a, b in zip(nets, balanced))
