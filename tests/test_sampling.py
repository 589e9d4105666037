"""Positions: drawn evenly, each sample on one side; rows there against the whole."""

import torch
from conftest import EXACT
from hypothesis import given
from hypothesis import strategies as st
from test_least_squares import maps

from fxfuse.least_squares import patches, rows
from fxfuse.sampling import (
    reads_at,
    rows_as_weight,
    rows_at,
    sample,
    units_as_rows,
    weight_as_rows,
)


@given(
    st.integers(1, 50), st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 900)
)
def test_positions_are_drawn_evenly_and_samples_are_held_out_whole(places, sizes, wanted):
    found, seen = sample(places, sizes, wanted), 0
    total, count = places * sum(sizes), sum(map(len, found.at))
    assert abs(count - min(wanted, total)) <= len(sizes)
    for size, at, fit in zip(sizes, found.at, found.fit):
        assert at.numel() == 0 or (int(at.min()) >= 0 and int(at.max()) < places * size)
        held = (seen + at // places) % 4 == 3
        assert not held[:fit].any() and held[fit:].all()
        order = at.sort()[0]
        if len(at) > 1:  # neighbours are at most two stretches apart
            assert int(order.diff().max()) <= 2 * places * size / len(at) + 1
        seen += size
    if wanted >= total:
        assert all(len(set(at.tolist())) == places * size for at, size in zip(found.at, sizes))


def test_rows_of_batches_are_joined_with_those_to_fit_on_first():
    found = sample(2, [4, 3, 5], 24)
    rows = [at[:, None] + 100 * i for i, at in enumerate(found.at)]
    joined = found.joined(rows)
    fit = sum(found.fit)
    assert torch.equal(joined[:fit], torch.cat([r[:n] for r, n in zip(rows, found.fit)]))
    assert torch.equal(joined[fit:], torch.cat([r[n:] for r, n in zip(rows, found.fit)]))
    assert torch.equal(found.joined([r[None] for r in rows])[0], joined)


@given(maps(), st.lists(st.integers(0, 1000), max_size=9))
def test_rows_are_what_a_map_reads_and_gives_at_their_positions(case, at):
    affine, x = case
    y = affine(x)
    whole = rows(y, affine)
    at = torch.tensor(at, dtype=torch.long) % whole.shape[1]
    given = units_as_rows(rows_at(y, 1 if affine.kernel else -1, at), affine.groups)
    assert torch.equal(given, whole[:, at])
    seen = reads_at(x, affine, at)
    assert torch.equal(seen.sort(2)[0], patches(x, affine)[:, at].sort(2)[0])
    found = seen @ weight_as_rows(affine.weight, affine) + affine.offset.view(affine.groups, 1, -1)
    assert torch.allclose(found, given, atol=EXACT)


@given(maps())
def test_a_weight_comes_back_from_its_rows(case):
    affine, _ = case
    assert torch.equal(rows_as_weight(weight_as_rows(affine.weight, affine), affine), affine.weight)
