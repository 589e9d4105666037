"""Products with a matrix are linear layers where networks differ in how they write them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse.graph.products import as_linear, as_written, count_products
from fxfuse.graph.trace import trace
from tests.support.nets import gap, randomise
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))

WAYS = {
    "x @ W + b": lambda net, x: x @ net.W + net.b,
    "b + mm": lambda net, x: net.b + torch.mm(x, net.W),
    "matmul, add": lambda net, x: x.matmul(net.W).add(net.b),
    "addmm": lambda net, x: torch.addmm(net.b, x, net.W),
    "turned": lambda net, x: F.linear(x, net.W.t(), net.b),
    "no bias": lambda net, x: (x @ net.W) * (1 + 0 * net.b.sum()),
}


class Products(nn.Module):
    """Two layers, the first as a product."""

    def __init__(self, way, widths=(6, 8, 3)):
        super().__init__()
        self.W, self.b = nn.Parameter(torch.zeros(widths[:2])), nn.Parameter(torch.zeros(widths[1]))
        self.way, self.out = way, nn.Linear(*widths[1:])

    def forward(self, x):
        return self.out(torch.relu(self.way(self, x)))


@pytest.mark.parametrize("way", WAYS)
def test_a_product_computes_the_same_as_a_linear_layer_and_back(way):
    net = randomise(Products(WAYS[way]), 1)
    module = trace(net, X)
    assert count_products(module) == 1
    as_linear(module)
    assert count_products(module) == 0 and module.W.shape == (8, 6)
    assert gap(net, module, 3 * X) < FUNCTION
    as_written(module)
    assert module.W.shape == (6, 8) and gap(net, module, 3 * X) < FUNCTION


@pytest.mark.parametrize("way", some([w for w in WAYS if w != "no bias"], "x @ W + b", "turned"))
def test_products_and_linear_layers_are_one_family(way):
    product = randomise(Products(WAYS[way]), 1)
    linear = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    permuted = fxfuse.permute(product, X, seed=1)
    with torch.no_grad():
        linear[0].weight.copy_(permuted.W.t())
        linear[0].bias.copy_(permuted.b)
        linear[2].load_state_dict(permuted.out.state_dict())
    for nets in ([product, linear], [linear, product]):
        fused = fxfuse.fuse(nets, X)
        assert gap(product, fused, 3 * X) < FUNCTION
        nets[0].load_state_dict(fused.state_dict())


def test_a_matrix_that_others_read_too_stays():
    class Twice(Products):
        def forward(self, x):
            return (x @ self.W) @ self.W.t()

    assert count_products(trace(Twice(None), X)) == 0
