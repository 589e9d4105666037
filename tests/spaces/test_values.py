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


# an operator of another library whose name and tag say what is not true
torch.library.define("fxfuse_tests::relu", "(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
torch.library.impl("fxfuse_tests::relu", "CompositeExplicitAutograd", lambda x: x.cumsum(1))
torch.library.register_fake("fxfuse_tests::relu", torch.empty_like)


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
    return torch.ops.fxfuse_tests.relu(x)


def by_a_branch(x):
    return x.cumsum(1) if x.mean() > 0 else x


def by_a_count(x):
    return x * (torch.arange(8) < int((x > 0).sum()))


def by_bytes(x):
    return x.contiguous().view(torch.uint8).view(torch.float32).cumsum(1)


def by_sparse(x):
    return torch.sparse.mm(x.to_sparse(), torch.eye(8).flip(0))


def by_nested(x):
    return torch.nested.nested_tensor(list(x)).to_padded_tensor(0.0)


HIDDEN = {
    f.__name__: f
    for f in [
        *(by_numpy, by_array, by_dlpack, by_lists, by_a_number, in_memory, in_place, in_a_list),
        *(by_name, by_a_branch, by_a_count, by_bytes, by_sparse, by_nested),
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


class Picking(nn.Module):
    """Units, experts or rows of a table that are picked by number."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(6, 24), nn.Linear(8, 3)
        self.gate, self.low, self.high = (
            nn.Parameter(torch.zeros(s)) for s in (8, (24, 3), (3, 8))
        )
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 4, 5]))

    def forward(self, x, number):
        units = torch.tanh(self.first(x))
        return self.last(getattr(self, self.how.replace(" ", "_"))(units, number))

    def tasks(self, units, number):
        return units.view(-1, 3, 8)[torch.arange(4), number[:4] % 3]

    def one_task(self, units, number):
        return units.view(-1, 3, 8)[:, number[0] % 3]

    def units(self, units, number):
        return units.index_select(1, number[:8])

    def gathered(self, units, number):
        return units.gather(1, number[:8].expand(4, 8))

    def masked(self, units, number):
        return units.view(-1, 3, 8)[:, number[:3] >= number[:3].max()].sum(1)

    def mask_of_two_axes(self, units, number):
        return units.view(-1, 3, 8).mT[number[:32].view(4, 8) >= 0].view(4, 8, 3).sum(2)

    def best(self, units, number):
        units = units.view(-1, 3, 8)
        return units[torch.arange(4), units.mean(2).argmax(1)]

    def by_a_weight(self, units, number):
        return units.view(-1, 3, 8).sum(1)[:, self.gate.argsort()]

    def by_a_constant(self, units, number):
        return units.view(-1, 3, 8).sum(1)[:, self.order]

    def row_of_a_product(self, units, number):
        return units.view(-1, 3, 8).sum(1) + nn.functional.embedding(
            number[:4], self.low @ self.high
        )

    def rows_of_a_product(self, units, number):
        return units.view(-1, 3, 8).sum(1) + (self.low @ self.high)[number].sum(0)

    def rows_of_a_layer(self, units, number):
        return units.view(-1, 3, 8).sum(1) + torch.tanh(self.low @ self.high)[number].sum(0)


PICKS = [
    name.replace("_", " ")
    for name in vars(Picking)
    if not name.startswith("_") and name != "forward"
]


@pytest.mark.parametrize("how", PICKS)
def test_numbers_of_an_example_do_not_decide_which_units_are_free(how):
    net, x = randomise(Picking(how)), torch.randn(4, 6)
    for seen in (torch.zeros(32, dtype=torch.long), torch.arange(32) % 8):
        permuted = fxfuse.permute(net, (x, seen), seed=1)
        for other in (seen, torch.randint(0, 24, (32,)), torch.arange(31, -1, -1) % 24):
            assert gap(net, permuted, torch.randn(4, 6), other) < PERMUTATION


class Table(nn.Module):
    """A table of places, longer than most inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.zeros(16, 8))

    def forward(self, x):
        return self.b(torch.tanh(self.a(x) + self.table[: x.shape[1]]))


def test_places_that_the_example_does_not_reach_stay():
    net = randomise(Table())
    permuted = fxfuse.permute(net, torch.randn(2, 5, 6), seed=1)
    assert gap(net, permuted, torch.randn(2, 16, 6)) < PERMUTATION
    spaces = fxfuse.find_spaces(net, torch.randn(2, 5, 6))
    assert [s.size for s in spaces] == [8]
