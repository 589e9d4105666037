"""Networks that compute something else, or more, in training mode."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_structure

from tests.support.nets import mlp, outputs


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


class NamedInBothModes(Body):
    def result(self, x, aux):
        return Both(x, aux)


class HeadWithModes(nn.Module):
    """A head with everything that has a mode, which writes to what it reads."""

    def __init__(self):
        super().__init__()
        self.drop, self.a, self.norm = nn.Dropout(0.3), nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.b = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x):
        self.seen.add_(x.detach().sum(0))
        x = self.norm(self.a(F.relu(self.drop(x), inplace=True)))
        return F.dropout(x, 0.5, training=self.training).view(x.size(0), -1) @ self.b


class Writing(Body):
    """A head that writes to the stream, which eval mode must not see."""

    def forward(self, x):
        x = self.b(self.a(x))
        aux = self.head(F.relu(x, inplace=True)) if self.training else None
        return self.result(self.out(x), aux)


class Repeating(Body):
    """Steps that training takes once more than eval mode does."""

    def forward(self, x):
        x = self.a(x)
        aux = self.head(x.view(x.size(0), -1)) if self.training else None
        return self.result(self.out(self.b(x.view(x.size(0), -1))), aux)


class Supervised(Body):
    """One head on two depths, the deeper one first."""

    def __init__(self):
        super().__init__(nn.Identity())

    def forward(self, x):
        x = self.a(x)
        y = torch.relu(self.b(x))
        return (self.out(y), self.out(x)) if self.training else self.out(y)


class Features(Body):
    """Training returns more of what is computed in both modes."""

    def forward(self, x):
        x = self.head(self.a(x))
        return self.result(self.out(self.b(F.pad(x, (0, 3)))), x)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x) if self.training else x


class Counting(nn.BatchNorm1d):
    """A norm with an activation, as in `timm`; tracing looks inside, as it is not of torch.nn."""

    def __init__(self, width):
        super().__init__(width)
        self.act = nn.ReLU()

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        torch._assert(x.dim() == 2, f"two axes, not those of {x}")
        state = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(F.batch_norm(x, *state, self.training, self.momentum, self.eps))


class Wrapped(nn.Module):
    """A part with a head, behind a part that adds noise in training."""

    def __init__(self):
        super().__init__()
        self.noise, self.part = Noise(), Named(nn.Sequential(Noise(), nn.Linear(8, 2)))

    def forward(self, x):
        return self.part(self.noise(x))


class Counted(Body):
    """Records and flags of both kinds, in the head and before it."""

    def __init__(self):
        super().__init__(nn.Sequential(Counting(8), Noise(), nn.Linear(8, 4)))
        self.a = nn.Sequential(nn.Linear(6, 8), Counting(8))


HEADS = {
    "tuple": Body,
    "named": Named,
    "named in both modes": NamedInBothModes,
    "keyed": Keyed,
    "with modes": lambda: Body(HeadWithModes()),
    "writing": Writing,
    "repeating": Repeating,
    "supervised": Supervised,
    "features": Features,
    "wrapped": Wrapped,
    "counted": Counted,
}


def same(a, b):
    """Whether two results are equal, types of tuples and keys of dictionaries included."""
    pairs = zip(tree_leaves(a), tree_leaves(b))
    alike = all(torch.equal(x, y) if torch.is_tensor(x) else x is y for x, y in pairs)
    return alike and type(a) is type(b) and tree_structure(a) == tree_structure(b)


def seeded(module, x):
    torch.manual_seed(1)
    return outputs(module, x.clone())
