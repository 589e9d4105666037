"""Positions that are drawn: evenly, whole samples held out, whoever has which samples."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.calibration.positions import draw_positions

sizes_of_batches = st.lists(st.integers(1, 20), min_size=1, max_size=6)


@given(st.integers(1, 50), sizes_of_batches, st.integers(1, 900))
def test_positions_are_drawn_evenly_and_samples_are_held_out_whole(places, sizes, wanted):
    samples, seen = sum(sizes), 0
    drawn = draw_positions(places, torch.arange(samples).split(sizes), samples, wanted)
    total, count = places * samples, sum(map(len, drawn.at))
    assert count == min(wanted, total)
    for size, at, fit in zip(sizes, drawn.at, drawn.fit):
        assert at.numel() == 0 or (int(at.min()) >= 0 and int(at.max()) < places * size)
        held = (seen + at // places) % 4 == 3
        assert samples < 4 or (not held[:fit].any() and held[fit:].all())
        order = at.sort()[0]
        if len(at) > 1:  # neighbours are at most two stretches apart
            assert int(order.diff().max()) <= 2 * total / count + 1
        seen += size
    if samples < 4:  # every fourth position is
        assert sum(drawn.fit) == count - count // 4
    if wanted >= total:
        assert all(len(set(at.tolist())) == places * size for at, size in zip(drawn.at, sizes))


@given(st.integers(1, 9), sizes_of_batches, st.integers(1, 90), st.integers(1, 3))
def test_processes_draw_together_what_one_would(places, sizes, wanted, world):
    def rows(drawn, numbers):
        samples = [batch[at // places] for batch, at in zip(numbers, drawn.at)]
        pairs = [s * places + at % places for s, at in zip(samples, drawn.at)]
        return dict(zip(drawn.order.tolist(), drawn.joined([p[:, None] for p in pairs]).tolist()))

    samples = world * sum(sizes)
    alone = torch.arange(samples).split(7)
    shares = [torch.arange(samples)[k::world].split(sizes) for k in range(world)]
    wanted_rows = rows(draw_positions(places, alone, samples, wanted), alone)
    given_rows = [rows(draw_positions(places, s, samples, wanted), s) for s in shares]
    assert {k: v for part in given_rows for k, v in part.items()} == wanted_rows
    assert sum(map(len, given_rows)) == len(wanted_rows) == min(wanted, places * samples)
    assert list(wanted_rows) == sorted(wanted_rows)


def test_rows_of_batches_are_joined_with_those_to_fit_to_first():
    drawn = draw_positions(2, torch.arange(12).split([4, 3, 5]), 12, 24)
    rows = [at[:, None] + 100 * i for i, at in enumerate(drawn.at)]
    joined = drawn.joined(rows)
    fit = sum(drawn.fit)
    assert torch.equal(joined[:fit], torch.cat([r[:n] for r, n in zip(rows, drawn.fit)]))
    assert torch.equal(joined[fit:], torch.cat([r[n:] for r, n in zip(rows, drawn.fit)]))
    assert torch.equal(drawn.joined([r[None] for r in rows])[0], joined)


def test_positions_that_a_smaller_sample_has_not_are_left_out():
    drawn = draw_positions(6, torch.arange(2).split(1), 2, 12)
    before = [at.tolist() for at in drawn.at]
    drawn.keep_below(1, 4)
    assert drawn.at[0].tolist() == before[0]
    assert drawn.at[1].tolist() == [i for i in before[1] if i < 4]
    assert len(drawn.numbers[1]) == len(drawn.at[1])
    assert drawn.fit[1] + 1 >= len(drawn.at[1]) // 2
