import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import build, mlp, randomise
from torch import nn

from fxfuse.errors import PairingError
from fxfuse.intake import analysed
from fxfuse.stands import copies, duplicates, normed, resize, strengths, strongest


def plan_of(net, like, x, **options):
    return resize(analysed(net, x, "a"), analysed(like, x, "b"), duplicates(None), **options)


@given(st.integers(1, 9), st.integers(0, 20), st.sampled_from([None, 0, 7]))
def test_units_stand_for_themselves_first_and_are_taken_equally_often(size, more, seed):
    chosen = duplicates(seed)(np.zeros(size), size + more)
    assert chosen[:size].tolist() == list(range(size)) and len(chosen) == size + more
    counts = np.bincount(chosen, minlength=size)
    assert counts.max() - counts.min() <= 1


def test_a_seed_changes_who_is_duplicated():
    plain, one, two = (duplicates(s)(np.zeros(9), 14).tolist() for s in (None, 1, 2))
    assert plain != one != two and one == duplicates(1)(np.zeros(9), 14).tolist()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(1, 12))
def test_the_strongest_units_are_kept_in_their_order(scores, count):
    scores = np.array(scores)
    kept = strongest(scores, count)
    assert len(kept) == count
    if count < len(scores):
        assert (np.diff(kept) > 0).all()
        assert scores[kept].min() >= np.delete(scores, kept).max()


def test_strengths_are_the_norms_of_what_writes_a_unit_with_its_norm():
    net, x = build("batch norm")
    network = analysed(net, x, "net")
    found = strengths(network)["0.0.0"]
    first, norm = net[0][0][0], net[0][0][1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    rows = (first.weight * scale[:, None, None, None]).flatten(1).norm(dim=1).detach().numpy()
    bias = network.spaces["0.0.0"].axes
    assert all(a.tensor != "0.0.0.bias" for a in bias)
    assert np.allclose(found / found.sum(), rows / rows.sum(), atol=1e-6)


def test_heads_are_as_strong_as_what_is_in_them():
    net, x = build("tokens")
    network = analysed(net, x, "net")
    heads = next(s for s in network.spaces if not s.axes)
    found = strengths(network)
    assert found[heads.name].shape == (2,) and (found[heads.name] > 0).all()


def test_norms_over_units_are_seen():
    for name, count in (("layer norm", 1), ("tokens", 1), ("batch norm", 0)):
        net, x = build(name)
        assert len(normed(analysed(net, x, "net"))) == count


def test_inside_blocks_units_stand_for_units_of_their_block():
    net, x = build("grouped")
    wide = randomise(type(net)(*net))  # the same network: every block stands for itself
    plan = plan_of(net, wide, x)
    for name, stands in plan.stands.items():
        assert stands.tolist() == list(range(len(stands))), name
        assert all((counts == 1).all() for counts in copies(plan, name))


def test_copies_are_counted_per_block():
    from nets import Tokens

    x = torch.randn(2, 3, 8, 8)
    plan = plan_of(randomise(Tokens(8, 2, 12)), randomise(Tokens(16, 2, 12)), x)
    queries = next(n for n, (own, _) in plan.mixer.match.spaces.items() if own.blocks is not None)
    assert [c.tolist() for c in copies(plan, queries)] == [[2, 2, 2, 2]] * 2
    plan = plan_of(randomise(Tokens(8, 2, 12)), randomise(Tokens(16, 4, 12)), x)
    assert [c.tolist() for c in copies(plan, queries)] == [[1, 1, 1, 1]] * 4
    assert plan.stands[queries].tolist() == [*range(8), *range(8)]


def test_networks_of_other_structure_are_refused():
    x = torch.randn(2, 3, 8, 8)
    a = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 3, 3))
    b = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 3, 3))
    with pytest.raises(PairingError):
        plan_of(randomise(a), randomise(b), x)


def test_sizes_are_told_here_and_there():
    plan = plan_of(randomise(mlp(6, 5, 4, 3)), randomise(mlp(6, 7, 8, 3)), torch.randn(2, 6))
    assert plan.sizes() == {"0": (5, 7), "2": (4, 8)}
