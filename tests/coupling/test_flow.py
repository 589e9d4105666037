"""Plans that flow through sums: against NumPy, way by way, token by token."""

import numpy as np
import ot
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.coupling import (
    TransportFlow,
    View,
    Window,
    averaged,
    reading_map,
    two_maps,
    weighted_matrix,
    weighted_scalar,
)
from fxfuse.refit.moments import AsMixed
from tests.support.nets import build, data_shape, gap, randomise
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION


class Residual(nn.Module):
    """A stream with one branch."""

    def __init__(self, width, inner):
        super().__init__()
        self.stem, self.up = nn.Linear(5, width), nn.Linear(width, inner)
        self.down, self.head = nn.Linear(inner, width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x)


def fused(nets, x, **options):
    method = fxfuse.Method(coupling=TransportFlow(**options), refit=AsMixed())
    return method(nets, x, anchor=0)


def by_numpy(a, b, x, way, one_map):
    """Fuse `b` onto `a` in float64: the same in a few lines, with POT's own Sinkhorn."""
    w = [{n: p.detach().double().numpy() for n, p in net.named_parameters()} for net in (a, b)]
    x = x.double().numpy()

    def values(w):
        stem = x @ w["stem.weight"].T + w["stem.bias"]
        up = stem @ w["up.weight"].T + w["up.bias"]
        return stem, up, np.maximum(up, 0) @ w["down.weight"].T + w["down.bias"]

    def plan(p, q):
        p, q = ((v - v.mean(0)) / v.std(0) for v in (p, q))
        cost = np.sqrt(((p[:, :, None] - q[:, None]) ** 2).sum(0))
        n, m = cost.shape
        return ot.sinkhorn(np.ones(n) / n, np.ones(m) / m, cost / cost.max(), 0.08, stopThr=1e-12)

    of_a, of_b = values(w[0]), values(w[1])
    stem, up, down = (plan(p, q) for p, q in zip(of_a, of_b))
    sizes = [np.abs(of_a[0]).mean(0), np.abs(of_a[2]).mean(0)]
    joined = sum(s[:, None] * t for s, t in zip(way(sizes), (stem, down)))

    def maps(t):
        unproject = t.T / t.sum(0)[:, None]
        return (unproject.T if one_map else t / t.sum(1)[:, None]), unproject

    flow = {"stem": (None, stem), "up": (stem, up), "down": (up, down), "head": (joined, None)}
    out = {}
    for layer, (before, after) in flow.items():
        weight, bias = w[1][f"{layer}.weight"], w[1][f"{layer}.bias"]
        weight = weight if before is None else weight @ maps(before)[1]
        if after is not None:
            weight, bias = maps(after)[0] @ weight, maps(after)[0] @ bias
        out[f"{layer}.weight"] = (w[0][f"{layer}.weight"] + weight) / 2
        out[f"{layer}.bias"] = (w[0][f"{layer}.bias"] + bias) / 2
    return out


@pytest.mark.parametrize("one_map", [False, True])
@pytest.mark.parametrize("way", [averaged, weighted_scalar, weighted_matrix])
def test_weights_are_those_of_a_few_lines_of_numpy(way, one_map):
    """Tolerance 1e-3: the solver stops at marginals that are right to 1e-3 of a unit's mass."""
    nets = [randomise(Residual(4, 6), 1), randomise(Residual(5, 7), 2)]
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    maps = reading_map if one_map else two_maps
    state = fused(nets, x, residual=way, maps=maps).state_dict()
    for name, wanted in by_numpy(*nets, x, way, one_map).items():
        assert np.allclose(state[name], wanted, atol=1e-3 * np.abs(wanted).max()), name


@pytest.mark.parametrize("way", [averaged, weighted_scalar, weighted_matrix])
def test_a_plan_behind_a_sum_depends_on_the_way(way):
    nets = [randomise(Residual(4, 6), 1), randomise(Residual(5, 7), 2)]
    x = torch.randn(60, 5)
    other = weighted_matrix if way is averaged else averaged
    heads = [fused(nets, x, residual=w).head.weight for w in (way, other)]
    assert not torch.allclose(*heads, atol=1e-3)


@pytest.mark.parametrize("name", some(["plain", "residual", "grouped", "tokens"], "tokens"))
def test_a_shuffled_copy_comes_back(name):
    """Soft as the solver is: a unit that has a partner that is the same gives it everything."""
    net, x = build(name)
    data = torch.randn(48, *data_shape(name))
    again = fxfuse.presets.transformer_ot([net, fxfuse.permute(net, x, seed=4)], data)
    assert gap(net, again, data) < 1e-4


class Patches(nn.Module):
    """A class token in front of 3 x 3 patches, with a table of positions."""

    def __init__(self, width):
        super().__init__()
        self.patch, self.cls = nn.Conv2d(1, width, 2, 2), nn.Parameter(torch.zeros(1, 1, width))
        self.table, self.mlp = nn.Parameter(torch.zeros(1, 10, width)), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.table
        x = x + torch.tanh(self.mlp(self.norm(x)))
        return self.head(x[:, 0])


def patches():
    x = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    return [randomise(Patches(width), seed) for seed, width in enumerate((6, 8))], x


def test_only_some_tokens_count():
    """The same plan as on an image whose other patches are left out."""
    nets, x = patches()
    view = View(summands=True, tokens=Window(1))
    centre = fused(nets, x, view=view).patch.weight
    assert not torch.allclose(centre, fused(nets, x).patch.weight, atol=1e-3)
    middle = x.clone()
    middle[..., :2, :], middle[..., 4:, :], middle[..., :, :2], middle[..., :, 4:] = 1, 2, 3, 4
    again = fused(nets, middle, view=view).patch.weight
    assert torch.allclose(centre, again, atol=1e-6)


def test_a_table_has_a_plan_of_its_own_and_a_lone_vector_that_of_the_patches():
    nets, x = patches()
    net = fused(nets, x)
    alone = fused([nets[0], nets[1]], x, residual=lambda sizes: [0 * sizes[0], 1 + 0 * sizes[0]])
    first, second = (n.cls for n in (net, alone))
    assert torch.equal(first, second)  # joined to the patches, in front of any sum
    assert torch.equal(net.table, alone.table)
    assert not torch.allclose(net.norm.weight, alone.norm.weight, atol=1e-3)  # behind the sum


def test_a_wider_copy_comes_back_by_two_maps_and_halved_by_the_reading_map():
    """Each unit is given to two that are the same: one map gives half of it to each."""
    net, x = randomise(Residual(4, 6), 1), torch.randn(80, 5)
    wide = fxfuse.net2wider(net, x[:2])
    two, one = (
        fxfuse.Method(coupling=TransportFlow(maps=maps), refit=AsMixed())(
            [wide, net], x, weights=[0, 1], anchor=0
        )
        for maps in (two_maps, reading_map)
    )
    assert gap(net, two, x) < FUNCTION
    assert torch.allclose(one.stem.weight, two.stem.weight / 2)


class Segments(Patches):
    """With two kinds of segments, whose vectors are too few to tell units apart."""

    def __init__(self, width):
        super().__init__(width)
        self.kinds = nn.Parameter(torch.zeros(1, 2, width))

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([x, self.cls.expand(x.shape[0], -1, -1)], 1) + self.table
        x = x + self.kinds.repeat(1, 5, 1)
        return self.head(self.norm(x)[:, 0])


def test_a_small_table_takes_the_plan_of_what_it_is_added_to():
    net, x = randomise(Segments(6), 1), patches()[1]
    again = fxfuse.presets.transformer_ot([net, fxfuse.permute(net, x, seed=2)], x)
    assert gap(net, again, x) < FUNCTION


def torchvision_vit(width, heads):
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(16, 4, 2, heads, width, 2 * width, num_classes=3)


def timm_vit(width, heads):
    timm = pytest.importorskip("timm.models.vision_transformer")
    sizes = {"img_size": 16, "patch_size": 4, "depth": 2, "num_classes": 3}
    return timm.VisionTransformer(embed_dim=width, num_heads=heads, mlp_ratio=2, **sizes)


SIZES = {"num_hidden_layers": 2, "image_size": 16, "patch_size": 4, "vocab_size": 50}


def hf(name):
    def made(width, heads):
        package = pytest.importorskip("transformers")
        sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 2 * width}
        config = getattr(package, f"{name}Config")(**sizes, **SIZES)
        return getattr(package, f"{name}Model")(config, add_pooling_layer=False)

    return made


LIBRARIES = {"torchvision": torchvision_vit, "timm": timm_vit, "ViT": hf("ViT"), "BERT": hf("Bert")}


def first(output):
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


@pytest.mark.parametrize("library", some(LIBRARIES))
def test_transformers_of_libraries_come_back_from_other_widths(library):
    """All weight on a copy of twice the width: by two maps, it is itself at either width."""
    net = randomise(LIBRARIES[library](16, 2), 1)
    x = torch.randn(30, 3, 16, 16)
    x = {"input_ids": torch.randint(0, 50, (30, 9))} if library == "BERT" else x
    x = {"pixel_values": x} if library == "ViT" else x

    def run(net):
        with torch.no_grad():
            return first(net(**x) if isinstance(x, dict) else net(x))

    wide = fxfuse.net2wider(net, x)
    flow = fxfuse.presets.transformer_ot
    for nets in ([net, fxfuse.permute(net, x, seed=1)], [net, wide], [wide, net]):
        again = flow(nets, x, weights=[0, 1], anchor=0)
        assert float((run(again) - run(net)).abs().max() / run(net).abs().max()) < 1e-4
