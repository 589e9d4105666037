"""Values that wait: what comes back is what went, memory stays shared, space is used again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.calibration.spill import SpillStore, addresses_of
from fxfuse.errors import DataError

KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]


def same(a, b):
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(KINDS)), min_size=1, max_size=6),
    st.integers(0, 100),
)
def test_values_come_back_as_they_were_as_often_as_they_are_read(batches, budget):
    store, pairs = SpillStore(budget), []
    for i, (rows, kind) in enumerate(batches):
        batch = (torch.randn(rows, 3).mul(9).to(kind), torch.full((2, 1), i))
        pairs.append((batch, store.put(batch)))
    for _ in range(2):
        for batch, waiting in pairs:
            back = store.get(waiting)
            assert len(back) == 2 and all(map(same, back, batch))


def test_nested_values_of_any_kind_come_back_as_they_were():
    values = {
        "half": torch.randn(3, 4).half(),
        "complex": torch.randn(3, dtype=torch.complex64),
        "flags": torch.tensor([True, False]),
        "wide": torch.randn(1, 3).expand(4, 3),
        "empty": torch.empty(0, 3),
        "number": torch.tensor(2.5),
        "parts": (torch.arange(3), [torch.ones(2), 7], None),
    }
    store = SpillStore(0)
    waiting = store.put(values)
    held = [v for v in waiting.values.values() if isinstance(v, torch.Tensor)]
    assert len(held) == 1 and not held[0].numel(), "only the empty tensor is held"
    back = store.take(waiting)
    for name in ("half", "complex", "flags", "wide", "empty", "number"):
        assert same(back[name], values[name])
    numbers, [ones, seven], nothing = back["parts"]
    assert torch.equal(numbers, torch.arange(3)) and torch.equal(ones, torch.ones(2))
    assert seven == 7 and nothing is None


def test_the_budget_decides_what_stays_in_memory():
    store = SpillStore(100)
    batches = [(torch.full((n,), float(n)),) for n in (20, 10, 5)]  # 80, 40 and 20 bytes
    waiting = [store.put(batch) for batch in batches]
    assert [w.values is batch for w, batch in zip(waiting, batches)] == [True, False, True]
    assert [store.get(w)[0].tolist() for w in waiting] == [t.tolist() for (t,) in batches]


def test_room_in_memory_is_free_again_once_values_are_taken():
    store = SpillStore(100)
    first, second = store.put((torch.ones(20),)), store.put((torch.ones(20),))
    assert not first.places and second.places
    store.take(first)
    assert not store.put((torch.ones(20),)).places


def test_values_are_stored_as_they_are_when_they_are_put():
    whole = torch.arange(12.0).view(3, 4)
    store = SpillStore(0)
    waiting = store.put((whole.T[1:],))
    whole.zero_()
    assert torch.equal(store.get(waiting)[0], torch.arange(12.0).view(3, 4).T[1:])


def test_tensors_that_share_memory_share_it_when_they_come_back():
    x = torch.arange(6.0)
    store = SpillStore(0)
    whole, view = store.take(store.put((x, x.view(2, 3).T)))
    view.zero_()
    assert not whole.any()


def test_memory_that_others_hold_stays_where_it_is():
    layer = torch.nn.BatchNorm1d(3)
    store, x = SpillStore(0), torch.ones(2)
    back = store.take(store.put((layer.weight, layer.running_mean, x), addresses_of(layer)))
    assert back[0] is layer.weight and back[1] is layer.running_mean
    assert back[2] is not x and torch.equal(back[2], x)


def test_putting_and_reading_may_alternate():
    store, waiting = SpillStore(0), []
    for i in range(4):
        waiting.append(store.put(torch.full((3,), float(i))))
        assert [store.get(w).tolist() for w in waiting] == [[float(j)] * 3 for j in range(i + 1)]


def test_a_disk_without_room_is_said_to_be_full(monkeypatch):
    class Full:
        def seek(self, *where):
            return 0

        def write(self, raw):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: Full())
    with pytest.raises(DataError, match="No space left"):
        SpillStore(0).put(torch.ones(3))
