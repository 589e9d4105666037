"""Calibration data of every form: each sample once, in order, as often as it is read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxfuse._progress import Clock
from fxfuse.calibration.data import Calibration, analyse, analyse_alike, prepare
from fxfuse.errors import ArgumentError, DataError, ModelError
from tests.support.modes import Body
from tests.support.nets import mlp, outputs, randomise

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def numbered(*lengths):
    """Return batches whose samples are their own numbers."""
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
    calibration = Calibration(numbered(*lengths), limit)
    assert calibration.samples == min(limit, sum(lengths))
    assert sum(read(calibration, 4), []) == list(range(calibration.samples))


@given(sizes, st.integers(1, 9))
def test_data_can_be_read_more_than_once(lengths, size):
    calibration = Calibration(iter(numbered(*lengths)))
    assert read(calibration, size) == read(calibration, size)


def test_an_iterator_is_enough_once_and_empty_afterwards():
    batches = iter(numbered(3, 2))
    assert Calibration(batches).samples == 5
    with pytest.raises(DataError, match="no samples"):
        Calibration(batches)


def test_of_a_shuffling_loader_the_same_samples_are_read_every_time():
    loader = DataLoader(TensorDataset(torch.arange(20.0), torch.zeros(20)), 6, shuffle=True)
    calibration = Calibration(loader)
    assert read(calibration, 5) == read(calibration, 5)
    assert sorted(sum(read(calibration, 7), [])) == list(range(20))


def test_a_loader_that_uses_its_buffer_again_does_not_change_what_was_read():
    def batches():
        buffer = torch.empty(2, 1)
        for i in range(3):
            yield buffer.fill_(i)

    assert sum(read(Calibration(batches()), 2), []) == [0, 0, 1, 1, 2, 2]


def test_a_tensor_is_all_samples():
    calibration = Calibration(torch.arange(150.0).view(150, 1))
    assert calibration.samples == 150
    assert sum(read(calibration, 40), []) == list(range(150))


X, Y = torch.arange(3.0).view(3, 1), torch.zeros(3)


@pytest.mark.parametrize(
    "batch", [X, (X, Y), [X, Y], {"x": X, "y": Y}, ((X,), Y), {"x": [X]}, (X, "a label")]
)
def test_the_first_entry_of_a_batch_is_the_input(batch):
    calibration = Calibration([batch, batch])
    assert read(calibration, 3) == [[0, 1, 2]] * 2


def test_an_input_may_be_several_tensors():
    calibration = Calibration([((X, 2 * X), Y)] * 2)
    first, second = next(calibration.chunks(6))
    assert torch.equal(second, 2 * first) and first.shape == (6, 1)
    assert [t.shape for t in calibration.example(2)] == [(2, 1)] * 2


def test_an_example_is_the_first_samples():
    calibration = Calibration(numbered(3, 4))
    assert calibration.example(2)[0].tolist() == [[0], [1]]


def test_inputs_keep_no_gradients_and_may_be_integers():
    calibration = Calibration([X.clone().requires_grad_()])
    assert not calibration.example()[0].requires_grad
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
def test_inputs_that_are_not_finite_are_refused_with_the_number_of_their_sample(value):
    batches = numbered(4, 3)
    batches[1][2] = value
    with pytest.raises(DataError, match="NaN or infinite") as caught:
        Calibration(batches)
    assert "sample 4" in caught.value.where


@pytest.mark.parametrize("data", [None, 3, "images", b"images", object()])
def test_data_of_another_type_are_refused(data):
    with pytest.raises(DataError, match="calibration data of type"):
        Calibration(data)


@pytest.mark.parametrize(
    "batch", [None, 3, "x", (), {}, [None], ("x", Y), torch.tensor(1.0), {"x": 3}, ((),)]
)
def test_batches_without_an_input_are_refused(batch):
    with pytest.raises(DataError, match=r"first entry is of type|inputs of \['no'\] samples"):
        Calibration([batch])


def test_batches_of_different_shapes_are_refused():
    with pytest.raises(DataError):
        list(Calibration([torch.zeros(2, 3), torch.zeros(2, 4)]).chunks(4))


def test_batches_of_different_numbers_of_inputs_are_refused():
    with pytest.raises(DataError):
        list(Calibration([((X, X),), ((X,),)]).chunks(6))


def test_inputs_beyond_the_memory_budget_are_read_again_from_a_file(monkeypatch):
    monkeypatch.setattr("fxfuse.calibration.data.MEMORY", 20)
    calibration = Calibration(iter(numbered(3, 4, 2)))
    assert any(waiting.places for waiting, _ in calibration._batches)
    assert sum(read(calibration, 4), []) == list(range(9))
    assert read(calibration, 2) == read(calibration, 2)


def test_a_tensor_is_not_written_to_a_file(monkeypatch):
    monkeypatch.setattr("fxfuse.calibration.data.MEMORY", 0)
    calibration = Calibration(torch.arange(150.0).view(150, 1))
    assert not any(waiting.places for waiting, _ in calibration._batches)


@given(sizes, st.integers(2, 5))
def test_every_nth_sample_can_be_parted_from_the_others(lengths, every):
    total = sum(lengths)
    if total < every:
        return
    rest, taken = Calibration(numbered(*lengths)).parted(every)
    assert sum(read(taken, 3), []) == list(range(every - 1, total, every))
    assert sorted(sum(read(rest, 3), []) + sum(read(taken, 3), [])) == list(range(total))


VECTORS = torch.randn(10, 6)


def prepared(models, data=VECTORS, **options):
    return prepare(models, data, Clock(None), **options)


def test_networks_are_named_by_their_classes_and_numbered_where_classes_repeat():
    networks, _ = prepared([mlp(6, 8, 3), nn.Linear(6, 3), mlp(6, 5, 3)])
    assert [n.name for n in networks] == ["Sequential 0", "Linear", "Sequential 2"]


def test_networks_compute_what_the_models_compute_and_share_nothing_with_them():
    model = randomise(mlp(6, 8, 3))
    (network,), _ = prepared([model])
    assert torch.allclose(outputs(network.module, VECTORS), outputs(model, VECTORS))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in network.module.parameters()}


def test_data_are_read_once():
    data = Calibration(VECTORS)
    assert prepared([mlp(6, 3)], data)[1] is data
    assert prepared([mlp(6, 3)], iter(VECTORS.split(4)))[1].samples == 10


def test_models_with_other_outputs_are_refused_unless_they_may_differ():
    models = [mlp(6, 8, 3), mlp(6, 8, 4)]
    with pytest.raises(ModelError, match=r"outputs of shape \[\(3,\)\] and \[\(4,\)\]"):
        prepared(models)
    assert len(prepared(models, outputs_may_differ=True)[0]) == 2


def test_heads_for_training_stay_only_if_all_networks_have_them():
    with_head, without = randomise(Body()), randomise(mlp(6, 8, 3))

    def heads(*models, **options):
        networks, _ = prepared(models, **options)
        return [any("head" in name for name, _ in n.module.named_parameters()) for n in networks]

    assert heads(with_head, with_head) == [True, True]
    assert heads(with_head, without) == [False, False]
    assert heads(with_head, with_head, outputs_may_differ=True) == [False, False]


@pytest.mark.parametrize("models", [[], mlp(6, 3), None])
def test_what_is_no_list_of_models_is_refused(models):
    with pytest.raises(ArgumentError) as caught:
        prepared(models)
    assert caught.value.where == "the argument `models`"


def test_an_example_that_the_model_refuses_is_refused():
    with pytest.raises(DataError):
        analyse(mlp(6, 3), torch.zeros(2, 5), "net")


class Shaped(nn.Module):
    """Reads a shape; one that looks at it is not traced symbolically, but recorded."""

    def __init__(self, looks):
        super().__init__()
        self.first, self.last, self.looks = nn.Linear(6, 8), nn.Linear(8, 3), looks

    def forward(self, x):
        if self.looks and x.shape[0] < 1:
            raise ValueError("no samples")
        return self.last(self.first(x).relu().view(x.shape[0], 8))


@pytest.mark.parametrize("looks", [(True, False), (False, True)])
def test_networks_that_are_analysed_together_are_written_alike(looks):
    models = [randomise(Shaped(look)) for look in looks]
    nodes = [[n.name for n in x.nodes.values()] for x in analyse_alike(models, VECTORS, "ab")]
    alone = [[n.name for n in analyse(m, VECTORS, "a").nodes.values()] for m in models]
    assert nodes[0] == nodes[1] and alone[0] != alone[1]
