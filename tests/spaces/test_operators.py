"""A case for each operator: permuting every space keeps the function; some units are free.

Most cases put an operator between two layers. Without it, 8 units would be free there.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse.graph.trace import trace
from fxfuse.spaces import operators
from fxfuse.spaces._labels import LabelRun, Labels
from fxfuse.spaces.network import label_network
from fxfuse.spaces.operators import OPERATORS, mirror
from tests.support.nets import gap, moved, randomise
from tests.support.tolerances import PERMUTATION

EDGES, FROM = torch.tensor([0, 2, 1, 1, 0]), torch.tensor([1, 0, 2, 1, 2])
PHASES = torch.polar(torch.ones(5, 1), torch.arange(5.0)[:, None]).expand(5, 4)
BLUR = torch.tensor([1.0, 2.0, 1.0])[:, None] * torch.tensor([[[[1.0, 2.0, 1.0]]]])
EIGHT = torch.tensor([1.0, 2.0] * 4)[:, None, None, None]
NUMBERS = torch.arange(4.0)
MASK = torch.tensor([[True, False, False, True, False], [False, True, False, False, True]])
GRID = torch.linspace(-1, 1, 32).view(1, 4, 4, 2)
THETA = torch.tensor([[1.0, 0.2, 0.0], [0.1, 1.0, 0.3]])


@torch.fx.wrap
def numbered(x):
    """The numbers from 0, made while the network runs."""
    return torch.arange(8.0, device=x.device)


@torch.fx.wrap
def _edges_of(x):
    """A sparse adjacency of five nodes."""
    return torch.sparse_coo_tensor(torch.stack([EDGES, FROM]), torch.ones(5), (len(x), len(x)))


def _by_experts(rows, matrices):
    """Each half of the rows times one of two matrices."""
    ends = (torch.arange(1, 3, device=rows.device) * len(rows) // 2).int()
    return F.grouped_mm(rows, matrices, offs=ends)


class Custom(nn.Module):
    """A network whose forward is a function of the network and its input."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    free: int


def vectors(function, free=8, outputs=8, **parts):
    """An operator between two linear layers; the input is `(3, 6)`, the operator gets `(3, 8)`."""

    def forward(net, x):
        return net.head(function(net, torch.relu(net.stem(x))))

    return Case(
        lambda: Custom(forward, stem=nn.Linear(6, 8), head=nn.Linear(outputs, 3), **make(parts)),
        (3, 6),
        free,
    )


def tokens(function, free=8, outputs=8, **parts):
    """An operator between two linear layers on 5 tokens; it gets `(2, 5, 8)`."""
    case = vectors(function, free, outputs, **parts)
    return case._replace(shape=(2, 5, 6))


def images(function, free=8, outputs=8, **parts):
    """An operator between two convolutions on 6 x 6 pixels; it gets `(2, 8, 6, 6)`."""

    def forward(net, x):
        return net.head(function(net, torch.relu(net.stem(x))))

    return Case(
        lambda: Custom(
            forward, stem=nn.Conv2d(3, 8, 1), head=nn.Conv2d(outputs, 3, 1), **make(parts)
        ),
        (2, 3, 6, 6),
        free,
    )


def volumes(function, free=8, outputs=8, **parts):
    """An operator between two convolutions on 4 x 4 x 4 voxels; it gets `(2, 8, 4, 4, 4)`."""

    def forward(net, x):
        return net.head(function(net, torch.relu(net.stem(x))))

    return Case(
        lambda: Custom(
            forward, stem=nn.Conv3d(2, 8, 1), head=nn.Conv3d(outputs, 3, 1), **make(parts)
        ),
        (2, 2, 4, 4, 4),
        free,
    )


def make(parts):
    return {name: part() for name, part in parts.items()}


def table(*shape):
    return lambda: nn.Parameter(torch.zeros(shape))


def mask(*shape):
    """A buffer of truth values."""
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    return lambda: nn.Buffer(drawn.clone())


def kept(part):
    """The arguments of a case with a module between the two layers."""
    return dict(function=lambda net, x: net.part(x), part=part)


CASES = {
    # --- moves: the units move with the data
    "view": vectors(lambda net, x: x.view(-1, 2, 4).view(-1, 8)),
    "reshape": images(
        lambda net, x: x.flatten(2).transpose(1, 2).reshape(-1, 6, 6, 8).movedim(3, 1)
    ),
    "permute": images(lambda net, x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)),
    "transpose": tokens(lambda net, x: x.transpose(1, 2).tanh().transpose(1, 2)),
    "t": vectors(lambda net, x: x.t().t()),
    "expand": vectors(lambda net, x: x.unsqueeze(0).expand(4, -1, -1).mean(0)),
    "select": images(lambda net, x: x + x.select(2, 0).unsqueeze(2)),
    "slice": images(lambda net, x: x[:, ::2], outputs=4),
    "slice of pixels": images(lambda net, x: x[:, :, 1:, ::2]),
    "split": vectors(lambda net, x: torch.mul(*_pair(x.split(4, 1))), outputs=4, free=4),
    "split unevenly": vectors(lambda net, x: _pair(x.split([3, 5], 1))[1], outputs=5),
    "chunk": vectors(lambda net, x: torch.mul(*_pair(x.chunk(2, 1))), outputs=4, free=4),
    "unbind": vectors(lambda net, x: torch.add(*_pair(x.view(-1, 2, 4).unbind(1))), 4, 4),
    "squeeze": vectors(lambda net, x: x.unsqueeze(1).squeeze(1)),
    "flip": vectors(lambda net, x: x.flip(1)),
    "flip and add": vectors(lambda net, x: x.flip(1) + x, free=4),
    "roll": vectors(lambda net, x: x.roll(3, 1)),
    "roll pixels": images(lambda net, x: x.roll((1, 2), (2, 3))),
    "repeat": vectors(lambda net, x: x.repeat(1, 2), outputs=16),
    "repeat_interleave": vectors(lambda net, x: x.repeat_interleave(2, 1), outputs=16),
    "narrow": vectors(lambda net, x: x.narrow(1, 2, 5), outputs=5),
    "index_select": vectors(lambda net, x: x.index_select(1, torch.tensor([7, 1, 3])), outputs=3),
    "pad": vectors(lambda net, x: F.pad(x, (1, 3)), outputs=12, free=12),
    "pad pixels": images(lambda net, x: F.pad(x, (1, 1, 2, 2))),
    "pad pixels with a value": images(lambda net, x: F.pad(x, (1, 1, 2, 2), value=0.7)),
    "pixel_unshuffle": images(lambda net, x: F.pixel_unshuffle(x, 2), outputs=32),
    "pixel_shuffle": images(  # all that land in one channel are the same unit
        lambda net, x: F.pixel_shuffle(net.a(x), 2), 12, 4, a=lambda: nn.Conv2d(8, 16, 1)
    ),
    "pixel_shuffle before a kernel": images(
        lambda net, x: net.a(F.pixel_shuffle(x, 2)), 8, 8, a=lambda: nn.Conv2d(2, 8, 3)
    ),
    "unfold": images(lambda net, x: x.unfold(2, 3, 1).mean(-1)),
    "patches": images(
        lambda net, x: F.unfold(x, 3, padding=1).view(2, 8, 9, 6, 6).amax(2),
    ),
    "patches summed": images(
        lambda net, x: F.fold(net.a[:, None] * F.unfold(x, 3, padding=1), 6, 3, padding=1),
        a=table(72),
    ),
    "patches of places": images(
        lambda net, x: F.fold(F.unfold(x, 2, stride=2).mT.mT * net.a, 6, 2, stride=2), a=table(9)
    ),
    "channel_shuffle": images(lambda net, x: F.channel_shuffle(x, 2)),
    "movedim": images(lambda net, x: x.movedim(1, 3).movedim(3, 1)),
    "tile": vectors(lambda net, x: x.tile(1, 2), outputs=16),
    "as_strided": vectors(lambda net, x: x.as_strided((3, 8), (8, 1))),
    "as_strided across": vectors(lambda net, x: x.as_strided((3, 8), (1, 3)), free=0),
    "windows": images(
        lambda net, x: x.unflatten(2, (2, 3)).transpose(1, 2).sum(1).repeat(1, 1, 2, 1)
    ),
    # --- joins
    "cat": vectors(lambda net, x: torch.cat([x, net.a(x)], 1), 13, 13, a=lambda: nn.Linear(8, 5)),
    "cat of tokens": tokens(
        lambda net, x: torch.cat([net.a.expand(2, 1, 8), x], 1), a=table(1, 1, 8)
    ),
    "cat with an input": vectors(
        lambda net, x: torch.cat([x, net.a.expand(3, 2)], 1), 10, 10, a=table(1, 2)
    ),
    "stack": vectors(
        lambda net, x: torch.stack([x, net.a(x)], 1).sum(1), a=lambda: nn.Linear(8, 8)
    ),
    "stack and flatten": vectors(
        lambda net, x: torch.stack([x, torch.tanh(x)], 2).flatten(1), outputs=16
    ),
    # --- values without units
    "dropout": vectors(**kept(lambda: nn.Dropout(0.5))),
    "clone": vectors(lambda net, x: x.clone().contiguous().detach()),
    "to": vectors(lambda net, x: x.double().float()),
    "zeros": vectors(lambda net, x: x + torch.zeros_like(x)),
    "ones": vectors(lambda net, x: x * x.new_ones(8) + torch.full_like(x, 0.3)),
    "cat with zeros": vectors(
        lambda net, x: torch.cat([x, torch.zeros_like(x)[:, :3]], 1), free=11, outputs=11
    ),
    "arange": vectors(lambda net, x: x + numbered(x), free=0),
    "empty": vectors(lambda net, x: torch.add(x, torch.empty_like(x).fill_(0.2))),
    # --- elementwise
    "relu": vectors(lambda net, x: F.relu(x - 0.5, inplace=True)),
    "gelu": vectors(lambda net, x: F.gelu(x)),
    "add two": vectors(lambda net, x: x + net.a(x), a=lambda: nn.Linear(8, 8)),
    "add in place": vectors(lambda net, x: net.a(x).add_(x), a=lambda: nn.Linear(8, 8)),
    "scale": images(lambda net, x: x * net.a, a=table(8, 1, 1)),
    "position table": tokens(lambda net, x: x + net.a, a=table(1, 5, 8)),
    "where": vectors(lambda net, x: torch.where(x > 0.3, x, -x * net.a), a=table(8)),
    "maximum": vectors(lambda net, x: torch.maximum(x, net.a), a=table(8)),
    "lerp": vectors(lambda net, x: torch.lerp(x, net.a, 0.3), a=table(8)),
    "masked_fill": vectors(lambda net, x: x.masked_fill(x > 0.5, 0.1)),
    "pow": vectors(lambda net, x: x**2 / (1 + x.exp())),
    "prelu": vectors(lambda net, x: net.part(x - 0.5), part=lambda: nn.PReLU(8)),
    "prelu of one": vectors(lambda net, x: net.part(x - 0.5), part=nn.PReLU),
    "gate": images(
        lambda net, x: x * torch.sigmoid(net.a(x.mean((2, 3), True))), a=lambda: nn.Conv2d(8, 8, 1)
    ),
    "weights under a mask of truth values": vectors(
        lambda net, x: x @ (net.a * net.b), a=table(8, 8), b=mask(8, 8), free=16
    ),
    "a choice for each unit": vectors(lambda net, x: torch.where(net.a, x, x.tanh()), a=mask(8)),
    "units picked by truth values": vectors(
        lambda net, x: x[:, net.a].sum(1, True) * x, a=mask(8), free=0
    ),
    "one gate for all": images(lambda net, x: x * net.a(x), a=lambda: nn.Conv2d(8, 1, 1)),
    # --- sums over units or positions
    "mean": images(lambda net, x: x - x.mean((2, 3), keepdim=True)),
    "mean of units": vectors(lambda net, x: x - x.mean(1, keepdim=True)),
    "sum of half": vectors(lambda net, x: x.view(3, 2, 4).sum(2).repeat_interleave(4, 1) * 1, 8),
    "amax": vectors(lambda net, x: x / x.amax(1, keepdim=True).clamp(min=0.1)),
    "amin": vectors(lambda net, x: x + x.amin(1, keepdim=True)),
    "prod": vectors(lambda net, x: x + (1 + x).prod(1, keepdim=True).log()),
    "maxout": vectors(lambda net, x: x.view(3, 4, 2).amax(2), outputs=4),
    "var": vectors(lambda net, x: x * torch.rsqrt(x.var(1, keepdim=True) + 0.1)),
    "std": vectors(lambda net, x: x / (1 + x.std(1, keepdim=True))),
    "var_mean": vectors(lambda net, x: x - _pair(torch.var_mean(x, 1, keepdim=True))[1]),
    "std_mean": vectors(lambda net, x: x - _pair(torch.std_mean(x, 1, keepdim=True))[1]),
    "logsumexp": vectors(lambda net, x: x - x.logsumexp(1, keepdim=True)),
    "norm": vectors(lambda net, x: x / (1 + torch.linalg.vector_norm(x, dim=1, keepdim=True))),
    "nansum": images(lambda net, x: x - x.nansum((2, 3), keepdim=True)),
    # --- by order or by number
    "max of pixels": images(lambda net, x: x * torch.max(x, 2, keepdim=True)[0]),
    "min of pixels by name": images(lambda net, x: x - x.min(3, keepdim=True).values),
    "max of units": vectors(lambda net, x: x - torch.max(x, 1, keepdim=True)[0]),
    "largest units, read by number": vectors(
        lambda net, x: x - torch.add(*_pair(torch.max(x, 1, keepdim=True))), 0
    ),
    "largest and smallest unit": vectors(
        lambda net, x: x - torch.mul(*_pair(x.aminmax(dim=1, keepdim=True)))
    ),
    "winners": vectors(lambda net, x: x * (x >= x.topk(3, 1)[0][:, -1:])),
    "winners among pixels": images(
        lambda net, x: x * (x >= x.flatten(1).topk(9)[0][:, -1, None, None, None])
    ),
    "all but losers": vectors(lambda net, x: x * (x > x.kthvalue(3, 1, True)[0])),
    "median of units": vectors(lambda net, x: x - x.median(1, True)[0] + x.mode(1, True)[0]),
    "quantile of units": vectors(lambda net, x: x - x.quantile(0.3, 1, True)),
    "largest units in no order": vectors(
        lambda net, x: x - x.topk(3, 1, sorted=False)[0][:, :1], 0
    ),
    "how many units": vectors(lambda net, x: x / (1 + (x > 0.2).count_nonzero(1)[:, None])),
    "max of everything": vectors(lambda net, x: x / (1 + x.max().abs())),
    "max of pixels, axis gone": images(lambda net, x: x * x.flatten(2).max(2)[0][:, :, None, None]),
    "where the largest unit is": vectors(lambda net, x: x + x.argmax(1, keepdim=True), 0),
    "where the largest pixel is": images(lambda net, x: x + x.argmax(3, keepdim=True)),
    "median": images(lambda net, x: x - x.median(3, keepdim=True)[0]),
    "sort": images(lambda net, x: x.sort()[0]),
    "sorted units": vectors(lambda net, x: x.sort()[0]),
    "order of units": vectors(lambda net, x: x + x.argsort(1), 0),
    "topk": images(lambda net, x: x.topk(3, 2)[0]),
    "topk of units": vectors(lambda net, x: _pair(x.topk(4, 1))[0], outputs=4),
    "cumsum": images(lambda net, x: x.cumsum(2)),
    "cumsum of units": vectors(lambda net, x: x.cumsum(1), 0),
    "gather": images(lambda net, x: x.gather(3, x.argsort(3)[..., :4])),
    "gathered units": vectors(lambda net, x: x.gather(1, x.argsort(1)), 0),
    "gather from fewer": images(lambda net, x: x.gather(3, x[:1].argsort(3)), 0),
    "glu": images(lambda net, x: F.glu(torch.cat([x, 1 - x], 1), 1)),
    "glu of two halves": vectors(lambda net, x: F.glu(x), 4, outputs=4),
    "glu of pixels": images(lambda net, x: F.glu(x, 3)),
    "sum of everything": vectors(lambda net, x: x * x.sum().tanh()),
    "softmax": vectors(lambda net, x: x.softmax(1)),
    "softmax over pixels": images(lambda net, x: x.flatten(2).softmax(2).unflatten(2, (6, 6))),
    "softmax over parts": vectors(lambda net, x: x.view(3, 4, 2).softmax(2).flatten(1)),
    "log_softmax": vectors(lambda net, x: x.log_softmax(1)),
    # --- pooling and resampling
    "max_pool": images(**kept(lambda: nn.MaxPool2d(2))),
    "nearest-exact": images(
        lambda net, x: F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    ),
    "rot90": images(lambda net, x: x.rot90(1, (2, 3))),
    "avg_pool": images(**kept(lambda: nn.AvgPool2d(3, 1, 1))),
    "adaptive pools": images(
        lambda net, x: F.adaptive_avg_pool2d(x, 2) + F.adaptive_max_pool2d(x, 2)
    ),
    "pools of three": volumes(lambda net, x: F.max_pool3d(x, 2) + F.avg_pool3d(x, 2)),
    "adaptive pool of three": volumes(
        lambda net, x: F.adaptive_avg_pool3d(x, 2) + F.adaptive_max_pool3d(x, 2)
    ),
    "pools of one": tokens(
        lambda net, x: (F.avg_pool1d(x.mT, 2) + F.adaptive_avg_pool1d(x.mT, 2)).mT
    ),
    "pool over units of one sample": images(
        lambda net, x: torch.stack(
            [F.avg_pool2d(v.transpose(0, 1), 3, 1, 1) for v in _two(x)]
        ).transpose(1, 2),
        free=0,
    ),
    "pool over units": tokens(lambda net, x: F.avg_pool1d(x, 2), outputs=4, free=0),
    "interpolate": images(
        lambda net, x: (
            F.interpolate(x, scale_factor=2)
            + F.interpolate(x, scale_factor=2, mode="bilinear")
            + F.interpolate(x, scale_factor=2, mode="bicubic")
        )
    ),
    "interpolate one": tokens(
        lambda net, x: (
            (
                F.interpolate(x.mT, scale_factor=2)
                + F.interpolate(x.mT, scale_factor=2, mode="linear")
            ).mT
        )
    ),
    "interpolate without aliases": images(
        lambda net, x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
    ),
    "reflected borders": images(
        lambda net, x: F.pad(x, (1, 1, 1, 1), "reflect") + F.pad(x, (2, 0, 1, 1), "replicate")
    ),
    "interpolate three": volumes(lambda net, x: F.interpolate(x, scale_factor=2, mode="trilinear")),
    # --- norms
    "batch_norm": images(**kept(lambda: nn.BatchNorm2d(8))),
    "batch_norm without affine": images(**kept(lambda: nn.BatchNorm2d(8, affine=False))),
    "batch_norm of the batch": vectors(
        **kept(lambda: nn.BatchNorm1d(8, track_running_stats=False))
    ),
    "instance_norm": images(**kept(lambda: nn.InstanceNorm2d(8, affine=True))),
    "layer_norm": tokens(**kept(lambda: nn.LayerNorm(8))),
    "layer_norm of images": images(**kept(lambda: nn.LayerNorm([8, 6, 6]))),
    "layer_norm of parts": vectors(
        lambda net, x: net.part(x.view(3, 2, 4)).flatten(1), part=lambda: nn.LayerNorm(4), free=4
    ),
    "layer_norm of parts multiplied": tokens(
        lambda net, x: net.a(x) * net.part(x.view(2, 5, 4, 2)).flatten(2),
        a=lambda: nn.Linear(8, 8),
        part=lambda: nn.LayerNorm(2),
        free=4,
    ),
    "rms_norm": tokens(**kept(lambda: nn.RMSNorm(8))),
    "group_norm": images(**kept(lambda: nn.GroupNorm(2, 8))),
    "group_norm of one": images(**kept(lambda: nn.GroupNorm(1, 8))),
    "group_norm of each": images(**kept(lambda: nn.GroupNorm(8, 8))),
    # --- contractions
    "linear": tokens(**kept(lambda: nn.Linear(8, 8)), free=16),
    "linear without bias": tokens(**kept(lambda: nn.Linear(8, 8, bias=False)), free=16),
    "linear of vectors": vectors(**kept(lambda: nn.Linear(8, 8)), free=16),
    "linear over tokens": tokens(lambda net, x: net.a(x.mT).mT, a=lambda: nn.Linear(5, 4)),
    "weight transposed": vectors(lambda net, x: x @ net.a @ net.a.T, a=table(8, 5), free=13),
    "weight sliced": vectors(lambda net, x: x @ net.a[:8], a=table(12, 8), free=16),
    "weight standardised": images(
        lambda net, x: F.conv2d(x, net.a - net.a.mean((1, 2, 3), True)),
        a=table(8, 8, 3, 3),
        free=16,
    ),
    "matvec": vectors(
        lambda net, x: torch.stack([net.a.mv(v) for v in _three(x)]), a=table(8, 8), free=16
    ),
    "baddbmm": tokens(
        lambda net, x: torch.baddbmm(x, x, net.a.expand(2, 8, 8)), a=table(1, 8, 8), free=8
    ),
    "experts": vectors(
        lambda net, x: _by_experts(_by_experts(x, net.a).relu(), net.b.mT),
        a=table(2, 8, 12),
        b=table(2, 8, 12),
        free=28,
    ),
    "a batch by experts": tokens(lambda net, x: F.grouped_mm(x, net.a), a=table(2, 8, 8), free=16),
    "einsum": tokens(lambda net, x: torch.einsum("ntc,dc->ntd", x, net.a), a=table(8, 8), free=16),
    "bilinear form": tokens(lambda net, x: x @ net.a @ x.mT @ x, a=table(8, 8)),
    "attention": tokens(lambda net, x: (x @ x.mT).softmax(-1) @ x),
    "fused attention": tokens(
        lambda net, x: F.scaled_dot_product_attention(net.a(x), net.b(x), net.c(x), is_causal=True),
        a=lambda: nn.Linear(8, 6),
        b=lambda: nn.Linear(8, 6),
        c=lambda: nn.Linear(8, 8),
        free=22,
    ),
    "heads": tokens(
        lambda net, x: net.part(x, x, x)[0],
        part=lambda: nn.MultiheadAttention(8, 4, batch_first=True),
        free=32,
    ),
    "attention over units": tokens(lambda net, x: (x.mT @ x).softmax(-1).matmul(x.mT).mT),
    "conv": images(**kept(lambda: nn.Conv2d(8, 8, 3, 2, 1)), free=16),
    "conv of one axis": tokens(
        lambda net, x: net.part(x.mT).mT, part=lambda: nn.Conv1d(8, 8, 3), free=16
    ),
    "conv of three axes": volumes(**kept(lambda: nn.Conv3d(8, 8, 2)), free=16),
    "conv over units": tokens(
        lambda net, x: net.part(x), part=lambda: nn.Conv1d(5, 5, 3, padding=1), free=0
    ),
    "conv beside units": tokens(lambda net, x: net.part(x), part=lambda: nn.Conv1d(5, 5, 1)),
    "depthwise conv beside units": images(
        lambda net, x: net.part(x.permute(0, 2, 1, 3)).permute(0, 2, 1, 3),
        part=lambda: nn.Conv2d(6, 6, (1, 3), padding=(0, 1), groups=6),
    ),
    "normalize": vectors(lambda net, x: F.normalize(x, dim=1)),
    "normalize heads": tokens(
        lambda net, x: _normalised(net.q(x), net.k(x)) @ x,
        q=lambda: nn.Linear(8, 6),
        k=lambda: nn.Linear(8, 6),
        free=14,
    ),
    "conv of parts": images(
        lambda net, x: net.part(x.view(4, 4, 6, 6)).view(2, 12, 6, 6),
        part=lambda: nn.Conv2d(4, 6, 1),
        outputs=12,
        free=10,
    ),
    "depthwise conv of parts": images(
        lambda net, x: net.part(x.view(4, 4, 6, 6)).view(2, 8, 6, 6),
        part=lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
        free=4,
    ),
    "recurrent": tokens(
        lambda net, x: net.part(x)[0],
        part=lambda: nn.LSTM(8, 5, batch_first=True),
        outputs=5,
        free=13,
    ),
    "recurrent both ways": tokens(
        lambda net, x: net.part(x)[0],
        part=lambda: nn.GRU(8, 5, batch_first=True, bidirectional=True),
        outputs=10,
        free=18,
    ),
    "recurrent in layers": tokens(
        lambda net, x: net.part(x)[0],
        part=lambda: nn.LSTM(8, 5, 3, batch_first=True, bidirectional=True),
        outputs=10,
        free=38,
    ),
    "last states": tokens(
        lambda net, x: net.part(x)[1][0][-1],
        part=lambda: nn.LSTM(8, 5, 2, batch_first=True),
        outputs=5,
        free=18,
    ),
    "last states of both ways": tokens(
        lambda net, x: torch.cat(_pair(net.part(x)[1].view(2, 2, 2, 5)[-1].unbind()), 1),
        part=lambda: nn.GRU(8, 5, 2, batch_first=True, bidirectional=True),
        outputs=10,
        free=28,
    ),
    "sum of last states": tokens(
        lambda net, x: net.part(x)[1].sum(0),
        part=lambda: nn.RNN(8, 5, 2, batch_first=True),
        outputs=5,
        free=13,
    ),
    "attention with parts pooled": tokens(
        lambda net, x: _pooled_attention(net, net.q(x), net.k(x), net.v(x)),
        **{n: lambda: nn.Linear(8, 8) for n in "qkv"},
        pool=lambda: nn.Conv1d(4, 4, 3, groups=4),
        norm=lambda: nn.LayerNorm(4),
        free=20,
    ),
    "transposed conv": images(**kept(lambda: nn.ConvTranspose2d(8, 8, 2, 2)), free=16),
    "grouped conv": images(**kept(lambda: nn.Conv2d(8, 8, 3, groups=2)), free=16),
    "depthwise conv": images(**kept(lambda: nn.Conv2d(8, 8, 3, groups=8))),
    "depthwise multiplied": images(
        **kept(lambda: nn.Conv2d(8, 16, 3, groups=8)), free=16, outputs=16
    ),
    "grouped transposed conv": images(
        **kept(lambda: nn.ConvTranspose2d(8, 12, 2, 2, groups=2)), outputs=12, free=20
    ),
    "depthwise transposed conv": images(
        **kept(lambda: nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8)), free=8
    ),
    "depthwise transposed multiplied": images(
        **kept(lambda: nn.ConvTranspose2d(8, 16, 3, groups=8)), outputs=16, free=16
    ),
    "depthwise conv, standardised": images(
        lambda net, x: F.conv2d(x, net.a - net.a.mean((1, 2, 3), True), groups=8),
        a=table(8, 1, 3, 3),
    ),
    "one kernel expanded": images(
        lambda net, x: F.conv2d(x, net.a.expand(8, 1, 3, 3), groups=8), a=table(1, 1, 3, 3)
    ),
    "one kernel repeated": images(
        lambda net, x: F.conv2d(x, net.a.abs().repeat(8, 1, 1, 1) * 2, groups=8),
        a=table(1, 1, 3, 3),
    ),
    "one kernel made in forward": images(
        lambda net, x: F.conv2d(x, BLUR.repeat(8, 1, 1, 1).to(x), None, 2, 1, groups=8)
    ),
    "two kernels made in forward": images(
        lambda net, x: F.conv2d(x, BLUR.repeat(8, 1, 1, 1) * EIGHT, None, 2, 1, groups=8), 0
    ),
    "one kernel for all, transposed": images(
        lambda net, x: F.conv_transpose2d(x, BLUR.expand(8, 1, 3, 3), groups=8)
    ),
    # --- parameters with an axis for parts and one for the units of a part
    "table of parts": vectors(
        lambda net, x: (x.view(3, 2, 4) + net.a).flatten(1), a=table(2, 4), free=4
    ),
    "table of parts, flattened": vectors(lambda net, x: x * net.a.flatten(), a=table(2, 4), free=4),
    "matrix of parts, flattened": vectors(
        lambda net, x: x @ net.a.flatten(0, 1), a=table(2, 4, 8), free=12
    ),
    "kernel of parts, flattened": images(
        lambda net, x: F.conv2d(x, net.a.flatten(1, 2)), a=table(8, 4, 2, 1, 1), free=12
    ),
    "matrix to parts, flattened": vectors(
        lambda net, x: (x @ net.a.flatten(1)).view(3, 2, 4).sum(1),
        a=table(8, 2, 4),
        outputs=4,
        free=14,
    ),
    # --- parts that stay, units that move within them
    "numbered parts": vectors(lambda net, x: (x.view(3, 2, 4) * numbered(x)[:2, None]).flatten(1)),
    "numbered parts with a gate": vectors(
        lambda net, x: (x.view(3, 4, 2) * (net.a(x)[:, :, None] * numbered(x)[:2])).flatten(1),
        a=lambda: nn.Linear(8, 4),
        free=4,
    ),
    # --- tables
    "embedding": vectors(
        lambda net, x: x + net.a((x > 0.5).long().sum(1)), a=lambda: nn.Embedding(9, 8)
    ),
    "embedding of a number for each unit": vectors(
        lambda net, x: net.a((x > 0.5).long()).sum(2), 12, a=lambda: nn.Embedding(2, 4)
    ),
    "index by a number for each unit": vectors(
        lambda net, x: net.a[(x > 0.5).long()].sum(2), 4, a=table(2, 4)
    ),
    "index units": vectors(lambda net, x: x[:, [3, 1, 2]], outputs=3),
    "index rows": tokens(lambda net, x: x + net.a[torch.tensor([0, 0, 1, 2, 1])], a=table(3, 8)),
    # --- written or read at numbered places
    "sums over edges": vectors(lambda net, x: torch.zeros_like(x).index_add(0, EDGES, x[FROM])),
    "sparse product": vectors(lambda net, x: torch.sparse.mm(_edges_of(x), x)),
    "sparse product, as an operator": vectors(lambda net, x: _edges_of(x) @ x),
    "sparse product and a sum": vectors(lambda net, x: torch.sparse.addmm(x, _edges_of(x), x)),
    "sums of unit numbers": vectors(lambda net, x: x.index_add(1, EDGES, x[:, FROM]), 0),
    "rows copied": vectors(lambda net, x: x.index_copy(0, EDGES[1:3], net.a), a=table(2, 8)),
    "rows filled": vectors(lambda net, x: x.tanh().index_fill(0, EDGES[:1], 0.3)),
    "rows reduced": vectors(lambda net, x: x.index_reduce(0, EDGES, x[FROM], "amax")),
    "scattered": vectors(lambda net, x: x.scatter(0, EDGES[1:3, None].expand(2, 8), x[:2])),
    "scattered sums": vectors(
        lambda net, x: x.scatter_add(0, EDGES[:, None].expand(5, 8), x[FROM])
    ),
    "scattered sums, repeated": vectors(
        lambda net, x: x.scatter_add(0, _row_of(x).repeat(1, 8), x)
    ),
    "scattered means": vectors(
        lambda net, x: x.scatter_reduce(0, EDGES[:, None].expand(5, 8), x[FROM], "mean")
    ),
    "scattered by units": vectors(lambda net, x: x.scatter_add(1, x.argsort(1), x), 0),
    "scattered for each unit": vectors(lambda net, x: x.scatter_add(0, (x > 0.1).long(), x)),
    "put": vectors(lambda net, x: x.index_put((EDGES,), x[FROM], accumulate=True)),
    "put where a mask says": tokens(lambda net, x: x.index_put((MASK,), net.a), a=table(8)),
    "put one value": vectors(lambda net, x: x.index_put((x > 0.5,), torch.tensor(0.1))),
    "put in units": vectors(lambda net, x: x.index_put((EDGES, FROM), torch.tensor(0.1)), 0),
    "put in masked rows": tokens(lambda net, x: x.index_put((MASK,), x[MASK].cumsum(0))),
    "slice written": vectors(lambda net, x: x.slice_scatter(net.a, 0, 1, 3), a=table(2, 8)),
    "row written": vectors(lambda net, x: x.select_scatter(net.a, 0, 1), a=table(8)),
    "unit written": vectors(lambda net, x: x.select_scatter(x.mean(1), 1, 2), 0),
    "bags": vectors(lambda net, x: net.a((x > 0.5).long()) + x, a=lambda: nn.EmbeddingBag(2, 8)),
    "weighted bags": vectors(
        lambda net, x: net.a(EDGES[:3, None], per_sample_weights=x.mean(1, True)) + x,
        a=lambda: nn.EmbeddingBag(3, 8, mode="sum"),
    ),
    "grid_sample": images(lambda net, x: F.grid_sample(x, GRID.expand(x.shape[0], -1, -1, -1))),
    "affine grid": images(
        lambda net, x: F.grid_sample(
            x, F.affine_grid(x.mean((1, 2, 3)).view(2, 1, 1) * THETA, [2, 8, 4, 4], False)
        ),
    ),
    "grid_sample of volumes": volumes(
        lambda net, x: F.grid_sample(x, torch.linspace(-1, 1, 162).view(2, 3, 3, 3, 3))
    ),
    "unpool": images(
        lambda net, x: F.max_unpool2d(*_pair(F.max_pool2d(x, 2, return_indices=True)), 2)
    ),
    "buckets": vectors(lambda net, x: x + torch.bucketize(x, torch.tensor([0.1, 0.5]))),
    # --- positions of a matrix, frequencies
    "tril": tokens(lambda net, x: (x @ x.mT).tril() @ x),
    "triu of units": tokens(lambda net, x: x.triu(), 0),
    "diagonal": tokens(lambda net, x: x * (x @ x.mT).diagonal(0, 1, 2)[..., None]),
    "diagonal of tokens": tokens(lambda net, x: x * torch.diag_embed(x.mean(2)).sum(1)[..., None]),
    "units on a diagonal": vectors(lambda net, x: x.diag_embed().sum(1)),
    "diagonal of two axes of units": vectors(
        lambda net, x: x[:, :, None].mul(net.a).diagonal(0, 1, 2), a=table(8, 8)
    )._replace(free=0),
    "fft of pixels": images(lambda net, x: torch.fft.irfft2(torch.fft.rfft2(x).abs())),
    "fft both ways": tokens(lambda net, x: torch.fft.ifft(torch.fft.fft(x, dim=1), dim=1).real),
    "pairs as complex numbers": tokens(
        lambda net, x: torch.view_as_real(
            torch.view_as_complex(x.unflatten(2, (4, 2))) * PHASES
        ).flatten(2),
        free=4,
    ),
    "numbered pairs as complex numbers": tokens(
        lambda net, x: torch.view_as_real(
            torch.view_as_complex(x.unflatten(2, (4, 2))) * torch.arange(4.0)
        ).flatten(2),
        free=0,
    ),
    "polar": vectors(lambda net, x: torch.polar(x, net.a + x).abs() + x.exp().angle(), a=table(8)),
    "cross": tokens(lambda net, x: x + torch.linalg.cross(x[:, :3], x[:, 2:], dim=1).mean(1, True)),
    # --- products of their own kinds
    "bilinear": vectors(
        lambda net, x: net.a(x, net.b(x)),
        a=lambda: nn.Bilinear(8, 5, 8),
        b=lambda: nn.Linear(8, 5),
        free=21,
    ),
    "cdist": vectors(lambda net, x: -torch.cdist(x, net.a), a=table(7, 8), outputs=7, free=15),
    "pdist": vectors(lambda net, x: x * F.pdist(x).mean()),
    "dist": vectors(lambda net, x: x * torch.dist(x, net.a), a=table(8)),
    "dot": vectors(lambda net, x: torch.stack([v * (v @ net.a) for v in _three(x)]), a=table(8)),
    "addmv": vectors(
        lambda net, x: torch.stack([torch.addmv(net.b, net.a, v) for v in _three(x)]),
        a=table(7, 8),
        b=table(7),
        outputs=7,
        free=15,
    ),
    "addr": vectors(lambda net, x: torch.addr(x, x.mean(1), net.a), a=table(8)),
    # --- losses within a network
    "loss": vectors(lambda net, x: x * F.mse_loss(x, x.tanh()) + F.l1_loss(x, x.exp())),
    "loss of each": vectors(lambda net, x: F.huber_loss(x, x.sin(), reduction="none")),
    "logsigmoid": vectors(lambda net, x: F.logsigmoid(x) + torch.copysign(x, 0.5 - x)),
    # --- operators without a rule
    "fft": vectors(lambda net, x: torch.fft.rfft(x, dim=1).abs(), outputs=5, free=0),
}


def _row_of(x):
    return x.mean(1, True).mul(9).long() % 3


def _pair(parts):
    return parts[0], parts[1]


def _three(x):
    return [x[0], x[1], x[2]]


def _normalised(q, k):
    """Attention by cosines, in two heads whose units are normalised."""
    q, k = (F.normalize(t.view(2, 5, 2, 3).transpose(1, 2), dim=-1) for t in (q, k))
    return (q @ k.mT).softmax(-1).mean(1)


def _two(x):
    return [x[0], x[1]]


def _pooled_attention(net, q, k, v):
    """Two heads, their keys pooled along tokens and normalised by what all heads share."""
    q, k, v = (t.view(2, 5, 2, 4).transpose(1, 2) for t in (q, k, v))
    k = net.norm(net.pool(k.reshape(4, 5, 4).mT).mT).view(2, 2, 3, 4)
    return ((q @ k.mT).softmax(-1) @ v[:, :, :3]).transpose(1, 2).reshape(2, 5, 8)


# Networks for which a permutation of all spaces once changed the function, or failed.
FOUND_IN_THE_WILD = {
    "vector times matrix": vectors(
        lambda net, x: torch.stack([v @ net.a for v in _three(x)]), outputs=7, a=table(8, 7)
    ),
    "axis taken away in place": vectors(lambda net, x: x.tanh().unsqueeze(1).squeeze_(1)),
    "axis added in place": vectors(lambda net, x: x.tanh().unsqueeze_(1).sum(1)),
    "axes exchanged in place": vectors(lambda net, x: x.tanh().t_().t()),
    "one unit taken out beside the others": vectors(lambda net, x: x * x[:, :1].sigmoid(), 7),
    "one unit picked by number beside the others": vectors(lambda net, x: x * x[:, [3]], 7),
    "one unit changed in place": images(lambda net, x: _second(x.select(1, 2).mul_(0.1), x), 7),
    "copied into fresh memory": vectors(lambda net, x: torch.empty_like(x).copy_(x)),
    "copied into zeros": vectors(lambda net, x: torch.zeros_like(x).copy_(x)),
    "copied into a part": vectors(lambda net, x: _into_zeros(x, "copy_")),
    "added into a part": vectors(lambda net, x: _into_zeros(x, "add_")),
    "circular padding": images(
        **kept(lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"))
    ),
    "two constants beside the units": vectors(
        lambda net, x: F.pad(F.pad(x, (0, 2)), (0, 2), value=1.0), outputs=12
    ),
    "another constant beside the units": vectors(
        lambda net, x: torch.cat([x, torch.full_like(x, 2.0)[:, :3]], 1), outputs=11
    ),
    "zeros that become something": vectors(
        lambda net, x: torch.cat([F.pad(x, (0, 2)), F.pad(x, (0, 2)).sigmoid()], 1), outputs=20
    ),
    "padding that a norm shifts by groups": images(
        lambda net, x: net.part(F.pad(x, (0, 0, 0, 0, 1, 3))),
        outputs=12,
        part=lambda: nn.GroupNorm(2, 12),
    ),
    "padding that a depthwise convolution reads": images(
        lambda net, x: net.part(F.pad(x, (0, 0, 0, 0, 4, 0))),
        outputs=12,
        part=lambda: nn.Conv2d(12, 12, 3, groups=12),
    ),
    "grouped transposed convolution": images(
        **kept(lambda: nn.ConvTranspose2d(8, 8, 2, 2, groups=2))
    ),
    "grouped convolution of the input": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 1)),
        (2, 4, 6, 6),
        8,
    ),
    "one group of kernels for all groups": images(
        lambda net, x: F.conv2d(x, net.a.repeat(4, 1, 1, 1), groups=4), a=table(2, 2, 3, 3)
    ),
    "one kernel for all channels": images(
        lambda net, x: F.conv2d(x, net.a.repeat(8, 1, 1, 1), groups=8), a=table(1, 1, 3, 3)
    ),
    "convolution weight that is computed": images(
        lambda net, x: F.conv2d(x, net.a.cumsum(0)), a=table(8, 8, 3, 3)
    ),
    "gates of which some are numbers": vectors(
        lambda net, x: (
            x.view(3, 4, 2) * torch.cat([net.a(x), numbered(x)[:2].expand(3, 2)], 1)[:, :, None]
        ).flatten(1),
        a=lambda: nn.Linear(8, 2),
    ),
    "sum with numbers beside a gate": vectors(
        lambda net, x: torch.addcmul(
            numbered(x)[:4].expand(3, 2, 4), x.view(3, 2, 4), net.a(x)[:, :, None]
        ).flatten(1),
        a=lambda: nn.Linear(8, 2),
    ),
    "weight norm": images(
        lambda net, x: F.conv2d(x, torch._weight_norm(net.a, net.b, 0)),
        a=table(8, 8, 3, 3),
        b=table(8, 1, 1, 1),
    ),
    "two parameter axes flattened into one": vectors(
        lambda net, x: (
            torch.einsum("ni,eio->neo", x, net.a) * net.b(x).softmax(1).unsqueeze(2)
        ).sum(1),
        outputs=7,
        a=table(3, 8, 7),
        b=lambda: nn.Linear(8, 3),
    ),
    "convolution mixed from several": images(
        lambda net, x: F.conv2d(
            x, (net.b(x.mean((0, 2, 3))).softmax(0) @ net.a.flatten(1)).view(8, 8, 1, 1)
        ),
        a=table(3, 8, 8),
        b=lambda: nn.Linear(8, 3),
    ),
}


def _second(a, b):
    return b


def _into_zeros(x, how):
    whole = torch.zeros_like(x)
    getattr(whole.narrow(1, 0, 4), how)(x.narrow(1, 4, 4))
    return whole


def build(case):
    generator = torch.Generator().manual_seed(5)
    return randomise(case.build(), seed=3), torch.randn(case.shape, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_permuting_every_space_keeps_the_function(name):
    net, x = build(CASES[name])
    spaces, permuted = fxfuse.find_spaces(net, x), fxfuse.permute(net, x)
    assert gap(net, permuted, x) <= PERMUTATION
    assert spaces.free_units == CASES[name].free
    assert bool(moved(net, permuted)) == bool(CASES[name].free)
    loaded, other = CASES[name].build().eval(), torch.randn(CASES[name].shape)
    loaded.load_state_dict(permuted.state_dict())
    assert gap(net, loaded, other) <= PERMUTATION, "in the class, on other inputs"


FUSED = [
    *("winners", "last states", "recurrent in layers", "grouped transposed conv"),
    *("depthwise transposed multiplied", "one kernel expanded", "grid_sample", "bags", "bilinear"),
    *(
        "weights under a mask of truth values",
        "a choice for each unit",
        "fft of pixels",
        "pairs as complex numbers",
        "cdist",
        "tril",
    ),
]


@pytest.mark.parametrize("name", FUSED)
def test_a_network_fused_with_its_permuted_copy_comes_back(name):
    net, x = build(CASES[name])
    fused = fxfuse.fuse([net, fxfuse.permute(net, x, seed=1)], x)
    assert gap(net, fused, x + 0.1 * x.flip(0)) < 1e-3


@pytest.mark.parametrize("name", FOUND_IN_THE_WILD)
def test_permuting_every_space_keeps_the_function_of_networks_found_in_the_wild(name):
    net, x = build(FOUND_IN_THE_WILD[name])
    assert max(gap(net, fxfuse.permute(net, x, seed=s), x) for s in range(3)) <= PERMUTATION


@pytest.fixture
def applied(monkeypatch):
    """The names of the rule functions that ran."""
    names = set()

    def watched(rule):
        @functools.wraps(rule)
        def run(*args):
            names.add(rule.__name__)
            return rule(*args)

        return run

    for key, row in OPERATORS.items():
        monkeypatch.setitem(OPERATORS, key, replace(row, rule=watched(row.rule)))
    for name in ("OTHER_ELEMENTWISE", "UNKNOWN"):
        row = getattr(operators, name)
        monkeypatch.setattr(operators, name, replace(row, rule=watched(row.rule)))
    return names


def test_every_rule_is_exercised_by_a_case(applied):
    for case in [*CASES.values(), *FOUND_IN_THE_WILD.values()]:
        net, x = build(case)
        graph = trace(net, x)
        label_network(graph, x if isinstance(x, tuple) else (x,))
    mirrored_linear(bias=True)
    assert {row.rule.__name__ for row in OPERATORS.values()} | {"unknown"} == applied


def test_every_row_is_of_an_operator_of_aten():
    assert [name for name in OPERATORS if not hasattr(torch.ops.aten, name)] == []


@torch.library.custom_op("fxfuse_tests::linear", mutates_args=())
def another_linear(x: torch.Tensor, scale: float) -> torch.Tensor:
    """An operator of another library that is called as one of ATen's."""
    return x * scale


def test_the_operators_of_other_libraries_have_no_row():
    net, x = build(vectors(lambda net, x: another_linear(x, 2.0), free=0))
    spaces = fxfuse.find_spaces(net, x)
    assert spaces.free_units == 0
    assert any("fxfuse_tests.linear" in f.reason for f in spaces.frozen)


# --- operators of other backends ------------------------------------------------------------------


def mirrored_linear(bias):
    """Mirror `aten.linear`, which other backends run in one piece; the CPU takes it apart."""
    layer, x = nn.Linear(8, 5, bias=bias), torch.zeros(2, 3, 8)
    run = LabelRun(layer.named_parameters())
    units = run.ledger.new(8)
    run.put(x, Labels((units.view(1, 1, 8),)))
    args = (x, layer.weight, layer.bias) if bias else (x, layer.weight)
    out = torch.zeros(2, 3, 5)
    mirror(run, torch.ops.aten.linear.default, args, {}, out)
    return run, units, out


@pytest.mark.parametrize("bias", [False, True])
def test_linear_in_one_piece_ties_its_inputs_weight_and_bias(bias):
    run, units, out = mirrored_linear(bias)
    axes = {place: labels.tolist() for place, labels in run.ledger.axes.items()}
    tied = {p for t in run.ledger.ties for p in zip(*(x.tolist() for x in t))}
    expected = {*zip(units.tolist(), axes["weight", 1])}
    if bias:
        expected |= {*zip(axes["weight", 0], axes["bias", 0])}
    assert {frozenset(p) for p in tied} == {frozenset(p) for p in expected}
    assert [x.flatten().tolist() for x in run.of(out).layers] == [axes["weight", 0]]


def described(net, size):
    ledger = label_network(trace(nn.Sequential(net)), (torch.zeros(2, size, 6, 6),))
    return [step for steps in ledger.steps.values() for step in steps]


def test_widths_do_not_describe_an_operator():
    assert described(nn.Conv2d(4, 4, 3), 4) == described(nn.Conv2d(8, 6, 3), 8)
    assert described(nn.Conv2d(4, 4, 3, groups=4), 4) == described(nn.Conv2d(8, 8, 3, groups=8), 8)
    assert described(nn.BatchNorm2d(4), 4) == described(nn.BatchNorm2d(8), 8)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 5)),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2)),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1)),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, dilation=2)),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2)),
        (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=4)),
        (nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)),
        (nn.MaxPool2d(2), nn.MaxPool2d(3)),
        (nn.MaxPool2d(2), nn.AvgPool2d(2)),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
        (nn.ReLU(), nn.GELU()),
        (nn.BatchNorm2d(4), nn.GroupNorm(2, 4)),
    ],
    ids=repr,
)
def test_hyperparameters_describe_an_operator(a, b):
    assert described(a, 4) != described(b, 4)


@pytest.mark.parametrize("labels", [Labels((torch.zeros(2, 2, dtype=torch.long),)), None])
def test_a_rule_that_fails_freezes_what_it_does_not_cover(labels, monkeypatch):
    """Labels that do not fit the output, or an error."""
    row = replace(OPERATORS["clone"], rule=lambda run, op: labels)
    monkeypatch.setitem(OPERATORS, "clone", row)
    spaces = fxfuse.find_spaces(*build(vectors(lambda net, x: x.clone())))
    assert spaces.free_units == 0
    assert any("does not cover" in f.reason for f in spaces.frozen)
