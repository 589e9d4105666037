"""What networks cost."""

import torch

import fxfuse
from fxfuse.graph.cost import cost_of, cost_per_sample
from fxfuse.ir import Cost


def test_a_cost_is_counted():
    net, x = torch.nn.Linear(3, 5), torch.randn(2, 3)
    cost = cost_of(net, x)
    assert cost == Cost(30, 20) and cost_per_sample(net, (x,)) == Cost(15, 20)
    assert cost / Cost(60, 10) == Cost(0.5, 2.0) and cost + cost == Cost(60, 40)
    assert cost.within(Cost(30, 20)) and not cost.within(Cost(29, 20))
    assert not cost.within(Cost(30, 19))


class Queried(torch.nn.Module):
    """Reads a view of a parameter in a module."""

    def __init__(self):
        super().__init__()
        self.query = torch.nn.Parameter(torch.randn(1, 3))
        self.q, self.out = torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)

    def forward(self, x):
        return self.out(self.q(self.query.expand(len(x), -1)) * x.sum(1, keepdim=True))


def test_views_of_parameters_are_counted_too():
    net, x = Queried(), torch.randn(4, 3)
    cost = cost_of(net, x)
    assert cost == Cost(4 * (15 + 10), 3 + 20 + 12) and net.query.requires_grad
    fused = fxfuse.fuse([net, Queried()], torch.randn(40, 3), width=1.5)
    assert fused.meta["fxfuse"].costs == (Cost(25, 35),) * 2
