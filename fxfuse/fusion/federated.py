"""Fusion as the aggregation step of federated learning, for clients of unlike networks.

Each client sends arrays, in the order of its network's state, and its number of samples. A server,
such as that of Flower, needs a function from these to the arrays of the next round: `Aggregation`
is one. No framework is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ..errors import ArgumentError
from .fuse import Method, fuse

Arrays = Sequence[np.ndarray]  # a network's state, in the order of its `state_dict`
Result = tuple[Arrays, int]  # what a client sends: its state, and how many samples it has


@dataclass(frozen=True, eq=False)
class Aggregation:
    """Fuses what clients send, each weighed by the number of its samples.

    Attributes:
        models: A network of each kind that clients have, with any weights; not modified. A client's
            network is the first of those whose state has the shapes of what it sends.
        data: Unlabelled inputs on the server, as for `fuse`.
        method: How to fuse: a method, or the name of a preset.
        options: Further arguments of `fuse`, such as `anchor`.

    Example:
        >>> from torch import nn
        >>> def net(width):
        ...     return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        >>> small, large = net(5), net(8)
        >>> sent = [(arrays_of(small), 100), (arrays_of(large), 300), (arrays_of(large), 50)]
        >>> server = Aggregation([small, large], torch.randn(64, 4), "best", {"anchor": 1})
        >>> [a.shape for a in server(sent)]
        [(8, 4), (8,), (3, 8), (3,)]
    """

    models: Sequence[nn.Module]
    data: Any
    method: Method | str | Callable[..., fx.GraphModule] = "fedma"
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, results: Sequence[Result]) -> list[np.ndarray]:
        """Return the state of the fused network.

        Args:
            results: Of each client, its state and how many samples it has.

        Raises:
            ArgumentError: If there are no results, a state is that of no model, or a number of
                samples is negative.
        """
        return arrays_of(self.fused(results))

    def fused(self, results: Sequence[Result]) -> fx.GraphModule:
        """Return the fused network, whose widths need not be those of any client.

        Args:
            results: As above.
        """
        _require_results(results)
        networks = [self._network(arrays, k) for k, (arrays, _) in enumerate(results)]
        weights = [float(count) for _, count in results]
        if callable(self.method) and not isinstance(self.method, Method):
            return self.method(networks, self.data, weights=weights, **self.options)
        return fuse(networks, self.data, weights=weights, method=self.method, **self.options)

    def _network(self, arrays: Arrays, client: int) -> nn.Module:
        """Return the network of a client."""
        sent = [tuple(np.shape(a)) for a in arrays]
        for model in self.models:
            if [tuple(t.shape) for t in model.state_dict().values()] == sent:
                network = copy.deepcopy(model)
                load_arrays(network, arrays)
                return network
        raise ArgumentError(
            f"a state of {len(sent)} arrays that is that of no model",
            where=f"result {client}",
            expected="the arrays of a client's state_dict, in its order, for a network in `models`",
            do="give a network of each kind that clients have: Aggregation(models=[...])",
        )


def arrays_of(model: nn.Module) -> list[np.ndarray]:
    """Return the state of a network as a client sends it: its arrays, in order."""
    return [t.detach().cpu().numpy().copy() for t in model.state_dict().values()]


def load_arrays(model: nn.Module, arrays: Arrays) -> None:
    """Give a network, in place, the state that `arrays_of` returned for one like it."""
    names = model.state_dict()
    pairs = zip(names.items(), arrays, strict=True)
    model.load_state_dict({n: torch.as_tensor(np.asarray(a)).to(t) for (n, t), a in pairs})


def _require_results(results: Sequence[Result]) -> None:
    if not len(results) or any(count < 0 for _, count in results):
        counts = [count for _, count in results]
        raise ArgumentError(
            f"sample counts {counts}" if counts else "no results",
            where="the results of an aggregation",
            expected="of one client at least, its arrays and how many samples it has",
            do="wait for clients, or leave out those that have none",
        )
