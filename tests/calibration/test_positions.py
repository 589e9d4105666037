"""Positions that are drawn, and a contraction's rows there against the whole."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.calibration.affine import Affine
from fxfuse.calibration.positions import (
    draw_positions,
    in_groups,
    input_rows,
    output_rows,
    rows_as_weight,
    weight_as_rows,
)
from tests.support.maps import maps
from tests.support.tolerances import EXACT


@given(
    st.integers(1, 50), st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 900)
)
def test_positions_are_drawn_evenly_and_samples_are_held_out_whole(places, sizes, wanted):
    drawn, seen = draw_positions(places, sizes, wanted), 0
    total, count = places * sum(sizes), sum(map(len, drawn.at))
    assert abs(count - min(wanted, total)) <= len(sizes)
    for size, at, fit in zip(sizes, drawn.at, drawn.fit):
        assert at.numel() == 0 or (int(at.min()) >= 0 and int(at.max()) < places * size)
        held = (seen + at // places) % 4 == 3
        assert not held[:fit].any() and held[fit:].all()
        order = at.sort()[0]
        if len(at) > 1:  # neighbours are at most two stretches apart
            assert int(order.diff().max()) <= 2 * places * size / len(at) + 1
        seen += size
    if wanted >= total:
        assert all(len(set(at.tolist())) == places * size for at, size in zip(drawn.at, sizes))


def test_rows_of_batches_are_joined_with_those_to_fit_to_first():
    drawn = draw_positions(2, [4, 3, 5], 24)
    rows = [at[:, None] + 100 * i for i, at in enumerate(drawn.at)]
    joined = drawn.joined(rows)
    fit = sum(drawn.fit)
    assert torch.equal(joined[:fit], torch.cat([r[:n] for r, n in zip(rows, drawn.fit)]))
    assert torch.equal(joined[fit:], torch.cat([r[n:] for r, n in zip(rows, drawn.fit)]))
    assert torch.equal(drawn.joined([r[None] for r in rows])[0], joined)


@given(maps())
def test_input_rows_times_the_weights_rows_are_the_output_rows(case):
    affine, x = case
    axis = 1 if affine.kernel else -1
    outputs = in_groups(output_rows(affine(x), axis), affine.groups)
    bias = affine.offset.view(affine.groups, 1, -1)
    rows = input_rows(x, affine) @ weight_as_rows(affine.weight, affine) + bias
    assert torch.allclose(rows, outputs, atol=EXACT)


@given(maps(), st.lists(st.integers(0, 1000), max_size=9))
def test_rows_at_some_positions_are_those_of_the_whole(case, at):
    affine, x = case
    y, axis = affine(x), 1 if affine.kernel else -1
    every_input, every_output = input_rows(x, affine), output_rows(y, axis)
    at = torch.tensor(at, dtype=torch.long) % len(every_output)
    assert torch.equal(output_rows(y, axis, at), every_output[at])
    assert torch.equal(input_rows(x, affine, at), every_input[:, at])


def test_input_rows_are_patches_in_the_order_of_the_kernel():
    x = torch.arange(2.0 * 3 * 4 * 4).view(2, 3, 4, 4)
    affine = Affine(torch.zeros(5, 3, 2, 2), None, (2, 2), (0, 0), (1, 1))
    patch = x[1, :, 2:4, 0:2].permute(1, 2, 0).flatten()  # of the second sample, at row 1, column 0
    assert torch.equal(input_rows(x, affine)[0, 4 + 2], patch)


@given(maps())
def test_a_weight_comes_back_from_its_rows(case):
    affine, _ = case
    rows = weight_as_rows(affine.weight, affine)
    assert torch.equal(rows_as_weight(rows, affine.kernel), affine.weight)
