"""None"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from fxfuse.calibration.data import Calibration, Spool
from fxfuse.errors import DataError

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def numbered(*lengths):
    """Batches of samples that are numbered throughout."""
    return list(torch.arange(sum(lengths)).float().view(-1, 1).split(list(lengths)))


def read(calibration, size):
    return [batch[0].flatten().tolist() for batch in calibration.chunks(size)]


@given(sizes, st.integers(1, 12))
def test_chunks_keep_every_sample_in_order(lengths, size):
    chunks = read(Calibration(numbered(*lengths)), size)
    total = sum(lengths)
    assert sum(chunks, []) == list(range(total))
    assert [len(c) for c in chunks] == [size] * (total // size) + [total % size] * (
        total % size > 0
    )


@given(sizes, st.integers(1, 60))
def test_a_limit_keeps_the_first_samples(lengths, limit):
    found = Calibration(numbered(*lengths), limit)
    assert found.samples == min(limit, sum(lengths))
    assert sum(read(found, 4), []) == list(range(found.samples))


@given(sizes, st.integers(1, 9))
def test_data_can_be_read_again(lengths, size):
    found = Calibration(iter(numbered(*lengths)))
    assert read(found, size) == read(found, size)


def test_a_one_shot_iterator_is_enough_once_and_empty_afterwards():
    batches = iter(numbered(3, 2))
    assert Calibration(batches).samples == 5
    with pytest.raises(DataError, match="no samples"):
        Calibration(batches)


def test_a_shuffling_loader_shows_the_same_samples_every_time():
    loader = DataLoader(TensorDataset(torch.arange(20.0), torch.zeros(20)), 6, shuffle=True)
    found = Calibration(loader)
    assert read(found, 5) == read(found, 5)
    assert sorted(sum(read(found, 7), [])) == list(range(20))


def test_a_loader_that_uses_its_buffer_again_does_not_change_what_was_read():
    def batches():
        buffer = torch.empty(2, 1)
        for i in range(3):
            yield buffer.fill_(i)

    assert sum(read(Calibration(batches()), 2), []) == [0, 0, 1, 1, 2, 2]


def test_a_tensor_is_all_samples():
    found = Calibration(torch.arange(150.0).view(150, 1))
    assert found.samples == 150
    assert sum(read(found, 40), []) == list(range(150))


X, Y = torch.arange(3.0).view(3, 1), torch.zeros(3)


@pytest.mark.parametrize(
    "batch", [X, (X, Y), [X, Y], {"x": X, "y": Y}, ((X,), Y), {"x": [X]}, (X, "a label")]
)
def test_the_first_entry_of_a_batch_is_the_input(batch):
    found = Calibration([batch, batch])
    assert read(found, 3) == [[0, 1, 2]] * 2


def test_an_input_may_be_several_tensors():
    found = Calibration([((X, 2 * X), Y)] * 2)
    first, second = next(found.chunks(6))
    assert torch.equal(second, 2 * first) and first.shape == (6, 1)
    assert [t.shape for t in found.example(2)] == [(2, 1)] * 2


def test_an_example_is_the_first_samples():
    found = Calibration(numbered(3, 4))
    assert found.example(2)[0].tolist() == [[0], [1]]


def test_inputs_keep_no_gradients_and_may_be_integers():
    found = Calibration([X.clone().requires_grad_()])
    assert not found.example()[0].requires_grad
    assert Calibration([torch.tensor([[1, 2]])]).example()[0].dtype == torch.int64


@pytest.mark.parametrize(
    "empty", [[], torch.zeros(0, 3), [torch.zeros(0, 3)], iter(()), torch.tensor(3.0)]
)
def test_no_samples_are_refused(empty):
    with pytest.raises(DataError, match="no samples"):
        Calibration(empty)


def test_an_empty_batch_does_not_end_the_data():
    first, second = numbered(2, 3)
    assert Calibration([first, first[:0], second]).samples == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_refused_with_their_place(value):
    batches = numbered(4, 3)
    batches[1][2] = value
    with pytest.raises(DataError, match="NaN or infinite") as caught:
        Calibration(batches)
    assert "sample 4" in caught.value.where


@pytest.mark.parametrize("data", [None, 3, "images", b"images", {"x": X}, object()])
def test_data_of_another_type_are_refused(data):
    with pytest.raises(DataError, match="calibration data of type"):
        Calibration(data)


@pytest.mark.parametrize(
    "batch", [None, 3, "x", (), {}, [None], ("x", Y), torch.tensor(1.0), {"x": 3}, ((),)]
)
def test_batches_without_an_input_are_refused(batch):
    with pytest.raises(DataError, match="first entry is of type"):
        Calibration([batch])


def test_batches_of_different_shapes_are_refused():
    with pytest.raises(DataError):
        list(Calibration([torch.zeros(2, 3), torch.zeros(2, 4)]).chunks(4))


def test_batches_of_different_numbers_of_inputs_are_refused():
    with pytest.raises(DataError):
        list(Calibration([((X, X),), ((X,),)]).chunks(6))


# --- spilling -------------------------------------------------------------------------------------

KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(KINDS)), min_size=1, max_size=6),
    st.integers(0, 100),
)
def test_spilled_tensors_come_back_as_they_were(batches, budget):
    spool, kept = Spool(budget), []
    for i, (rows, kind) in enumerate(batches):
        batch = (torch.randn(rows, 3).mul(9).to(kind), torch.full((2, 1), i))
        spool.append(batch)
        kept.append(batch)
    assert len(spool) == len(kept)
    for _ in range(2):
        for ours, theirs in zip(spool, kept):
            assert len(ours) == 2
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs))


def test_the_budget_decides_what_stays_in_memory():
    spool = Spool(100)
    batches = [(torch.full((n,), float(n)),) for n in (20, 10, 5)]  # 80, 40 and 20 bytes
    for batch in batches:
        spool.append(batch)
    assert [spool[i][0] is batches[i][0] for i in range(3)] == [True, False, True]
    assert [t.tolist() for (t,) in spool] == [t.tolist() for (t,) in batches]


def test_views_are_spilled_by_value():
    whole = torch.arange(12.0).view(3, 4)
    spool = Spool(0)
    spool.append((whole.T[1:],))
    whole.zero_()
    assert torch.equal(spool[0][0], torch.arange(12.0).view(3, 4).T[1:])


def test_reading_and_appending_may_alternate():
    spool = Spool(0)
    for i in range(4):
        spool.append((torch.full((3,), float(i)),))
        assert [t.tolist() for (t,) in spool] == [[float(j)] * 3 for j in range(i + 1)]
