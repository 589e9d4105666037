"""Models and data as they are handed in: names, data, outputs, and heads for training only."""

import pytest
import torch
from torch import nn

from fxfuse._progress import Clock
from fxfuse.calibration.data import Calibration
from fxfuse.calibration.prepare import analyse, prepare
from fxfuse.errors import ArgumentError, DataError, ModelError
from tests.support.modes import Body
from tests.support.nets import mlp, outputs, randomise

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
