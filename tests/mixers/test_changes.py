"""What all mixers of changes have in common, on whole networks: a checkpoint and tuned copies."""

import dataclasses

import numpy as np
import pytest
import torch

import fxfuse
from fxfuse import presets
from fxfuse.coupling import InPlace
from fxfuse.errors import ArgumentError, PairingError
from fxfuse.mixers import Dare, TaskArithmetic, Ties
from fxfuse.refit import AsMixed
from tests.support.nets import build, data_shape, gap, mlp, randomise, residual
from tests.support.tolerances import FUNCTION

MIXERS = [TaskArithmetic(), Ties(), Dare(), Dare(then=Ties(density=1.0))]
NAMES = ["task_arithmetic", "ties", "dare"]


def tuned(name, seed, size=0.1):
    """Return a network of the table, every parameter moved a little."""
    net, generator = build(name)[0], torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def family(name, count=2):
    return [build(name)[0], *(tuned(name, seed) for seed in range(1, count + 1))]


def data_of(name, count=40):
    return torch.randn(count, *data_shape(name), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_with_units_in_place_the_weights_are_those_of_the_rule(mixer):
    nets = family("plain")
    method = fxfuse.Method(coupling=InPlace(), mixer=mixer, refit=AsMixed())
    fused = fxfuse.fuse(nets, data_of("plain"), method=method)
    states = [{n: p.detach().numpy() for n, p in net.named_parameters()} for net in nets]
    rule = mixer(lambda: ((n, [s[n] for s in states]) for n in states[0]), (0.0, 0.5, 0.5))
    for name, parameter in fused.named_parameters():
        wanted = rule(name, [s[name] for s in states])
        assert np.allclose(parameter.detach(), wanted, atol=1e-6)
        assert not np.allclose(wanted, np.mean([s[name] for s in states[1:]], 0), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "method"),
    [("plain", "dare"), ("batch norm", "ties"), ("layer norm", "task_arithmetic")],
)
def test_the_order_of_units_does_not_matter(name, method):
    base, a, b = family(name)
    x = data_of(name)
    moved = fxfuse.permute(b, x[:2], seed=4)
    together = [fxfuse.fuse(nets, x, method=method) for nets in ([base, a, b], [base, a, moved])]
    assert gap(*together, x) < FUNCTION


@pytest.mark.parametrize("method", NAMES)
def test_nothing_is_added_if_the_checkpoint_has_all_the_weight_or_nothing_changed(method):
    nets, x = family("plain"), data_of("plain")
    kept = fxfuse.fuse(nets, x, weights=[1, 0, 0], method=method)
    assert gap(nets[0], kept, x) < FUNCTION
    same = fxfuse.fuse([nets[0]] * 3, x, method=method)
    assert gap(nets[0], same, x) < FUNCTION


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])  # DARE draws by the place
def test_the_order_of_the_tuned_networks_does_not_matter(method):
    (base, a, b), x = family("batch norm"), data_of("batch norm")
    one, other = (fxfuse.fuse(nets, x, method=method) for nets in ([base, a, b], [base, b, a]))
    assert gap(one, other, x) < FUNCTION


def test_the_checkpoint_may_be_any_of_the_networks():
    (base, a, b), x = family("plain"), data_of("plain")
    usual = presets.ties([base, a, b], x)
    last = dataclasses.replace(presets.ties, mixer=Ties(base=2))([a, b, base], x)
    assert gap(usual, last, x) < FUNCTION


def test_a_single_scale_adds_a_change_that_many_times():
    (base, a), x = family("plain", 1), data_of("plain")
    for scale in (1.0, -1.0):
        mixer = TaskArithmetic(scale=scale)
        fused = fxfuse.fuse(
            [base, a], x, method=fxfuse.Method(coupling=InPlace(), mixer=mixer, refit=AsMixed())
        )
        for name, weight in fused.state_dict().items():
            start, end = base.state_dict()[name], a.state_dict()[name]
            assert torch.allclose(weight, start + scale * (end - start), atol=1e-6)


def test_the_ensemble_is_that_of_the_tuned_networks():
    nets, x = family("plain"), data_of("plain", 200)
    near = presets.task_arithmetic(nets, x).meta["fxfuse"].nearness
    weights = fxfuse.fuse(nets, x, method="average", weights=[0, 1, 1]).meta["fxfuse"].nearness
    assert near.networks == pytest.approx(weights.networks)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 1.5}, "width"),
        ({"weights": "auto"}, "weights"),
    ],
)
def test_what_has_no_meaning_for_changes_is_refused(options, says):
    with pytest.raises(ArgumentError, match=says):
        presets.ties(family("plain"), data_of("plain"), **options)


def test_one_network_has_no_changes_and_neither_have_networks_of_other_depth():
    nets, x = family("plain"), data_of("plain")
    with pytest.raises(ArgumentError, match="checkpoint"):
        presets.ties(nets[:1], x)
    with pytest.raises(ArgumentError, match="checkpoint"):
        dataclasses.replace(presets.ties, mixer=Ties(base=3))(nets, x)
    with pytest.raises(ArgumentError, match="density 0"):
        Ties(density=0)
    blocks = [randomise(residual((6, n)), n) for n in (2, 1)]
    with pytest.raises(PairingError, match="does not have"):
        presets.ties(blocks, torch.randn(20, 3, 8, 8))


def test_networks_of_other_width_are_carried_into_the_checkpoints_units():
    nets, x = [randomise(mlp(6, n, 3), n) for n in (8, 12, 10)], torch.randn(60, 6)
    fused = fxfuse.fuse(nets, x, method="task_arithmetic", anchor=0)
    assert [tuple(p.shape) for p in fused.parameters() if p.dim() > 1] == [(8, 6), (3, 8)]
