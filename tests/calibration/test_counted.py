"""Positions that an attention mask leaves out: what is there changes nothing."""

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.calibration.counted import Counted, Served
from fxfuse.calibration.data import Calibration
from fxfuse.errors import DataError
from fxfuse.refit import LeastSquares, MatchMoments
from tests.support.nets import randomise

LENGTHS = (5, 9, 7)


class Reads(nn.Module):
    """Token networks whose output does not depend on what is padding."""

    def __init__(self, width=8, sign=1):
        super().__init__()
        self.embed, self.mix = nn.Embedding(30, 6), nn.Linear(6, width)
        self.norm, self.out = nn.BatchNorm1d(width), nn.Linear(width, 3)
        self.sign = sign

    def forward(self, ids, attention_mask):
        h = torch.relu(self.norm(self.mix(self.embed(ids)).transpose(1, 2)))
        mask = attention_mask[:, None].to(h.dtype)
        return self.out((h * mask).sum(2) / mask.sum(2))


class ReadsPadding(Reads):
    """The same with a mask of torch's spelling, which is true at the padding."""

    def forward(self, ids, padding_mask):
        return super().forward(ids, ~padding_mask)


def sequences(junk=None, length=None, left=False):
    """Return batches of sequences; if they are padded to a length, junk stands at the padding."""
    draw = torch.Generator().manual_seed(0)
    batches = []
    for n in LENGTHS:
        ids, mask = torch.randint(1, 30, (12, n), generator=draw), torch.ones(12, n).long()
        if length is not None:
            filling = torch.full((12, length - n), 0 if junk is None else junk)
            parts = [filling, ids] if left else [ids, filling]
            ids, mask = torch.cat(parts, 1), torch.cat([0 * filling, mask][:: 1 if left else -1], 1)
        batches.append({"ids": ids, "attention_mask": mask})
    return batches


def weights(data, refit, kind=Reads):
    nets = [randomise(kind(width), seed=width) for width in (8, 6)]
    return fxfuse.fuse(nets, data, method=fxfuse.Method(refit=refit)).state_dict()


@pytest.mark.parametrize("refit", [LeastSquares(rows=256), MatchMoments()])
def test_what_stands_at_the_padding_has_no_say(refit):
    expected = weights(sequences(), refit)
    for data in (sequences(8, 14), sequences(9, 14, left=True)):
        found = weights(data, refit)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=1e-4), name


def test_a_mask_of_padding_says_the_opposite():
    batches = [(b["ids"], b["attention_mask"] == 0) for b in sequences(7, 14)]
    found = weights(batches, MatchMoments(), ReadsPadding)
    for name, value in weights(sequences(), MatchMoments()).items():
        assert torch.allclose(found[name], value, atol=1e-4), name


def test_padding_has_no_say_in_layer_costs():
    nets = [randomise(Reads(width), seed=width) for width in (8, 6)]
    costs = []
    for data in (sequences(), sequences(9, 14)):
        aligned = fxfuse.align(nets, data)
        costs.append([s.cost_of(1, 0) for s in aligned.segments])
    assert costs[0] == pytest.approx(costs[1], abs=1e-6)


@pytest.mark.parametrize("left", [False, True])
def test_sequences_of_different_lengths_are_padded_on_the_side_of_the_others(left):
    data = sequences(0, 9, left)[:1] + sequences()[1:]
    first = data[0]["ids"]
    chunk = next(Calibration(data, models=[Reads()]).chunks(36))
    assert chunk[0].shape == chunk[1].shape == (36, 9)
    assert torch.equal(chunk[0][:12], first)
    assert bool(chunk[1][24:, 0].all()) != left and bool(chunk[1][24:, -1].all()) == left
    assert not chunk[0][chunk[1] == 0].any()


def test_sequences_of_different_lengths_without_a_mask_are_refused():
    with pytest.raises(DataError, match="after batches of samples"):
        Calibration([b["ids"] for b in sequences()], models=[Reads()])


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
COUNTED = Counted.of(Served.of([MASK], {0: True}))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((2, 3), [1, 1, 0, 1, 0, 0]), ((6,), [1, 1, 0, 1, 0, 0]), ((2, 4), None), ((2,), None)],
)
def test_a_mask_speaks_of_values_with_its_positions_along_one_axis(shape, expected):
    found = COUNTED.among(shape)
    assert (None if found is None else found.int().tolist()) == expected
    assert COUNTED.among((2, 2, 3)).view(2, 2, 3)[:, 1].int().tolist() == MASK.tolist()
    assert COUNTED.among((2, 3, 3)) is None and COUNTED.among((3, 3)) is None


def test_values_are_those_of_the_positions_that_count():
    value = torch.arange(12.0).view(2, 3, 2)
    assert COUNTED.of_units(value, 2).tolist() == [[0, 2, 6], [1, 3, 7]]
    assert COUNTED.rows(value).tolist() == [[0, 1], [2, 3], [6, 7]]
    filled = COUNTED.filled(value, 2)
    assert filled[1].tolist() == [[6, 7], [2, 3], [0, 0]] and filled[0, 2].tolist() == [0, 0]
    assert Counted.of([MASK]).of_units(value, 2).shape == (2, 2, 3)
