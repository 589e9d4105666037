import numpy as np
import pytest
import torch
from torch import fx, nn

from fxfuse.graph.module import Graph
from fxfuse.graph.state import (
    add_part,
    fill,
    floats_of,
    hide,
    is_hidden,
    part_at,
    replace_tensor,
    settle_sizes,
    sizes_of,
    tensor_at,
    tensors_of,
)

LAYERS = [
    nn.Linear(6, 3),
    nn.Conv1d(6, 4, 3),
    nn.Conv2d(6, 4, 3, groups=2),
    nn.ConvTranspose2d(6, 4, 3, groups=2),
    nn.BatchNorm1d(5),
    nn.BatchNorm2d(5, affine=False),
    nn.BatchNorm2d(5, track_running_stats=False),
    nn.InstanceNorm2d(5, affine=True),
    nn.GroupNorm(2, 6),
    nn.LayerNorm([3, 4]),
    nn.RMSNorm(5),
    nn.Bilinear(3, 4, 5),
    nn.PReLU(4),
    nn.Embedding(5, 3),
    nn.GRU(3, 4, 2),
    nn.LSTM(3, 4, proj_size=2),
    nn.LSTMCell(3, 4),
]


class Tied(nn.Module):
    """Two layers that share a frozen weight, a norm, and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.first, self.body = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.body[0].weight = self.first.weight
        self.first.weight.requires_grad_(False)
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, x):
        return self.body(self.first(x)) * self.scale


@pytest.fixture
def net():
    model = Tied()
    return Graph(model, fx.Tracer().trace(model), "Tied")


# --- reading --------------------------------------------------------------------------------------


def test_all_tensors_are_listed_once_under_their_first_names(net):
    tensors = tensors_of(net)
    assert set(tensors) == {*net.state_dict(), "scale"} - {"body.0.weight"}
    assert all(tensor_at(net, name) is tensor for name, tensor in tensors.items())


def test_counters_are_no_floats(net):
    assert set(tensors_of(net)) - set(floats_of(net)) == {"body.1.num_batches_tracked"}


def test_a_tensor_is_found_by_each_of_its_names(net):
    assert tensor_at(net, "body.0.weight") is tensor_at(net, "first.weight")


def test_modules_are_parts_too(net):
    assert part_at(net, "body.0") is net.get_submodule("body.0")
    assert part_at(net, "body.1.weight") is net.get_submodule("body.1").weight


@pytest.mark.parametrize("name", ["", "gone", "gone.weight", "first.gone", "first.forward"])
def test_what_is_in_no_table_is_no_part(net, name):
    assert part_at(net, name) is None


def test_a_name_without_a_tensor_is_our_mistake(net):
    with pytest.raises(AssertionError, match="no tensor is called 'body.0'"):
        tensor_at(net, "body.0")


# --- writing --------------------------------------------------------------------------------------


def test_filling_keeps_the_tensor(net):
    before = tensor_at(net, "first.weight")
    fill(net, "first.weight", np.eye(4))
    assert tensor_at(net, "first.weight") is before
    assert torch.equal(before, torch.eye(4)) and not before.requires_grad
    fill(net, "body.1.running_var", 2.0)
    assert torch.equal(tensor_at(net, "body.1.running_var"), torch.full((4,), 2.0))


def test_a_replaced_parameter_keeps_its_kind_and_all_of_its_names(net):
    replace_tensor(net, "body.0.weight", np.ones((3, 4)))
    weight = tensor_at(net, "first.weight")
    assert weight is tensor_at(net, "body.0.weight") and torch.equal(weight, torch.ones(3, 4))
    assert isinstance(weight, nn.Parameter) and not weight.requires_grad
    assert weight.dtype == torch.float32
    assert net.get_submodule("first").out_features == 3
    assert net.get_submodule("body.0").out_features == 3


def test_a_replaced_buffer_stays_a_buffer(net):
    replace_tensor(net, "body.1.running_mean", torch.zeros(3, requires_grad=True))
    replace_tensor(net, "scale", torch.zeros(3))
    assert dict(net.named_buffers())["body.1.running_mean"].shape == (3,)
    assert not tensor_at(net, "body.1.running_mean").requires_grad
    assert is_hidden(net, "scale") and "scale" not in net.state_dict()


def test_a_replaced_tensor_lies_in_order_in_memory(net):
    replace_tensor(net, "body.0.weight", np.asfortranarray(np.random.rand(3, 4)))
    assert tensor_at(net, "body.0.weight").is_contiguous()


def test_a_replaced_tensor_is_a_copy(net):
    values = torch.zeros(4)
    replace_tensor(net, "first.bias", values)
    values.add_(1)
    assert not tensor_at(net, "first.bias").any()


@pytest.mark.parametrize("part", [nn.ReLU(), nn.Parameter(torch.ones(2)), torch.ones(2)])
def test_a_new_part_is_found_by_its_name(net, part):
    for name in ("new", "body.new", "branch.inner.new"):
        add_part(net, name, part)
        assert part_at(net, name) is part
    tensors = [*net.parameters(), *net.buffers()]
    assert any(t is part for t in tensors) == isinstance(part, torch.Tensor)


def test_a_hidden_buffer_is_left_out_of_the_state(net):
    assert is_hidden(net, "scale") and not is_hidden(net, "body.1.running_mean")
    assert not is_hidden(net, "gone.scale")
    hide(net, "body.1.running_mean")
    assert is_hidden(net, "body.1.running_mean") and "body.1.running_mean" not in net.state_dict()


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_size_attributes_of_fresh_modules_are_what_their_parameters_imply(layer):
    sizes = sizes_of(layer)
    assert sizes and all(getattr(layer, name) == size for name, size in sizes.items())


def test_modules_without_parameters_have_no_sizes():
    assert sizes_of(nn.ReLU()) == sizes_of(nn.LayerNorm(4, elementwise_affine=False)) == {}


def test_settled_sizes_are_those_of_the_parameters():
    layer = nn.Linear(6, 3)
    layer.weight = nn.Parameter(torch.zeros(2, 5))
    settle_sizes(layer)
    assert (layer.in_features, layer.out_features) == (5, 2)


def test_parts_of_a_script_are_found_by_name():
    net = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 3))), nn.ReLU())
    assert tensor_at(net, "0.0.weight").shape == (3, 2) and part_at(net, "0.1.weight") is None
