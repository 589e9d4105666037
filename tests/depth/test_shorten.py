"""Networks brought to the depth that all have, and how far that puts them off."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.alignment.align import align_networks
from fxfuse.alignment.layers import partition
from fxfuse.calibration.data import Calibration
from fxfuse.depth import average_of_signs, fitted_line, majority_vote, sign_of_sum
from fxfuse.depth.deepen import deepen
from fxfuse.depth.shorten import Shorten
from fxfuse.errors import ArgumentError, PairingError, PassError
from fxfuse.fusion.fuse import Method
from tests.support.nets import Pooled, conv, gap, mlp, outputs, randomise, residual, stages
from tests.support.pairs import PAIRS, networks
from tests.support.sweeps import crossed, some
from tests.support.tolerances import FUNCTION
from tests.support.trained import FOLDER, SHARED, mnist, needs_networks, parents

torch.manual_seed(0)  # of what is drawn while the tests are collected


VECTORS, IMAGES = torch.randn(80, 6), torch.randn(24, 3, 8, 8)
DENSE = [name for name in PAIRS if name.startswith("streams")]
CHAINS = [name for name in PAIRS if name not in DENSE]


def shortened(nets, data, how=None):
    before = networks(*nets, data=data)
    calibration = Calibration(data)
    alignment = align_networks(before, calibration, measure_all=False)
    return before, (how or Shorten())(before, alignment, calibration)


def steps_of(graph):
    return [(n.op, n.name, str(n.target)) for n in graph.nodes]


def depths(network):
    return [len(s.layers) for s in partition(network)]


@pytest.mark.parametrize(("name", "to"), crossed(CHAINS, [None, 0, 1]))
def test_all_networks_get_one_structure_and_their_errors_are_reported(name, to):
    make, data = PAIRS[name]
    data = torch.randn(24, *data.shape[1:])
    before, after = shortened(make(), data, Shorten(to=to))
    first = after.networks[0].module.graph
    wanted = [min(d) for d in zip(*map(depths, before))] if to is None else depths(before[to])
    for old, new, error in zip(before, after.networks, after.errors):
        assert steps_of(new.module.graph) == steps_of(first)
        assert depths(new) == wanted
        a, b = outputs(old.module, data), outputs(new.module, data)
        assert error == pytest.approx(float((a - b).norm() / a.norm()), abs=1e-5)
        longer = any(x > y for x, y in zip(depths(old), wanted))
        alive = float((a - a.mean(0)).abs().max()) > 1e-5
        assert (error > 1e-6) is (longer and alive)
        assert longer or gap(old.module, new.module, data) <= FUNCTION
    if to is None:
        assert after.absent == ((),) * len(before)
    else:
        assert not after.absent[to]
        assert set(after.networks[0].module.state_dict()) == set(before[to].module.state_dict())


@pytest.mark.parametrize("name", DENSE)
def test_dense_layers_cannot_be_removed(name):
    make, data = PAIRS[name]
    with pytest.raises(PassError, match="work nothing can take over"):
        shortened(make(), data)


@given(
    st.lists(st.integers(3, 8), min_size=1, max_size=4),
    st.lists(st.integers(3, 8), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([None, fitted_line, sign_of_sum]),
)
def test_perceptrons_of_any_widths_and_depths_can_be_shortened(a, b, norm, gate):
    nets = [mlp(6, *widths, 3, norm=norm) for widths in (a, b)]
    before, after = shortened(nets, VECTORS, Shorten(gate=gate))
    shallow = 0 if len(a) <= len(b) else 1
    assert after.errors[shallow] == 0.0
    states = [{n: p.shape for n, p in x.module.state_dict().items()} for x in after.networks]
    assert states[shallow] == {n: p.shape for n, p in before[shallow].module.state_dict().items()}
    assert set(states[0]) == set(states[1])


SHALLOW = {
    "GELU": (functools.partial(mlp, act=nn.GELU), (6, 9, 8, 8, 3), (6, 9, 8, 3), VECTORS),
    "stages": (stages, ([4, 4], [5, 5]), ([4], [5]), IMAGES),
    "without norms": (
        functools.partial(stages, norm=False, hidden=(6,)),
        ([4, 4], [5, 5]),
        ([4], [5]),
        IMAGES,
    ),
    "blocks": (residual, ((6, 3), (8, 3)), ((6, 2), (8, 1)), IMAGES),
}


@pytest.mark.parametrize("name", some(SHALLOW, "GELU", "stages", "without norms"))
def test_both_networks_load_into_the_class_of_the_shallower(name):
    make, deep, shallow, data = SHALLOW[name]
    nets = [randomise(make(*deep), 0), randomise(make(*shallow), 1)]
    states = [{n: t.clone() for n, t in net.state_dict().items()} for net in nets]
    for shorter in fxfuse.balance(nets, data, method=Method(balancing=Shorten())):
        blank = make(*shallow).eval()
        blank.load_state_dict(shorter.state_dict())
        assert gap(shorter, blank, data) <= FUNCTION
    fused = fxfuse.fuse(nets, data, method=Method(balancing=Shorten()), anchor=1)
    make(*shallow).load_state_dict(fused.state_dict())
    errors = fused.meta["fxfuse"].errors
    assert 0 < errors[0] < 1 and errors[1] == 0.0
    assert all(
        torch.equal(t, states[i][n]) for i in (0, 1) for n, t in nets[i].state_dict().items()
    )


def test_the_anchor_says_whose_widths_are_taken():
    nets = [randomise(mlp(6, 9, 8, 7, 3), 0), randomise(mlp(6, 5, 4, 3), 1)]
    for anchor, widths in ((0, [9, 7, 3]), (1, [5, 4, 3])):
        fused = fxfuse.fuse(nets, VECTORS, method=Method(balancing=Shorten()), anchor=anchor)
        assert [p.shape[0] for p in fused.parameters() if p.dim() == 2] == widths


def test_networks_deeper_in_different_stages_meet_at_the_depth_of_one():
    nets = [randomise(residual((6, 3), (8, 1)), 0), randomise(residual((6, 1), (8, 3)), 1)]
    for to, counts in enumerate([((6, 3), (8, 1)), ((6, 1), (8, 3))]):
        fused = fxfuse.fuse(nets, IMAGES, method=Method(balancing=Shorten(to=to)), anchor=to)
        residual(*counts).load_state_dict(fused.state_dict())
    fused = fxfuse.fuse(nets, IMAGES, method=Method(balancing=Shorten()))
    residual((6, 1), (8, 1)).load_state_dict(fused.state_dict())


def test_an_activation_that_is_used_twice_stays_one_module():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.b(self.relu(self.a(x))) + x)

    nets = [nn.Sequential(*[Block() for _ in range(n)], nn.Linear(6, 3)) for n in (4, 2)]
    before, after = shortened(nets, VECTORS)
    assert set(after.networks[0].module.state_dict()) == set(before[1].module.state_dict())
    assert 0 < after.errors[0] < 0.8


def test_the_norm_behind_the_last_removed_sum_stays():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.norm = nn.LayerNorm(6)

        def forward(self, x):
            return self.norm(self.b(torch.relu(self.a(x))) + x)

    nets = [nn.Sequential(*[Block() for _ in range(n)], nn.Linear(6, 3)) for n in (4, 2)]
    before, after = shortened(nets, VECTORS)
    scales = before[0].module.get_submodule("2.norm").weight  # of the last block that is removed
    assert torch.equal(after.networks[0].module.get_submodule("0.norm").weight, scales)
    assert 0 < after.errors[0] < 0.8


def test_equal_networks_stay_as_they_are():
    before, after = shortened([residual((6, 2)), residual((6, 2))], IMAGES)
    assert after.errors == (0.0, 0.0)
    assert all(gap(a.module, b.module, IMAGES) == 0 for a, b in zip(before, after.networks))


def test_deepening_reports_no_error():
    nets = networks(mlp(6, 8, 8, 3), mlp(6, 5, 3))
    assert deepen(nets, align_networks(nets, Calibration(VECTORS))).errors == (0.0, 0.0)


CHOICES = [
    Shorten(),
    Shorten(ridge=1.0),
    Shorten(rounds=0),
    Shorten(reach=0),
    Shorten(gate=fitted_line),
    Shorten(gate=sign_of_sum),
    Shorten(gate=average_of_signs),
    Shorten(gate=majority_vote),
    Shorten(to=0),
]


def test_each_choice_changes_the_result():
    nets = [mlp(6, 19, 19, 19, 19, 3), mlp(6, 9, 9, 3)]
    errors = [shortened(nets, VECTORS**3, how)[1].errors[0] for how in CHOICES]
    assert len({round(e, 7) for e in errors}) == len(CHOICES), errors
    assert errors[-1] == 0.0 and min(errors[:-1]) == pytest.approx(errors[0], rel=0.3)


def test_least_squares_is_better_than_merging_and_merging_than_nothing():
    nets = [mlp(6, 9, 9, 9, 3, act=nn.ReLU), mlp(6, 9, 3)]
    fitted, merged = (
        shortened(nets, VECTORS, Shorten(gate=gate))[1].errors[0] for gate in (None, fitted_line)
    )
    assert fitted < merged < 1


@pytest.mark.parametrize("name", ["residual", "tokens", "with linear layers"])
def test_gates_are_refused_where_layers_cannot_merge(name):
    make, data = PAIRS[name]
    with pytest.raises(PassError) as caught:
        shortened(make(), data, Shorten(gate=fitted_line))
    assert "least squares" in caught.value.do


@pytest.mark.parametrize("to", [-1, 2])
def test_an_index_of_no_network_is_refused(to):
    with pytest.raises(ArgumentError, match="Shorten"):
        shortened([mlp(6, 8, 8, 3), mlp(6, 5, 3)], VECTORS, Shorten(to=to))


def test_structures_that_differ_once_layers_are_gone_are_refused():
    deep = nn.Sequential(conv(3, 4), nn.MaxPool2d(2), conv(4, 4), conv(4, 4), Pooled(4, 3))
    shallow = nn.Sequential(conv(3, 4), nn.AvgPool2d(2), conv(4, 4), Pooled(4, 3))
    with pytest.raises(PairingError, match="differ outside of their aligned layers"):
        shortened([deep, shallow], IMAGES)


def test_layers_of_different_kinds_in_one_slot_are_refused_though_they_have_one_name():
    alignment = align_networks(networks(mlp(6, 8, 8, 3), mlp(6, 8, 8, 3)), Calibration(VECTORS))
    other = mlp(6, 8, 8, 3)
    other[3] = nn.GELU()
    nets = networks(mlp(6, 8, 8, 3), other)
    with pytest.raises(ArgumentError, match="different kinds in one slot"):
        Shorten()(nets, alignment, Calibration(VECTORS))


# --- against the paper's code ---------------------------------------------------------------------

MERGES = [
    (0, sign_of_sum, 92.23, "sum"),
    (1, sign_of_sum, 94.53, None),
    (2, sign_of_sum, 95.21, None),
    (0, average_of_signs, 88.93, "avg"),
    (1, average_of_signs, 94.76, None),
    (2, average_of_signs, 93.53, None),
]


@needs_networks
@pytest.mark.parametrize(("seed", "gate", "accuracy", "golden"), MERGES)
def test_merging_reaches_the_accuracies_of_the_papers_code(seed, gate, accuracy, golden):
    import numpy as np
    from safetensors.torch import load_file

    chosen = np.load(FOLDER / "samples_and_splits.npz")["depth_samples"]
    samples = mnist(True)[0][torch.from_numpy(chosen)]
    method = dataclasses.replace(fxfuse.presets.clafusion, balancing=Shorten(gate=gate))
    fused = fxfuse.fuse(parents(seed), samples, method=method)
    x, y = mnist(False)
    reached = 100 * float((outputs(fused, x).argmax(1) == y).float().mean())
    assert reached == pytest.approx(accuracy, abs=0.02)
    if golden is not None:
        state = load_file(Path(SHARED) / "golden" / f"mlp_depth_seed0_merge_{golden}.safetensors")
        for ours, theirs in zip(fused.state_dict().values(), state.values(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


# --- torchvision ----------------------------------------------------------------------------------


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("deep", "shallow", "size"),
    [
        ("vgg13", "vgg11", 32),
        ("vgg13_bn", "vgg11_bn", 32),
        ("resnet34", "resnet18", 64),
        ("regnet_y_800mf", "regnet_y_400mf", 64),
    ],
)
def test_networks_of_torchvision(deep, shallow, size):
    from torchvision import models

    nets = [models.get_model(name, num_classes=10) for name in (deep, shallow)]
    nets = [randomise(net, seed) for seed, net in enumerate(nets)]
    data, method = torch.randn(32, 3, size, size), Method(balancing=Shorten(to=1, reach=1))
    with fxfuse.debug(0):
        for shorter in fxfuse.balance(nets, data, method=method):
            assert set(shorter.state_dict()) == set(nets[1].state_dict())
        fused = fxfuse.fuse(nets, data, method=method, anchor=1)
    nets[1].load_state_dict(fused.state_dict())
    assert fused.meta["fxfuse"].errors[1] == 0 < fused.meta["fxfuse"].errors[0] < 1
