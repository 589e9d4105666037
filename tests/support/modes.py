"""Networks that look at their mode in ways of their own."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.nets import mlp


class Both(NamedTuple):
    main: torch.Tensor
    aux: object


class Body(nn.Module):
    """Two steps and a result, with a head for training behind the first step."""

    def __init__(self, head=None):
        super().__init__()
        self.a, self.b, self.out = mlp(6, 8, 8, norm=True), nn.Linear(8, 8), nn.Linear(8, 3)
        self.head = head or nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(x)
        aux = self.head(x) if self.training else None
        x = self.out(F.dropout(torch.relu(self.b(x)), 0.4, self.training))
        return self.result(x, aux)

    def result(self, x, aux):
        return (x, aux) if self.training else x


class Named(Body):
    def result(self, x, aux):
        return Both(x, aux) if self.training else x


class Keyed(Body):
    def result(self, x, aux):
        return {"main": x, "all": [x, aux]} if self.training else {"main": x}
