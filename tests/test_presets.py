"""The papers' methods against what the papers' own code gives on the same networks and samples."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fxfuse
from fxfuse import presets
from fxfuse.errors import ArgumentError
from fxfuse.refit import AsMixed
from tests.support.definitions import (
    elastic_zip,
    git_rebasin,
    otfusion,
    outputs_of,
    repair,
    zipit,
)
from tests.support.nets import gap, mlp, outputs, randomise, residual
from tests.support.sweeps import some
from tests.support.trained import FOLDER, SHARED, mnist, needs_networks, parents


def test_clafusion_takes_the_shallow_networks_widths_and_one_map():
    nets = [mlp(6, 8, 7, 5, 3), mlp(6, 6, 4, 3)]
    fused = fxfuse.presets.clafusion(nets, torch.randn(50, 6))
    assert [p.shape[0] for p in fused.parameters() if p.dim() == 2] == [6, 6, 4, 3]


DOCS = Path(__file__).parents[1] / "docs"

DEFINED = {
    "otfusion": otfusion,
    "clafusion": otfusion,  # of equal depth and width
    "git_rebasin": git_rebasin,
    "c2m3": git_rebasin,  # of two networks, behind which it repairs
    "repair": repair,
    "zipit": zipit,
    "elastic_zip": elastic_zip,
}


@pytest.mark.parametrize("name", DEFINED)
def test_a_preset_gives_what_a_few_lines_of_numpy_give(name):
    nets = [randomise(mlp(5, 4, 3), s) for s in (1, 2)]
    data, x = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (200, 9))
    method = getattr(presets, name)
    method = replace(method, refit=AsMixed()) if name == "c2m3" else method
    fused = method(nets, data)
    arrays = [[p.detach().double().numpy() for p in net.parameters()] for net in nets]
    defined = DEFINED[name](*arrays, data.double().numpy())
    wanted = outputs_of(defined, x.double().numpy()).T
    assert np.allclose(outputs(fused, x), wanted, atol=1e-4 * abs(wanted).max())


@needs_networks
@pytest.mark.parametrize(("seed", "accuracy"), [(0, 89.76), (1, 94.09), (2, 93.82)])
def test_clafusion_reaches_the_accuracies_of_the_papers_code(seed, accuracy):
    chosen = np.load(FOLDER / "samples_and_splits.npz")["depth_samples"]
    samples = mnist(True)[0][torch.from_numpy(chosen)]
    x, y = mnist(False)
    nets = parents(seed)
    alignment = fxfuse.align(nets, samples)
    # fc1, fc2, fc5 of the deep network are modules 0, 2, 8 of the sequence
    assert alignment.pairs[0] == [("0", "0"), ("2", "2"), ("8", "4")]
    fused = fxfuse.presets.clafusion(nets, samples, alignment=alignment)
    reached = 100 * float((outputs(fused, x).argmax(1) == y).float().mean())
    assert reached == pytest.approx(accuracy, abs=0.02)
    if seed == 0:
        golden = load_file(SHARED / "golden" / "mlp_depth_seed0_add.safetensors")
        for ours, theirs in zip(fused.state_dict().values(), golden.values()):
            assert torch.allclose(ours, theirs, atol=1e-6)


def test_residual_stages_of_34_and_18_layers_align_as_in_the_papers_code():
    deep, shallow = (
        residual((4, n[0]), (6, n[1]), (8, n[2]), (10, n[3]), stem=4)
        for n in ((3, 4, 6, 3), (2, 2, 2, 2))
    )
    pairs = fxfuse.align([deep, shallow], torch.randn(20, 3, 16, 16)).pairs
    blocks = [[int(a.split(".")[1]) for a, _ in stage] for stage in pairs[1:5]]
    assert blocks == [[0, 2], [0, 3], [0, 5], [0, 2]]


GOLDEN = SHARED / "golden" / "resnet34e_resnet18e.safetensors"


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x):
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


class Stages(nn.Module):
    """The papers' CIFAR networks: no norms, no biases, convolutions in the shortcuts."""

    def __init__(self, *counts):
        super().__init__()
        self.conv1, width = nn.Conv2d(3, 8, 3, 1, 1, bias=False), 8
        for n, count in enumerate(counts):
            blocks = [Block(width, 8 << n, 2 if n else 1)]
            blocks += [Block(8 << n, 8 << n, 1) for _ in range(count - 1)]
            setattr(self, f"layer{n + 1}", nn.Sequential(*blocks))
            width = 8 << n
        self.linear = nn.Linear(width, 10, bias=False)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.linear(nn.functional.avg_pool2d(x, 4).flatten(1))


@pytest.mark.skipif(not GOLDEN.is_file(), reason="needs ../shared/golden/resnet34e_resnet18e")
def test_clafusion_gives_the_weights_of_the_papers_code_on_residual_networks():
    golden, names = load_file(GOLDEN), json.loads(GOLDEN.with_suffix(".json").read_text())
    nets = [Stages(3, 4, 6, 3), Stages(2, 2, 2, 2)]
    for net, letter in zip(nets, "AB"):
        net.load_state_dict({k[2:]: v for k, v in golden.items() if k.startswith(f"{letter}/")})
    fused = fxfuse.presets.clafusion(nets, golden["samples"])
    alignment = fused.meta["fxfuse"].alignment
    matched = {a for segment in alignment.pairs for a, _ in segment}
    ours = fused.state_dict()
    theirs = {name: golden[f"fused/{i}"] for i, name in enumerate(names["param_names"])}
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        block, _, leaf = name.rpartition(".conv")
        if leaf and block and block not in matched and leaf.startswith("1"):
            # the inside of a block that one network lacks has no order of its own
            rows = torch.cdist(weight.flatten(1), ours[name].flatten(1)).argmin(1)
            assert sorted(rows.tolist()) == list(range(len(rows)))
            second = f"{block}.conv2.weight"
            ours[name], ours[second] = ours[name][rows], ours[second][:, rows]
        assert torch.allclose(ours[name], weight, rtol=0, atol=1e-5 * float(weight.abs().max()))


PRESETS = ["best", "average", "otfusion", "clafusion", "hmt", "git_rebasin", "zipit", "elastic_zip"]


UNLIKE = [*PRESETS, "c2m3"]


@pytest.mark.parametrize("name", some(UNLIKE, *UNLIKE[::2]))
def test_every_preset_fuses_networks_of_unequal_depth(name):
    nets = [randomise(residual((6, 2), (8, 2)), 1), randomise(residual((6, 1), (8, 2)), 2)]
    x = torch.randn(16, 3, 16, 16)
    fused = getattr(fxfuse.presets, name)(nets, x)
    assert outputs(fused, x).isfinite().all()
    nets[0].load_state_dict(fused.state_dict(), strict=True)


def test_transfer_is_for_two_networks_and_what_follows_changes_it():
    nets, x = [randomise(mlp(6, 8, 8, 8, 3), 1), randomise(mlp(6, 8, 8, 3), 2)], torch.randn(40, 6)
    with pytest.raises(ArgumentError, match="3 models"):
        fxfuse.presets.hmt([*nets, nets[0]], x)
    alone = fxfuse.presets.hmt(nets, x)
    for other in (
        fxfuse.presets.Transfer(aligned=True),
        fxfuse.presets.Transfer(then=fxfuse.presets.average),
    ):
        assert gap(alone, other(nets, x), x) > 1e-3


def test_one_by_one_is_the_mean_of_units_in_place_and_gives_copies_back():
    """Tolerance 1e-5 relative; a network without a share changes nothing, wherever it stands."""
    nets, x = [randomise(mlp(6, 8, 7, 3), s) for s in (1, 2, 3)], torch.randn(40, 6)
    given = [0.0, 2.0, 5.0]
    mean = presets.OneByOne(presets.average)(nets, x, weights=given)
    assert gap(presets.average(nets, x, weights=given), mean, x) < 1e-5
    moved = [fxfuse.permute(nets[0], x, seed=s) for s in (1, 2)]
    zipped = presets.OneByOne(presets.zipit)
    assert gap(nets[0], zipped([nets[0], *moved], x), x) < 1e-4
    assert gap(nets[1], zipped(nets, iter([x]), weights=[0, 1, 0]), x) < 1e-4
    assert gap(nets[2], zipped(nets[2:], x), x) < 1e-4


def test_one_by_one_compares_two_networks_at_a_time(monkeypatch):
    compared = []
    monkeypatch.setattr(
        presets.Method, "__call__", lambda self, models, *_, **__: compared.append(models) or "both"
    )
    a, b, c = (mlp(6, 8, 3) for _ in range(3))
    assert presets.OneByOne(presets.zipit)([a, b, c], torch.randn(4, 6)) == "both"
    assert compared == [[a, b], ["both", c]]


@pytest.mark.parametrize(
    ("method", "count", "weights"),
    [(presets.ties, 2, None), (presets.zipit, 0, None), (presets.zipit, 2, [1, -1])]
    + [(presets.zipit, 2, "auto"), (presets.zipit, 2, [0, 0]), (presets.zipit, 2, [1])],
)
def test_what_cannot_be_fused_one_by_one_is_refused(method, count, weights):
    with pytest.raises(ArgumentError, match="OneByOne"):
        presets.OneByOne(method)([mlp(6, 8, 3)] * count, torch.randn(9, 6), weights=weights)


PAGE = ["Needs", "Good for", "Cost", "Where ours differs from the released code"]


@pytest.mark.parametrize("name", [*sorted(presets.NAMED), "intra_fusion"])
def test_every_method_has_a_page_and_is_among_those_to_choose_from(name):
    file = {"elastic_zip": "zipit"}.get(name, name)
    text = (DOCS / f"methods/{file}.md").read_text()
    assert all(f"- **{part}**: " in text for part in PAGE) and "```python" in text
    assert f"methods/{file}.md" in (DOCS / "methods.md").read_text()


@pytest.mark.parametrize("name", sorted(presets.NAMED))
def test_names_are_those_of_the_presets_and_work_in_fuse(name):
    torch.manual_seed(0)
    nets, data = [mlp(6, 8, 8, 3), mlp(6, 8, 8, 3)], torch.randn(40, 6)
    by_name = fxfuse.fuse(nets, data, method=name)
    assert getattr(presets, name) is presets.NAMED[name]
    other = presets.NAMED[name](nets, data)
    assert all(map(torch.equal, by_name.parameters(), other.parameters()))


def test_names_are_taken_wherever_methods_are():
    nets, x = [mlp(6, 8, 3), mlp(6, 8, 3)], torch.randn(40, 6)
    assert fxfuse.align(nets, x, method="otfusion") == fxfuse.align(
        nets, x, method=presets.otfusion
    )
    assert len(fxfuse.balance(nets, x, method="zipit")) == 2
    labelled = x, torch.zeros(40).long()
    curves = [
        fxfuse.barrier(nets, x, labelled, weights=[0, 0.5], method=method)
        for method in ("average", presets.average)
    ]
    assert curves[0].losses == curves[1].losses


@pytest.mark.parametrize("method", ["ot-fusion", "", presets.hmt, 3, len, presets])
def test_what_is_no_method_is_refused(method):
    nets, x = [mlp(6, 8, 3), mlp(6, 8, 3)], torch.randn(40, 6)
    for use in (fxfuse.fuse, fxfuse.align, fxfuse.balance):
        with pytest.raises(ArgumentError, match="method"):
            use(nets, x, method=method)
    with pytest.raises(ArgumentError, match="method"):
        fxfuse.barrier(nets, x, (x, torch.zeros(40).long()), method=method)


def test_a_method_that_only_transfers_aligns_nothing():
    nets, x = [mlp(6, 8, 3), mlp(6, 8, 3)], torch.randn(40, 6)
    with pytest.raises(ArgumentError, match="no Method"):
        fxfuse.align(nets, x, method="hmt")
    with pytest.raises(ArgumentError, match="width of a transfer"):
        fxfuse.fuse(nets, x, method="hmt", width=2)
    with pytest.raises(ArgumentError, match="weights of a transfer"):
        presets.hmt(nets, x, weights=[1, 2])


@pytest.mark.parametrize("preset", presets.NAMED.values())
def test_presets_are_not_called_for_a_method(preset):
    with pytest.raises(ArgumentError, match="without networks|no models"):
        preset()


@pytest.mark.parametrize("preset", presets.NAMED.values())
def test_presets_can_be_pickled(preset):
    assert pickle.loads(pickle.dumps(preset)) == preset


def test_a_method_is_known_by_its_name():
    assert presets.method_named("a", {"a": 1}) == 1
    with pytest.raises(ArgumentError, match="the method 'b'") as caught:
        presets.method_named("b", {"a": 1}, "--method")
    assert caught.value.where == "--method" and "one of a" in caught.value.expected
