"""Small networks, written as people write them: each class takes a depth and a width.

None was written with this library in mind. `ZOO` has them by name, with what they take as input.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

CLASSES, PIXELS, LENGTH, VOCABULARY, FEATURES, NODES = 4, 12, 10, 20, 6, 7


class Animal(NamedTuple):
    """A network of the zoo.

    Attributes:
        build: From a depth and a width to a network.
        inputs: From a number of samples and a generator to what `forward` takes.
    """

    build: Callable[[int, int], nn.Module]
    inputs: Callable[[int, torch.Generator], Any]


ZOO: dict[str, Animal] = {}


def image(n, g):
    return torch.randn(n, 3, PIXELS, PIXELS, generator=g)


def vector(n, g):
    return torch.randn(n, FEATURES, generator=g)


def tokens(n, g):
    return torch.randint(1, VOCABULARY, (n, LENGTH), generator=g)


def sequence(n, g):
    return torch.randn(n, LENGTH, FEATURES, generator=g)


def wave(n, g):
    return torch.randn(n, 1, 64, generator=g)


def volume(n, g):
    return torch.randn(n, 1, 6, 8, 8, generator=g)


def points(n, g):
    return torch.randn(n, 3, 16, generator=g)


def two_images(n, g):
    return image(n, g), image(n, g)


def image_and_vector(n, g):
    return image(n, g), vector(n, g)


def tokens_and_mask(n, g):
    mask = torch.ones(n, LENGTH, dtype=torch.bool)
    mask[:, LENGTH - 3 :] = torch.rand(n, 3, generator=g) > 0.5
    return tokens(n, g), mask


def pairs_of_ids(n, g):
    return torch.randint(0, VOCABULARY, (n, 2), generator=g)


def graphs(n, g):
    """Features of nodes and a dense adjacency with loops, one graph a sample."""
    edges = (torch.rand(n, NODES, NODES, generator=g) > 0.6).float()
    return torch.randn(n, NODES, FEATURES, generator=g), torch.maximum(edges, torch.eye(NODES))


def animal(inputs):
    """Put a class into the zoo under its name."""

    def put(build):
        ZOO[build.__name__] = Animal(build, inputs)
        return build

    return put


# Vectors in


@animal(vector)
class SequentialMLP(nn.Sequential):
    def __init__(self, depth=2, width=8):
        layers = [nn.Linear(FEATURES, width), nn.ReLU()]
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.1)]
        super().__init__(*layers, nn.Linear(width, CLASSES))


@animal(vector)
class FunctionalMLP(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.fc_in = nn.Linear(FEATURES, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.fc_out = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = F.relu(self.fc_in(x))
        for layer in self.hidden:
            x = F.dropout(F.relu(layer(x)), 0.2, self.training)
        return F.log_softmax(self.fc_out(x), dim=-1)


@animal(vector)
class SharedActivationMLP(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.act = nn.GELU()
        self.layers = nn.ModuleList([nn.Linear(FEATURES, width)])
        self.layers.extend(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x):
        for layer in self.layers:
            x = self.act(layer(x))
        return self.out(x)


@animal(vector)
class NamedMLP(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        parts = OrderedDict(inp=nn.Linear(FEATURES, width), norm=nn.BatchNorm1d(width))
        for i in range(depth):
            parts[f"act{i}"] = nn.LeakyReLU(0.1)
            parts[f"fc{i}"] = nn.Linear(width, width)
        self.body, self.head = nn.Sequential(parts), nn.Linear(width, CLASSES, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


@animal(vector)
class HighwayMLP(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.inp = nn.Linear(FEATURES, width)
        self.lin = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.gate = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.inp(x)
        for lin, gate in zip(self.lin, self.gate):
            t = torch.sigmoid(gate(x))
            x = t * F.relu(lin(x)) + (1 - t) * x
        return self.out(x)


@animal(vector)
class ResidualMLP(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.inp = nn.Linear(FEATURES, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.SiLU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(self.norm(x))


@animal(vector)
class GatedLinearUnits(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.inp = nn.Linear(FEATURES, width)
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.inp(x)
        for up, down in zip(self.up, self.down):
            a, b = up(x).chunk(2, dim=-1)
            x = x + down(F.silu(a) * b)
        return self.out(x)


@animal(vector)
class Autoencoder(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        half = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
        self.encoder = nn.Sequential(
            nn.Linear(FEATURES, width), nn.ReLU(), *half, nn.Linear(width, 3)
        )
        self.decoder = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, FEATURES))

    def forward(self, x):
        code = self.encoder(x)
        return {"code": code, "reconstruction": self.decoder(code)}


@animal(vector)
class VariationalAutoencoder(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU())
        for _ in range(depth - 1):
            self.encode.append(nn.Linear(width, width)).append(nn.ReLU())
        self.mean, self.log_variance = nn.Linear(width, 3), nn.Linear(width, 3)
        self.decode = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, FEATURES))

    def forward(self, x):
        h = self.encode(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean
        if self.training:
            z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decode(z), mean, log_variance


@animal(vector)
class TwoHeads(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU())
        for i in range(depth):
            self.trunk.add_module(f"more{i}", nn.Sequential(nn.Linear(width, width), nn.ReLU()))
        self.policy, self.value = nn.Linear(width, CLASSES), nn.Linear(width, 1)

    def forward(self, x):
        x = self.trunk(x)
        return self.policy(x), self.value(x).squeeze(-1)


@animal(vector)
class DuelingQ(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU())
        self.more = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.value, self.advantage = nn.Linear(width, 1), nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.body(x)
        for layer in self.more:
            x = layer(x).relu()
        a = self.advantage(x)
        return self.value(x) + a - a.mean(dim=1, keepdim=True)


@animal(vector)
class MixtureOfExperts(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.inp = nn.Linear(FEATURES, width)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(depth + 1)
        )
        self.router = nn.Linear(width, depth + 1)
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = F.relu(self.inp(x))
        gates = self.router(x).softmax(-1)
        y = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.out((gates.unsqueeze(-1) * y).sum(1))


@animal(vector)
class Maxout(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(FEATURES, 2 * width)])
        self.layers.extend(nn.Linear(width, 2 * width) for _ in range(depth))
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).view(x.size(0), -1, 2).max(dim=-1)[0]
        return self.out(x)


@animal(vector)
class Siren(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.first = nn.Linear(FEATURES, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 1)
        self.omega = 3.0

    def forward(self, coordinates):
        x = torch.sin(self.omega * self.first(coordinates))
        for layer in self.layers:
            x = torch.sin(self.omega * layer(x))
        return self.last(x)


@animal(vector)
class FourierFeatures(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", torch.randn(FEATURES, 5, generator=g))
        self.net = nn.Sequential(nn.Linear(10, width), nn.ReLU())
        for _ in range(depth):
            self.net.extend([nn.Linear(width, width), nn.ReLU()])
        self.out = nn.Linear(width, 1)

    def forward(self, x):
        angles = 2 * math.pi * x @ self.frequencies
        return self.out(self.net(torch.cat([angles.sin(), angles.cos()], dim=-1)))


@animal(vector)
class FlagInForward(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(FEATURES, width)])
        self.layers.extend(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x, embed=False, scale: float | None = None):
        assert x.shape[-1] == FEATURES, f"expected {FEATURES} features, got {x.shape[-1]}"
        for layer in self.layers:
            x = F.elu(layer(x))
        if scale is not None:
            x = x * scale
        if embed:
            return x
        return self.head(x)


@animal(vector)
class SharedLayerApplied(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.inp, self.out = nn.Linear(FEATURES, width), nn.Linear(width, CLASSES)
        self.step, self.times = nn.Linear(width, width), depth

    def forward(self, x):
        x = self.inp(x)
        for _ in range(self.times):
            x = x + torch.tanh(self.step(x))
        return self.out(x)


@animal(vector)
class LossInForward(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU())
        for _ in range(depth):
            self.net.append(nn.Linear(width, width)).append(nn.ReLU())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x, labels=None):
        logits = self.head(self.net(x))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if loss is not None else {"logits": logits}


@animal(pairs_of_ids)
class FactorisationMachine(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.linear = nn.Embedding(VOCABULARY, 1)
        self.mlp = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU())
        for _ in range(depth - 1):
            self.mlp.extend([nn.Linear(width, width), nn.ReLU()])
        self.out = nn.Linear(width, 1)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        e = self.embedding(ids)
        second = 0.5 * (e.sum(1).pow(2) - e.pow(2).sum(1)).sum(1, keepdim=True)
        return self.bias + self.linear(ids).sum(1) + second + self.out(self.mlp(e.flatten(1)))


@animal(pairs_of_ids)
class MatrixFactorisation(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.users, self.items = nn.Embedding(VOCABULARY, width), nn.Embedding(VOCABULARY, width)
        self.user_bias = nn.Embedding(VOCABULARY, 1)
        self.tower = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, ids):
        user, item = self.users(ids[:, 0]), self.items(ids[:, 1])
        for layer in self.tower:
            user = F.relu(layer(user))
        return (user * item).sum(-1) + self.user_bias(ids[:, 0]).squeeze(-1)


# Images in


@animal(image)
class LeNet(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 5, padding=2)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(width * (PIXELS // 2) ** 2, 2 * width)
        self.fc2 = nn.Linear(2 * width, CLASSES)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        for conv in self.convs:
            x = F.relu(conv(x))
        x = x.view(-1, self.fc1.in_features)
        return self.fc2(F.relu(self.fc1(x)))


@animal(image)
class PlainVGG(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        layers, channels = [], 3
        for stage in (width, 2 * width):
            for _ in range(depth):
                layers += [nn.Conv2d(channels, stage, 3, padding=1), nn.ReLU(inplace=True)]
                channels = stage
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 9, width), nn.ReLU(True), nn.Dropout(), nn.Linear(width, CLASSES)
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


def conv_norm_act(i, o, act=nn.ReLU, norm=nn.BatchNorm2d, **options):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False, **options), norm(o), act())


@animal(image)
class AllConvolutional(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.stem = conv_norm_act(3, width)
        self.body = nn.ModuleList(conv_norm_act(width, width, nn.SiLU) for _ in range(depth))
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x):
        x = self.stem(x)
        for part in self.body:
            x = part(x)
        return self.head(x).mean([2, 3])


class BasicBlock(nn.Module):
    def __init__(self, i, o, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(
                nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


@animal(image)
class SmallResNet(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*[BasicBlock(width, width) for _ in range(depth)])
        more = [BasicBlock(2 * width, 2 * width) for _ in range(depth - 1)]
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), *more)
        self.fc = nn.Linear(2 * width, CLASSES)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        x = F.avg_pool2d(x, x.shape[-1])
        return self.fc(x.view(x.size(0), -1))


@animal(image)
class PreActivationResNet(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm, self.fc = nn.BatchNorm2d(width), nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = torch.add(x, block(x))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1))


class SqueezeExcite(nn.Module):
    def __init__(self, width, reduction=2):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(width, width // reduction),
            nn.ReLU(),
            nn.Linear(width // reduction, width),
            nn.Sigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1).expand_as(x)


@animal(image)
class SqueezeExciteNet(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.stem = conv_norm_act(3, width)
        self.blocks = nn.Sequential(
            *[
                nn.Sequential(conv_norm_act(width, width), SqueezeExcite(width))
                for _ in range(depth)
            ]
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((-2, -1)))


class DenseLayer(nn.Module):
    def __init__(self, i, growth):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(i), nn.Conv2d(i, growth, 3, padding=1)

    def forward(self, x):
        return torch.cat((x, self.conv(F.relu(self.norm(x)))), 1)


@animal(image)
class DenseNet(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.dense = nn.Sequential(*[DenseLayer(width + 4 * i, 4) for i in range(depth)])
        self.transition = nn.Conv2d(width + 4 * depth, width, 1)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = F.relu(self.transition(self.dense(self.stem(x))))
        return self.fc(F.adaptive_max_pool2d(x, 1).flatten(1))


@animal(image)
class Inception(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.stem = conv_norm_act(3, width)
        self.branches = nn.ModuleList()
        for _ in range(depth):
            one, three = nn.Conv2d(width, width // 2, 1), nn.Conv2d(width, width // 2, 3, padding=1)
            self.branches.append(nn.ModuleDict({"one": one, "three": three}))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for b in self.branches:
            x = F.relu(torch.cat([b["one"](x), b["three"](x)], dim=1))
        return self.fc(x.mean(dim=(2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, width, expand=2):
        super().__init__()
        hidden = width * expand
        self.conv = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), nn.Hardswish(),
            nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x):
        return x + self.conv(x)


@animal(image)
class MobileNet(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.features = nn.Sequential(
            conv_norm_act(3, width), *[InvertedResidual(width) for _ in range(depth)]
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(width, CLASSES))

    def forward(self, x):
        x = self.features(x)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1)).reshape(x.shape[0], -1)
        return self.classifier(x)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


@animal(image)
class ConvNeXt(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x)).mean([-2, -1])))


class DoubleConv(nn.Sequential):
    def __init__(self, i, o, depth):
        super().__init__()
        for k in range(depth):
            self.extend(
                [nn.Conv2d(i if k == 0 else o, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(True)]
            )


@animal(image)
class UNet(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.down1, self.down2 = DoubleConv(3, width, 2), DoubleConv(width, 2 * width, 2)
        self.bottleneck = DoubleConv(2 * width, 2 * width, depth)
        self.pool = nn.MaxPool2d(2)
        self.up1 = nn.ConvTranspose2d(2 * width, 2 * width, 2, stride=2)
        self.conv1 = DoubleConv(4 * width, width, 2)
        self.up2 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv2 = DoubleConv(2 * width, width, 2)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(self.pool(a))
        c = self.bottleneck(self.pool(b))
        c = self.conv1(torch.cat([self.up1(c), b], dim=1))
        return self.out(self.conv2(torch.cat([self.up2(c), a], dim=1)))


@animal(image)
class FeaturePyramid(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.c1, self.c2 = conv_norm_act(3, width), conv_norm_act(width, 2 * width, stride=2)
        self.more = nn.Sequential(*[conv_norm_act(2 * width, 2 * width) for _ in range(depth)])
        self.lateral1, self.lateral2 = nn.Conv2d(width, width, 1), nn.Conv2d(2 * width, width, 1)
        self.smooth = nn.Conv2d(width, width, 3, padding=1)
        self.boxes, self.scores = nn.Conv2d(width, 4, 1), nn.Conv2d(width, CLASSES, 1)

    def forward(self, x):
        c1 = self.c1(x)
        c2 = self.more(self.c2(c1))
        p2 = self.lateral2(c2)
        p1 = self.lateral1(c1) + F.interpolate(p2, size=c1.shape[-2:], mode="nearest")
        maps = [self.smooth(p) for p in (p1, p2)]
        return {"boxes": [self.boxes(p) for p in maps], "scores": [self.scores(p) for p in maps]}


@animal(image)
class SuperResolution(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, 1, 1), nn.PReLU(width), nn.Conv2d(width, width, 3, 1, 1)
            )
            for _ in range(depth)
        )
        self.tail = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x):
        y = shortcut = self.head(x)
        for block in self.body:
            y = y + 0.1 * block(y)
        return self.tail(y + shortcut) + F.interpolate(x, scale_factor=2)


@animal(two_images)
class Siamese(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        layers = [conv_norm_act(3, width)] + [conv_norm_act(width, width) for _ in range(depth)]
        self.cnn = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(width, 1)

    def embed(self, x):
        return F.normalize(self.cnn(x), dim=1)

    def forward(self, a, b):
        return self.fc((self.embed(a) - self.embed(b)).abs())


@animal(image_and_vector)
class TwoTowers(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
        for _ in range(depth):
            self.image.append(nn.Conv2d(width, width, 3, 1, 1)).append(nn.ReLU())
        self.facts = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width))
        self.fuse = nn.Linear(2 * width, CLASSES)

    def forward(self, image, facts):
        a = self.image(image).flatten(2).mean(-1)
        return self.fuse(torch.cat((a, self.facts(facts)), dim=-1))


@animal(image_and_vector)
class FeaturewiseModulation(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.film = nn.ModuleList(nn.Linear(FEATURES, 2 * width) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x, condition):
        x = self.stem(x)
        for conv, film in zip(self.convs, self.film):
            gamma, beta = film(condition)[:, :, None, None].chunk(2, 1)
            x = F.relu(x + (1 + gamma) * conv(x) + beta)
        return self.head(x.mean((2, 3)))


@animal(image)
class GroupNormNet(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential()
        for i in range(depth):
            self.body.add_module(f"conv{i}", nn.Conv2d(width, width, 3, padding=1))
            self.body.add_module(f"norm{i}", nn.GroupNorm(2, width))
            self.body.add_module(f"act{i}", nn.Mish())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).amax(dim=(2, 3)))


@animal(image)
class DiffusionUNet(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.inp, self.out = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(depth))

    def forward(self, x):
        t = self.time(x.flatten(1).std(dim=1, keepdim=True))
        h = self.inp(x)
        for conv, norm in zip(self.blocks, self.norms):
            h = h + conv(F.silu(norm(h)) + t[..., None, None])
        return self.out(F.silu(h))


@animal(image)
class StepCounter(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.2, 0.3, 0.2]).view(1, 3, 1, 1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.net = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU())
        for _ in range(depth):
            self.net.extend([nn.Conv2d(width, width, 3, padding=1), nn.ReLU()])
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        if self.training:
            self.steps += 1
        x = self.net((x - self.mean) / self.deviation)
        return self.head(x.mean(-1).mean(-1))


@animal(image)
class ShuffleGroups(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.grouped = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, groups=2) for _ in range(depth)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for conv in self.grouped:
            b, c, h, w = x.shape
            x = F.relu(conv(x)).view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(x.mean((2, 3)))


@animal(image)
class DeepSupervision(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.stem = conv_norm_act(3, width)
        self.stages = nn.ModuleList(conv_norm_act(width, width) for _ in range(depth))
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in range(2))

    def forward(self, x):
        x = first = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return [self.heads[0](first), self.heads[1](x)]


@animal(image)
class Generator(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(3 * PIXELS**2, width))
        self.project = nn.Linear(width, width * 9)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(width, width, 3, padding=1) for _ in range(depth)
        )
        self.out = nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1)

    def forward(self, x):
        x = self.project(self.encode(x)).unflatten(1, (-1, 3, 3))
        for up in self.up:
            x = F.leaky_relu(up(x), 0.2)
        return torch.tanh(self.out(x))


@animal(volume)
class Video(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.conv = nn.Conv3d(1, width, 3, padding=1)
        self.more = nn.Sequential()
        for _ in range(depth):
            self.more.extend(
                [nn.Conv3d(width, width, 3, padding=1), nn.BatchNorm3d(width), nn.ReLU()]
            )
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.fc(self.more(F.relu(self.conv(x))).mean(dim=[2, 3, 4]))


# Sequences, waves, points and graphs in


@animal(wave)
class WaveNet(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.inp = nn.Conv1d(1, width, 1)
        self.filters = nn.ModuleList(
            nn.Conv1d(width, 2 * width, 3, padding=2**i, dilation=2**i) for i in range(depth)
        )
        self.skips = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(depth))
        self.out = nn.Conv1d(width, CLASSES, 1)

    def forward(self, x):
        x, total = self.inp(x), 0
        for conv, skip in zip(self.filters, self.skips):
            a, b = conv(x).split(x.shape[1], dim=1)
            y = skip(torch.tanh(a) * torch.sigmoid(b))
            x, total = x + y, total + y
        return self.out(F.relu(total)).mean(-1)


@animal(wave)
class TemporalConvolution(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.convs = nn.ModuleList()
        for i in range(depth + 1):
            self.convs.append(nn.Conv1d(1 if i == 0 else width, width, 3, dilation=2**i))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        for i, conv in enumerate(self.convs):
            x = F.relu(conv(F.pad(x, (2 * 2**i, 0))))
        return self.fc(x[:, :, -1])


@animal(points)
class PointNet(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, width, 1), nn.BatchNorm1d(width)
        self.more = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(depth))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for conv in self.more:
            x = F.relu(conv(x))
        return self.fc(torch.max(x, 2)[0])


@animal(points)
class DeepSets(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width))
        self.rho = nn.Sequential()
        for _ in range(depth):
            self.rho.extend([nn.Linear(width, width), nn.ELU()])
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.out(self.rho(self.phi(x.transpose(1, 2)).sum(dim=1)))


@animal(tokens)
class BagOfWords(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, CLASSES)

    def forward(self, ids):
        x = self.embed(ids).mean(dim=1)
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.out(x)


@animal(tokens)
class TextCNN(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, k) for k in (2, 3))
        self.fc = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU())
        for _ in range(depth - 1):
            self.fc.extend([nn.Linear(width, width), nn.ReLU()])
        self.out = nn.Linear(width, CLASSES)

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2)
        x = [F.relu(conv(x)).max(dim=2).values for conv in self.convs]
        return self.out(self.fc(torch.cat(x, 1)))


@animal(tokens)
class LSTMClassifier(nn.Module):
    def __init__(self, depth=1, width=8):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, num_layers=depth, batch_first=True)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, ids):
        out, _ = self.lstm(self.embed(ids))
        return self.fc(out[:, -1])


@animal(sequence)
class GRUHidden(nn.Module):
    def __init__(self, depth=1, width=8):
        super().__init__()
        self.gru = nn.GRU(FEATURES, width, depth, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * width, CLASSES)

    def forward(self, x):
        _, h = self.gru(x)
        return self.fc(torch.cat((h[-2], h[-1]), dim=1))


@animal(sequence)
class CellLoop(nn.Module):
    def __init__(self, depth=1, width=8):
        super().__init__()
        self.cell, self.width = nn.GRUCell(FEATURES, width), width
        self.head = nn.Sequential()
        for _ in range(depth):
            self.head.extend([nn.Linear(width, width), nn.Tanh()])
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x):
        h = torch.zeros(x.size(0), self.width, device=x.device)
        for t in range(LENGTH):
            h = self.cell(x[:, t], h)
        return self.out(self.head(h))


@animal(sequence)
class ConvThenLSTM(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(FEATURES if i == 0 else width, width, 3, padding=1) for i in range(depth)
        )
        self.rnn = nn.LSTM(width, width, batch_first=True)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = x.permute(0, 2, 1)
        for conv in self.convs:
            x = F.relu(conv(x))
        h = self.rnn(x.permute(0, 2, 1))
        h = h[0] if isinstance(h, tuple) else h
        return self.fc(h.mean(1))


class Attention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((a @ v).transpose(1, 2).reshape(b, n, c))


class EncoderBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@animal(image)
class VisionTransformer(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 10, width) * 0.02)
        self.blocks = nn.ModuleList(EncoderBlock(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class CausalBlock(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.ln1, self.ln2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        mask = torch.tril(torch.ones(LENGTH, LENGTH)).view(1, 1, LENGTH, LENGTH)
        self.register_buffer("bias", mask, persistent=False)

    def forward(self, x):
        B, T, C = x.size()
        h = self.ln1(x)
        q, k, v = (
            f(h).view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        x = x + self.proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.out(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


@animal(tokens)
class CausalLanguageModel(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.h = nn.ModuleList(CausalBlock(width) for _ in range(depth))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(0, idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


@animal(tokens)
class TiedLanguageModel(CausalLanguageModel):
    def __init__(self, depth=2, width=8):
        super().__init__(depth, width)
        self.lm_head.weight = self.wte.weight


@animal(tokens_and_mask)
class MaskedEncoder(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, ids, mask):
        x = self.encoder(self.embed(ids), src_key_padding_mask=~mask)
        m = mask.unsqueeze(-1).float()
        return self.fc((x * m).sum(1) / m.sum(1))


@animal(tokens)
class PreNormMultihead(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.attn = nn.ModuleList(
            nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, ids):
        x = self.embed(ids)
        for attn, norm in zip(self.attn, self.norms):
            h = norm(x)
            x = x + attn(h, h, h, need_weights=False)[0]
        return self.head(x.mean(1))


@animal(tokens)
class EncoderDecoder(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.encoder = nn.ModuleList(EncoderBlock(width) for _ in range(depth))
        self.query = nn.Parameter(torch.randn(1, 3, width) * 0.1)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, VOCABULARY)

    def forward(self, ids):
        memory = self.embed(ids)
        for block in self.encoder:
            memory = block(memory)
        q = self.q(self.query.expand(ids.shape[0], -1, -1))
        k, v = self.kv(memory).chunk(2, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class RotaryBlock(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (
            nn.Linear(width, 2 * width, bias=False),
            nn.Linear(width, 2 * width, bias=False),
        )
        self.down = nn.Linear(2 * width, width, bias=False)

    @staticmethod
    def rotate(x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    def forward(self, x, cos, sin):
        b, n, c = x.shape
        h = self.norm1(x)
        q, k, v = (
            f(h).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.wq, self.wk, self.wv)
        )
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).reshape(b, n, c))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@animal(tokens)
class RotaryLanguageModel(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(RotaryBlock(width) for _ in range(depth))
        self.norm, self.out = RMSNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        size = width // 2
        frequencies = 1.0 / (100 ** (torch.arange(0, size, 2).float() / size))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, ids):
        angles = torch.outer(torch.arange(ids.shape[1]).float(), self.frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.out(self.norm(x))


class MixerBlock(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.token_mix = nn.Sequential(nn.Linear(tokens, 12), nn.GELU(), nn.Linear(12, tokens))
        self.channel_mix = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = x + self.token_mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mix(self.norm2(x))


@animal(image)
class MLPMixer(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*[MixerBlock(9, width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


@animal(sequence)
class FourierMixer(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.inp = nn.Linear(FEATURES, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.mlps = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.inp(x)
        for norm, mlp in zip(self.norms, self.mlps):
            x = norm(x + torch.fft.fft(x, dim=1).real)
            x = x + F.gelu(mlp(x))
        return self.out(x.mean(1))


@animal(sequence)
class LinearRecurrence(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.inp = nn.Linear(FEATURES, width)
        self.decay = nn.ParameterList(nn.Parameter(torch.randn(width)) for _ in range(depth))
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.inp(x)
        for decay, mix in zip(self.decay, self.mix):
            a, h, states = torch.sigmoid(decay), torch.zeros_like(x[:, 0]), []
            for t in range(x.shape[1]):
                h = a * h + (1 - a) * x[:, t]
                states.append(h)
            x = x + F.silu(mix(torch.stack(states, dim=1)))
        return self.out(x[:, -1])


@animal(graphs)
class GraphConvolution(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.lins = nn.ModuleList(
            nn.Linear(FEATURES if i == 0 else width, width) for i in range(depth + 1)
        )
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x, adj):
        degree = adj.sum(-1).clamp(min=1).rsqrt()
        adj = degree.unsqueeze(-1) * adj * degree.unsqueeze(-2)
        for lin in self.lins:
            x = F.relu(adj @ lin(x))
        return self.out(x.mean(dim=1))


@animal(graphs)
class GraphAttention(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.inp = nn.Linear(FEATURES, width)
        self.lins = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.left = nn.ParameterList(nn.Parameter(torch.randn(width, 1)) for _ in range(depth))
        self.right = nn.ParameterList(nn.Parameter(torch.randn(width, 1)) for _ in range(depth))
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x, adj):
        x = self.inp(x)
        for lin, left, right in zip(self.lins, self.left, self.right):
            h = lin(x)
            e = F.leaky_relu(h @ left + (h @ right).transpose(1, 2), 0.2)
            a = e.masked_fill(adj == 0, -1e9).softmax(dim=-1)
            x = F.elu(a @ h)
        return self.out(x.sum(1))


@animal(sequence)
class EinsumAttention(nn.Module):
    def __init__(self, depth=2, width=8):
        super().__init__()
        self.inp = nn.Linear(FEATURES, width)
        shape = (width, 2, width // 2)
        self.wq, self.wk, self.wv = (
            nn.ParameterList(nn.Parameter(torch.randn(shape) / width) for _ in range(depth))
            for _ in range(3)
        )
        self.wo = nn.ParameterList(
            nn.Parameter(torch.randn(2, width // 2, width)) for _ in range(depth)
        )
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.inp(x)
        for wq, wk, wv, wo in zip(self.wq, self.wk, self.wv, self.wo):
            q, k, v = (torch.einsum("bnc,chd->bhnd", x, w) for w in (wq, wk, wv))
            a = torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1)
            x = x + torch.einsum("bhnm,bhmd,hdc->bnc", a, v, wo)
        return self.out(x.mean(1))
