"""Networks as people write them, through the public functions."""

import copy

import pytest
import torch

import fxfuse
from fxfuse.errors import PassError
from tests.support.nets import randomise
from tests.support.zoo import ZOO


def built(name, depth=2, width=8, seed=1):
    """Return a network of the zoo in eval mode; every number of its state is drawn at random."""
    net = ZOO[name].build(depth, width)
    tables = {n: b.clone() for n, b in net.named_buffers() if n not in net.state_dict()}
    randomise(net, seed)
    for path, table in tables.items():
        net.get_buffer(path).copy_(table)
    return net


def inputs(name, samples, seed):
    return ZOO[name].inputs(samples, torch.Generator().manual_seed(seed))


def tensors(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value if part is not None for t in tensors(part)]


def gap(before, after, name, seed=9):
    """Largest difference of any output on inputs that nobody saw, relative to the output."""
    x = inputs(name, 5, seed)
    with torch.no_grad():
        a, b = (tensors(m(*x) if isinstance(x, tuple) else m(x)) for m in (before, after))
    assert len(a) == len(b)
    return max(float((u - v).abs().max() / u.abs().max().clamp(min=1e-3)) for u, v in zip(a, b))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_permuted_copy_computes_the_same_and_both_fuse_to_the_network(name):
    net, data = built(name), inputs(name, 40, 3)
    permuted = fxfuse.permute(net, inputs(name, 6, 1), seed=2)
    assert gap(net, permuted, name) < 1e-4
    again = copy.deepcopy(net)
    again.load_state_dict(permuted.state_dict())
    assert gap(net, again, name) < 1e-4
    fused = fxfuse.fuse([net, permuted], [(data,)] if isinstance(data, tuple) else data)
    assert gap(net, fused, name) < 1e-3


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_class_loads_what_is_fused_and_computes_the_same(name):
    nets, data = [built(name, seed=seed) for seed in (1, 2)], inputs(name, 40, 3)
    fused = fxfuse.fuse(nets, [(data,)] if isinstance(data, tuple) else data)
    again = copy.deepcopy(nets[0])
    again.load_state_dict(fused.state_dict())
    assert gap(fused, again, name) < 1e-4


# The layers of one hand on two values; the "depth" of the other is a number of experts.
OF_ONE_DEPTH = {"WaveNet", "MixtureOfExperts"}
NOT_BALANCED = {  # a layer more has no values with which it would do nothing
    *("FourierMixer", "Generator", "GraphAttention", "GraphConvolution", "GroupNormNet"),
    *("GRUHidden", "Inception", "LSTMClassifier", "Maxout", "NamedMLP", "SharedLayerApplied"),
    *("ShuffleGroups", "TemporalConvolution"),
}
NOT_SHORTENED = {"Generator"}
QUICK = ["DeepSupervision", "GraphAttention", "MobileNet", "RotaryLanguageModel", "ShuffleGroups"]


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.sweep)
        for name in sorted(ZOO.keys() - OF_ONE_DEPTH)
    ],
)
def test_the_deeper_of_two_comes_back_when_it_has_all_weight(name):
    deep, shallow, data = built(name), built(name, depth=1, seed=2), inputs(name, 40, 3)
    data = [(data,)] if isinstance(data, tuple) else data
    fused = fxfuse.fuse([deep, shallow], data, weights=[1, 0])
    assert gap(deep, fused, name) < 1e-4
    mixed = fxfuse.fuse([deep, shallow], data)
    assert all(torch.isfinite(t).all() for t in mixed.state_dict().values())


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(ZOO.keys() - OF_ONE_DEPTH))
def test_networks_are_balanced_exactly_or_the_advice_of_the_refusal_works(name):
    nets, data = [built(name), built(name, depth=1, seed=2)], inputs(name, 40, 3)
    data = [(data,)] if isinstance(data, tuple) else data
    try:
        balanced = fxfuse.balance(nets, data)
    except PassError as refusal:
        assert name in NOT_BALANCED and "Shorten()" in refusal.do
        if name in NOT_SHORTENED:
            with pytest.raises(PassError, match="fuse without Shorten"):
                shortened(nets, data)
        else:
            assert gap(nets[1], shortened(nets, data)[1], name) < 1e-4
    else:
        assert name not in NOT_BALANCED
        assert max(gap(net, same, name) for net, same in zip(nets, balanced)) < 1e-4


def shortened(nets, data):
    method = fxfuse.Method(balancing=fxfuse.depth.Shorten())
    return fxfuse.balance(nets, data, method=method)


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(ZOO))
def test_no_network_of_the_same_size_is_nearer_to_the_ensemble_than_what_is_chosen(name):
    nets, data = [built(name, seed=seed) for seed in (1, 2)], inputs(name, 200, 3)
    data = [(data,)] if isinstance(data, tuple) else data
    near = fxfuse.fuse(nets, data, weights="auto").meta["fxfuse"].nearness
    assert near.fused <= 1.002 * min(near.networks) + 2e-6
