"""The checkers: faults planted in a graph are caught, and differences located."""

import copy

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.errors import DataError, NotEquivalent, PassError
from fxfuse.graph.trace import trace
from fxfuse.graph.verify import (
    TOLERANCE,
    first_divergence,
    lint,
    relative_error,
    require_equal,
    verify,
)
from tests.support.nets import NETS, build, mlp, outputs, randomise
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION

# --- lint: planted faults -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_every_traced_network_passes(name):
    lint(trace(build(name)[0]))


def widen(tensor, rows=1):
    return nn.Parameter(torch.cat([tensor, tensor[:rows]]).detach())


def few_rows(module):
    module.get_submodule("fc").weight = nn.Parameter(torch.zeros(2, 6))


def few_inputs(module):
    module.get_submodule("fc").weight = nn.Parameter(torch.zeros(3, 5))


def linear_bias(module):
    module.get_submodule("fc").bias = nn.Parameter(torch.zeros(4))


def conv_rows(module):
    conv = module.get_submodule("conv")
    conv.weight, conv.bias = widen(conv.weight), widen(conv.bias)


def conv_inputs(module):
    module.get_submodule("conv").weight = nn.Parameter(torch.zeros(6, 2, 3, 3))


def conv_groups(module):
    module.get_submodule("conv").groups = 3


def conv_bias(module):
    conv = module.get_submodule("conv")
    conv.bias = widen(conv.bias)


def norm_size(module):
    norm = module.get_submodule("norm")
    norm.weight, norm.bias = widen(norm.weight), widen(norm.bias)


def norm_statistics(module):
    norm = module.get_submodule("norm")
    norm.running_mean = torch.zeros(7)


def norm_bias(module):
    norm = module.get_submodule("norm")
    norm.bias = widen(norm.bias)


def layer_norm_size(module):
    norm = module.get_submodule("last")
    norm.weight, norm.bias = widen(norm.weight), widen(norm.bias)


def forgotten_attribute(module):
    module.get_submodule("fc").out_features = 4


def unused_module(module):
    module.add_submodule("extra", nn.Linear(2, 2))


def unused_parameter(module):
    module.register_parameter("extra", nn.Parameter(torch.zeros(2)))


def unused_buffer(module):
    module.register_buffer("extra", torch.zeros(2))


FAULTS = [
    (few_rows, "fc", "out_features is 3, but its parameters say 2"),
    (few_inputs, "fc", "in_features is 6, but its parameters say 5"),
    (linear_bias, "fc", "bias of 4 values for 3 outputs"),
    (conv_rows, "conv", "out_channels is 6, but its parameters say 7"),
    (conv_inputs, "conv", "in_channels is 4, but its parameters say 2"),
    (conv_groups, "conv", "in_channels is 4, but its parameters say 12"),
    (conv_bias, "conv", "bias"),
    (norm_size, "norm", "num_features is 6, but its parameters say 7"),
    (norm_statistics, "norm", "running_mean"),
    (norm_bias, "norm", "bias"),
    (layer_norm_size, "last", "normalized_shape"),
    (forgotten_attribute, "fc", "out_features is 4, but its parameters say 3"),
    (unused_module, "extra", "nothing in the graph uses it"),
    (unused_parameter, "extra", "nothing in the graph uses it"),
    (unused_buffer, "extra", "nothing in the graph uses it"),
]


class Victim(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.fc, self.last = nn.Linear(6, 3), nn.LayerNorm(3)

    def forward(self, x):
        return self.last(self.fc(self.norm(self.conv(x)).mean((2, 3))))


@pytest.mark.parametrize(("fault", "where", "message"), FAULTS)
def test_a_planted_fault_is_caught_and_its_module_named(fault, where, message):
    module = trace(Victim())
    lint(module)
    fault(module)
    with pytest.raises(PassError) as caught:
        lint(module)
    assert message in caught.value.met and where in caught.value.where


def test_a_node_before_its_input_is_caught():
    module = trace(mlp(6, 8, 3))
    first, relu = list(module.graph.nodes)[1:3]
    first.prepend(relu)
    with pytest.raises(RuntimeError):
        lint(module)


def test_a_target_that_does_not_exist_is_caught():
    module = trace(mlp(6, 8, 3))
    next(n for n in module.graph.nodes if n.op == "call_module").target = "gone"
    with pytest.raises(RuntimeError):
        lint(module)


# --- differences ----------------------------------------------------------------------------------


def error(a, b):
    return relative_error([torch.tensor(a)], [torch.tensor(b)])


def test_the_error_is_relative_to_the_largest_value_of_the_first():
    assert error([4.0, -8.0], [4.0, -6.0]) == 0.25
    assert error([4.0, -6.0], [4.0, -8.0]) == pytest.approx(1 / 3)
    assert error([1.0], [1.0]) == 0.0


def test_the_worst_of_several_outputs_counts():
    one, two = torch.ones(2), torch.full((2,), 2.0)
    assert relative_error([one, two], [one, one]) == 0.5
    assert relative_error([two, one], [one, one]) == 0.5


def test_outputs_of_other_shapes_or_number_are_infinitely_far():
    assert error([1.0], [1.0, 1.0]) == float("inf")
    assert relative_error([torch.ones(1)], []) == float("inf")
    assert relative_error([], [torch.ones(1)]) == float("inf")


def test_whole_numbers_are_equal_or_not():
    assert error([1, 2], [1, 2]) == 0.0
    assert error([1, 2], [1, 3]) == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_equal_to_anything(value):
    assert not error([1.0, 2.0], [1.0, value]) <= TOLERANCE
    assert not error([1.0, value], [1.0, 2.0]) <= TOLERANCE


def test_zeros_are_equal_to_zeros_only():
    assert error([0.0], [0.0]) == 0.0
    assert error([0.0], [1e-6]) > TOLERANCE


def test_the_library_is_as_strict_as_its_tests():
    assert TOLERANCE <= FUNCTION


# --- equivalence ----------------------------------------------------------------------------------


@pytest.fixture
def pair():
    net, x = randomise(mlp(6, 8, 7, 3)), torch.randn(4, 6)
    graph = trace(net)
    return graph, copy.deepcopy(graph), x


def test_equal_networks_pass_with_their_error(pair):
    before, after, x = pair
    assert require_equal(before, after, (x,), "a pass") == 0.0
    with torch.no_grad():
        after.get_submodule("2").weight.mul_(1 + 1e-6)
    assert 0 < require_equal(before, after, (x,), "a pass") < TOLERANCE


@pytest.mark.parametrize("factor", [1.01, -1.0, 0.0])
def test_a_changed_weight_is_caught_and_the_first_node_named(pair, factor):
    before, after, x = pair
    with torch.no_grad():
        after.get_submodule("2").weight.mul_(factor)
    with pytest.raises(NotEquivalent) as caught:
        require_equal(before, after, (x,), "a pass")
    assert "first at node '_2'" in caught.value.where and "reads _1" in caught.value.where
    assert "relative" in caught.value.met


def test_the_difference_is_that_of_eval_mode(pair):
    before, after, x = pair
    after.get_submodule("1").register_forward_hook(
        lambda module, i, out: out + 1 if module.training else out
    )
    assert require_equal(before.train(), after.train(), (x,), "a pass") == 0.0
    assert before.training and after.training


def test_the_first_node_is_the_first_in_the_graph_not_the_worst(pair):
    before, after, x = pair
    with torch.no_grad():
        after.get_submodule("0").weight[0, 0] += 0.1
        after.get_submodule("4").weight.mul_(100)
    assert "node '_0'" in first_divergence(before, after, (x,))


def test_equal_networks_do_not_diverge(pair):
    before, after, x = pair
    assert first_divergence(before, after, (x,)) is None


def test_an_inserted_node_is_compared_with_the_node_in_front_of_it(pair):
    before, after, x = pair
    relu = next(n for n in after.graph.nodes if n.name == "_1")
    with after.graph.inserting_after(relu):
        new = after.graph.call_function(torch.neg, (relu,))
    relu.replace_all_uses_with(new, lambda user: user is not new)
    new.meta["neutral_to"], new.meta["origin"] = "_1", ("negate", ("_1",))
    after.recompile()
    found = first_divergence(before, after, (x,))
    assert f"node '{new.name}'" in found and "negate from _1" in found


def test_modules_without_a_graph_are_compared_by_outputs_alone():
    net, x = randomise(mlp(6, 8, 3)), torch.randn(4, 6)
    graph = trace(net)
    assert require_equal(net, graph, (x,), "tracing") == 0.0
    with torch.no_grad():
        graph.get_submodule("0").bias.add_(1)
    with pytest.raises(NotEquivalent) as caught:
        require_equal(net, graph, (x,), "tracing")
    assert caught.value.where == "tracing"
    assert not torch.equal(outputs(net, x), outputs(graph, x))


# --- for users ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some(NETS, "plain", "residual", "grouped", "tokens", "shared"))
def test_a_network_and_its_permuted_or_traced_copy_are_equal(name):
    net, x = build(name)
    for other in (net, trace(net), copy.deepcopy(net), fxfuse.permute(net, x)):
        assert verify(net, other, x) is None


def test_a_changed_parameter_is_located_in_graphs_and_models():
    net, x = build("residual")
    changed = copy.deepcopy(net)
    changed.get_submodule("1.1.a.0").weight.data[0] *= 1.5
    node = next(n for n in trace(net).graph.nodes if n.target == "1.1.a.0").name
    for a in (net, trace(net)):
        for b in (changed, trace(changed)):
            with pytest.raises(NotEquivalent, match=f"first at node '{node}'"):
                verify(a, b, (x,))


def test_the_pass_that_made_a_node_is_named():
    net, x = trace(build("plain")[0]), torch.randn(4, 6)
    after = copy.deepcopy(net)
    node = next(n for n in after.graph.nodes if n.op == "call_module")
    node.meta["origin"] = ("widen", ("input",))
    after.get_submodule(node.target).bias.data += 1
    with pytest.raises(NotEquivalent, match="widen from input"):
        verify(net, after, x)


def test_the_tolerance_decides_and_nothing_is_modified():
    net, x = build("batch norm")
    near = copy.deepcopy(net)
    for parameter in near.parameters():
        parameter.data *= 1 + 1e-3
    net.train()
    before = copy.deepcopy(net.state_dict())
    verify(net, near, x, tolerance=0.1)
    with pytest.raises(NotEquivalent, match="at most 1e-05"):
        verify(net, near, x, tolerance=1e-5)
    assert net.training and all(torch.equal(before[k], v) for k, v in net.state_dict().items())


class Untraceable(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(2 * x)


def test_networks_that_cannot_be_traced_are_compared_by_outputs():
    net, x = nn.Sequential(Untraceable(4, 3)), torch.randn(2, 4)
    net[0].__class__.__module__ = __name__
    verify(net, net, x)
    for other in (nn.Linear(4, 3), nn.Linear(4, 2)):
        with pytest.raises(NotEquivalent, match="Linear, at the outputs"):
            verify(net, other, x)


def test_a_refused_example_is_a_data_error():
    with pytest.raises(DataError):
        verify(nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(2, 5))
