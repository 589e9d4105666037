"""Values that no operator made stay, and so does what was made of them."""

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import label_network
from tests.support.nets import gap, randomise
from tests.support.tolerances import PERMUTATION


@torch.library.custom_op("fxfuse_tests::sum_up_", mutates_args=("x",))
def sum_up_(x: torch.Tensor) -> None:
    """An operator that returns nothing: it writes to its input."""
    x.copy_(x.cumsum(1))


@torch.library.custom_op("fxfuse_tests::relu", mutates_args=(), tags=(torch.Tag.pointwise,))
def relu(x: torch.Tensor) -> torch.Tensor:
    """An operator of another library whose name and tag say what is not true."""
    return x.cumsum(1)


def by_numpy(x):
    return torch.from_numpy(np.cumsum(x.detach().numpy(), 1))


def by_array(x):
    return torch.as_tensor(np.asarray(x.detach()).cumsum(1))


def by_dlpack(x):
    return torch.from_dlpack(np.from_dlpack(x.detach()).cumsum(1))


def by_lists(x):
    return torch.tensor([[v * (i + 1) for i, v in enumerate(row)] for row in x.tolist()])


def by_a_number(x):
    return x * x.tolist()[0][0]


def in_memory(x):
    x.detach().numpy()[:, 2] = 0.3
    return x


def in_place(x):
    x = x.clone()
    sum_up_(x)
    return x


def in_a_list(x):
    x = x.clone()
    torch._foreach_add_([x], [torch.arange(8.0)])
    return x


def by_name(x):
    return relu(x)


def by_a_branch(x):
    return x.cumsum(1) if x.mean() > 0 else x


def by_a_count(x):
    return x * (torch.arange(8) < int((x > 0).sum()))


HIDDEN = {
    f.__name__: f
    for f in [
        *(by_numpy, by_array, by_dlpack, by_lists, by_a_number, in_memory, in_place, in_a_list),
        *(by_name, by_a_branch, by_a_count),
    ]
}


@torch.fx.wrap
def hidden(name, x):
    """One of these functions, as one node of a graph."""
    return HIDDEN[name](x)


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        if self.function == "moved by a number":
            x = x.roll((x.sum() > 0).long().item(), 1)
        elif self.function == "scaled by a number":
            x = x / x.abs().max().item()
        else:
            x = hidden(self.function, x)
        return self.head(torch.tanh(x))


@pytest.mark.parametrize("function", [*HIDDEN, "moved by a number", "scaled by a number"])
def test_what_operators_do_not_show_stays(function):
    net, x = randomise(Between(function)), torch.randn(4, 6)
    permuted = fxfuse.permute(net, x, seed=1)
    for scale in (1, -1, 3):
        assert gap(net, permuted, scale * torch.randn(4, 6)) < PERMUTATION
    free = 8 if function == "scaled by a number" else 0
    assert fxfuse.find_spaces(net, x).free_units == free


def test_the_reason_is_reported():
    spaces = fxfuse.find_spaces(randomise(Between("by_numpy")), torch.randn(4, 6))
    (frozen,) = [f for f in spaces.frozen if f.tensor == "stem.bias"]
    assert frozen.node == "hidden" and "leave torch" in frozen.reason


class Writing(nn.Module):
    """A buffer of the state that forward writes to before it is added."""

    def __init__(self, how):
        super().__init__()
        self.how, self.stem, self.head = how, nn.Linear(6, 8), nn.Linear(8, 3)
        self.other = nn.Linear(6, 8)
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x):
        units = self.stem(x)
        if self.how == "other units":
            self.last.copy_(self.other(x).mean(0))
        elif self.how == "a part":
            self.last[2:5] = units.mean(0)[:3]
        else:
            self.last.mul_(0.5).add_(units.mean(0))
        return self.head(torch.tanh(units) + self.last)


@pytest.mark.parametrize(("how", "free"), [("other units", 8), ("a part", 0), ("its own", 8)])
def test_a_buffer_that_is_written_to_holds_the_units_that_were_written(how, free):
    net, x = randomise(Writing(how)), torch.randn(4, 6)
    permuted = fxfuse.permute(net, x, seed=1)
    for _ in range(3):
        assert gap(net, permuted, torch.randn(4, 6)) < PERMUTATION
    assert fxfuse.find_spaces(net, x).free_units == free


def test_steps_of_other_libraries_are_not_those_of_atens_name():
    ledger = label_network(trace(randomise(Between("by_name"))), (torch.randn(4, 6),))
    assert [step.name for step in ledger.steps["hidden"]] == ["fxfuse_tests::relu"]
