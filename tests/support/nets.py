"""Small networks, each with one structure that fusion has to see, and random networks.

`randomise` gives every parameter and buffer random values: the zeros and ones of fresh networks
(biases, affine parameters, running statistics, heads) hide wrong permutations.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import fx, nn

from fxfuse.calibration.data import Calibration
from fxfuse.fusion._guard import split_to_judge


def randomise(module, seed=0):
    """Draw every parameter and buffer from a seed; return the module, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(_draw(name.rpartition(".")[2], tensor, generator))
    return module.eval()


def _draw(leaf, tensor, generator):
    normal = torch.randn(tensor.shape, generator=generator)
    if leaf == "running_var" or (leaf == "weight" and tensor.dim() == 1):
        return 0.6 + normal.abs() / 2
    if tensor.dim() < 2:
        return normal * 0.3
    return normal * 1.4 / max(tensor[0].numel(), 1) ** 0.5


def outputs(module, *inputs):
    with torch.no_grad():
        return module(*inputs)


def gap(before, after, *inputs):
    """Largest difference of two networks' outputs, relative to the largest output of the first."""
    a, b = outputs(before, *inputs), outputs(after, *inputs)
    assert a.shape == b.shape and bool(torch.isfinite(b).all())
    assert float(a.abs().max()) > 0.01, "outputs of zero would hide every difference"
    return float((a - b).abs().max() / a.abs().max())


def fitted(x):
    """Return the samples of `(N, ...)` that `fuse` fits to; it holds out the others."""
    return next(split_to_judge(Calibration(x), fits=True).fit.chunks(len(x)))[0]


def moved(before, after):
    """Names of the parameters and buffers that differ."""
    a, b = before.state_dict(), after.state_dict()
    return {name for name in a if not torch.equal(a[name], b[name])}


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def run_node(self, n):
        self.seen[n.name] = value = super().run_node(n)
        return value


def values(graph, *inputs):
    """Return the value of every node of a graph by name."""
    recorder = Recorder(graph)
    recorder.seen = {}
    with torch.no_grad():
        recorder.run(*inputs)
    return recorder.seen


# --- building blocks ------------------------------------------------------------------------------


def conv(inputs, outputs, kernel=3, norm=True, act=True, groups=1, stride=1, bias=None):
    """Convolution, norm and ReLU; it has a bias if no norm follows, or if asked for."""
    bias = not norm if bias is None else bias
    parts = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)]
    parts += [nn.BatchNorm2d(outputs)] * norm + [nn.ReLU()] * act
    return nn.Sequential(*parts)


class Residual(nn.Module):
    def __init__(self, inputs, outputs, inner=None, stride=1, groups=1):
        super().__init__()
        inner = inner or outputs
        self.a = conv(inputs, inner, stride=stride)
        self.b = conv(inner, outputs, act=False, groups=groups)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else conv(inputs, outputs, 1, act=False, stride=stride)

    def forward(self, x):
        return torch.relu(self.b(self.a(x)) + self.skip(x))


class GroupedBottleneck(nn.Module):
    def __init__(self, width, inner, groups):
        super().__init__()
        self.a = conv(width, inner, 1)
        self.b = conv(inner, inner, groups=groups)
        self.c = conv(inner, width, 1, act=False)

    def forward(self, x):
        return torch.relu(x + self.c(self.b(self.a(x))))


class PaddedShortcut(nn.Module):
    """A block whose shortcut has no parameters: every second pixel, zeros for new channels."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.a, self.b = conv(inputs, outputs, stride=2), conv(outputs, outputs, act=False)
        self.extra = (outputs - inputs) // 2

    def forward(self, x):
        skip = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return torch.relu(self.b(self.a(x)) + skip)


class Concat(nn.Module):
    """A dense layer: what it computes is appended to what it reads."""

    def __init__(self, inputs, growth):
        super().__init__()
        self.a = conv(inputs, growth)

    def forward(self, x):
        return torch.cat([x, self.a(x)], 1)


class Grown(nn.Module):
    """Dense layers with the norm in front, written with one list of all values so far."""

    def __init__(self, inputs, growth, layers):
        super().__init__()
        widths = [inputs + growth * i for i in range(layers)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, growth, 3, 1, 1))
            for n in widths
        )

    def forward(self, x):
        seen = [x]
        for layer in self.layers:
            seen.append(layer(torch.cat(seen, 1)))
        return torch.cat(seen, 1)


class Gate(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    """An inverted bottleneck: expand, depthwise convolution, gate, project, around a skip."""

    def __init__(self, width, inner, gate=0):
        super().__init__()
        self.a, self.b = conv(width, inner, 1), conv(inner, inner, groups=inner)
        self.gate = Gate(inner, gate) if gate else nn.Identity()
        self.c = conv(inner, width, 1, act=False)

    def forward(self, x):
        return x + self.c(self.gate(self.b(self.a(x))))


class Shuffle(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, x):
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class Twice(nn.Module):
    """One convolution applied twice: its inputs and outputs are the same units."""

    def __init__(self, width):
        super().__init__()
        self.a = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.a(torch.relu(self.a(x))))


class Pooled(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


class Functional(nn.Module):
    """The plain network written with functions, with dropout that follows the mode."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = F.dropout(F.relu(self.a(x)), 0.5, self.training)
        return self.c(F.dropout(F.relu(self.b(x)), p=0.5, training=self.training))


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and around a skip."""

    def __init__(self, width, heads, inner):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Tokens(nn.Module):
    """A class token, a position table and blocks of attention."""

    def __init__(self, width=8, heads=2, inner=12, depth=1):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 5, width))
        self.blocks = nn.Sequential(*[Block(width, heads, inner) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class States(nn.Module):
    """Sums places up in a few states, mixes the channels of each, and spreads them to the places.

    A value in between has free units along two axes, the channels and the states.
    """

    def __init__(self, width=6, states=5):
        super().__init__()
        self.pick = nn.Conv1d(width, 2 * states, 1)
        self.inner, self.outer = nn.Conv1d(width, width + 1, 1), nn.Conv1d(width + 1, width, 1)

    def forward(self, x):
        x = x.flatten(2)
        read, write = self.pick(x).chunk(2, dim=1)
        state = x @ read.softmax(-1).transpose(1, 2)
        state = self.outer(F.relu(self.inner(state)))
        return (x + state @ write.tanh()).mean(-1)


def mlp(*widths, norm=False, act=nn.ReLU, bias=True):
    """Linear layers of the given widths, with an activation behind each but the last."""
    parts = []
    for i, o in zip(widths[:-2], widths[1:-1]):
        parts += [nn.Linear(i, o, bias=bias)] + [nn.BatchNorm1d(o)] * norm + [act()]
    return nn.Sequential(*parts, nn.Linear(*widths[-2:]))


def stages(*widths, norm=True, classes=3, hidden=()):
    """Convolution stages with max-pooling behind each, then linear layers: `[[4, 4], [8]]`."""
    parts, before = [], 3
    for stage in widths:
        for width in stage:
            parts.append(conv(before, width, norm=norm))
            before = width
        parts.append(nn.MaxPool2d(2))
    side = 8 >> len(widths)
    head = mlp(before * side * side, *hidden, classes)
    return nn.Sequential(nn.Sequential(*parts), nn.Flatten(), head)


def residual(*stages, stem=6, classes=3, stride=2, inner=None):
    """A stem and stages of residual blocks: `(6, 2), (8, 1)` is `(width, blocks)` of each."""
    parts, before = [conv(3, stem)], stem
    for i, (width, blocks) in enumerate(stages):
        first = Residual(before, width, inner, stride if i else 1)
        rest = [Residual(width, width, inner) for _ in range(blocks - 1)]
        parts.append(nn.Sequential(first, *rest))
        before = width
    return nn.Sequential(*parts, Pooled(before, classes))


# --- the table ------------------------------------------------------------------------------------


class Net(NamedTuple):
    """A function that builds a network, the shape of its input, and the sizes of its spaces."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    sizes: tuple[int, ...]


IMAGE = (2, 3, 8, 8)


def _image(*parts, width):
    return nn.Sequential(*parts, Pooled(width, 3))


NETS = {
    "plain": Net(lambda: mlp(6, 8, 7, 3), (2, 6), (7, 8)),
    "functional": Net(Functional, (2, 6), (7, 8)),
    "layer norm": Net(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)),
        (2, 6),
        (8,),
    ),
    "flatten": Net(lambda: stages([5], norm=False, hidden=(7,)), IMAGE, (5, 7)),
    "batch norm": Net(lambda: stages([5, 6], [7]), IMAGE, (5, 6, 7)),
    # streams of 6 and 8, and one inner space for each of the three blocks
    "residual": Net(lambda: residual((6, 2), (8, 1)), IMAGE, (6, 6, 6, 8, 8)),
    # the stream, the groups, and the units inside the groups: inputs and outputs
    "grouped": Net(
        lambda: _image(conv(3, 6), GroupedBottleneck(6, 8, 4), width=6), IMAGE, (4, 6, 8, 8)
    ),
    # the stream has two spaces: the channels of the stem, and those that the padding adds
    "padded": Net(lambda: _image(conv(3, 4), PaddedShortcut(4, 10), width=10), IMAGE, (4, 6, 10)),
    "concat": Net(
        lambda: _image(conv(3, 4), Concat(4, 3), Concat(7, 5), width=12), IMAGE, (3, 4, 5)
    ),
    "depthwise": Net(lambda: _image(conv(3, 6), Inverted(6, 9), width=6), IMAGE, (6, 9)),
    "gate": Net(lambda: _image(conv(3, 6), Inverted(6, 9, gate=4), width=6), IMAGE, (4, 6, 9)),
    "shared": Net(lambda: _image(conv(3, 6), Twice(6), width=6), IMAGE, (6,)),
    # The shuffle spreads each group of the first convolution over all groups of the second. A unit
    # lies in two blocks, which stay, and moves inside their intersection.
    "shuffle": Net(
        lambda: _image(conv(3, 8), conv(8, 8, groups=2), Shuffle(2), conv(8, 8, groups=2), width=8),
        IMAGE,
        (2, 2, 2, 2, 4, 4, 4, 4),
    ),
    # stream, MLP; heads, and inside them query/key and value/output units
    "tokens": Net(Tokens, IMAGE, (2, 8, 8, 8, 12)),
    # states, stream, units between the two layers inside
    "states": Net(
        lambda: nn.Sequential(conv(3, 6), States(6, 5), nn.Linear(6, 3)), IMAGE, (5, 6, 7)
    ),
}


def build(name, seed=0):
    """Return a network of the table and a batch for it, both random."""
    net = NETS[name]
    x = torch.randn(net.shape, generator=torch.Generator().manual_seed(seed + 1))
    return randomise(net.build(), seed), x


# --- random networks ------------------------------------------------------------------------------

_STEPS = {  # (channels before it, a drawn width) -> (module, channels behind it)
    "conv": lambda c, w: (conv(c, w), w),
    "bias": lambda c, w: (conv(c, w, norm=False), w),
    "linear": lambda c, w: (conv(c, w, 1, norm=True, act=False, bias=True), w),
    "residual": lambda c, w: (Residual(c, c, w), c),
    "project": lambda c, w: (Residual(c, w), w),
    "concat": lambda c, w: (Concat(c, w), c + w),
    "grouped": lambda c, w: (conv(c, w, groups=2), w),
    "block": lambda c, w: (GroupedBottleneck(c, w, 2), c),
    "depthwise": lambda c, w: (conv(c, c, groups=c), c),
    "inverted": lambda c, w: (Inverted(c, w, gate=3), c),
    "gate": lambda c, w: (Gate(c, w), c),
    "shuffle": lambda c, w: (Shuffle(2), c),
    "shared": lambda c, w: (Twice(c), c),
    "pool": lambda c, w: (nn.MaxPool2d(3, 1, 1), c),
}


def random_net(steps, flatten, seed):
    """Compose `(name, width)` steps behind a stem into a network for 8 x 8 images."""
    parts, channels = [conv(3, 4, stride=2)], 4
    for name, width in steps:
        part, channels = _STEPS[name](channels, width)
        parts.append(part)
    if flatten:
        parts += [nn.MaxPool2d(2), nn.Flatten(), mlp(channels * 4, 6, 3)]
    else:
        parts.append(Pooled(channels, 3))
    return randomise(nn.Sequential(*parts), seed)


@st.composite
def random_nets(draw, max_steps=4):
    """Draw a small random network, in eval mode, with random values everywhere."""
    step = st.tuples(st.sampled_from(sorted(_STEPS)), st.sampled_from([2, 4, 6, 8]))
    steps = draw(st.lists(step, max_size=max_steps))
    return random_net(steps, draw(st.booleans()), draw(st.integers(0, 1000)))


def data_shape(name):
    """Return the shape of one sample of a network of the table."""
    return NETS[name].shape[1:]
