"""Refit each head behind a fused trunk to what its own network gives there.

A fused trunk does not give quite what a head was trained on. So the head is refitted like any fused
network, with itself as the only parent: contractions, and the map in front of the head, to the
values in its own network, norms to the statistics of what they read now. The samples of this fit
are pairs: what the fused trunk gives, and what the network's own trunk gives.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, fx

from ..calibration.data import Calibration
from ..calibration.run import working_batch
from ..calibration.shares import Batch
from ..coupling.measure import Evidence, measure
from ..coupling.mixing import apply_along
from ..coupling.problem import Problem
from ..coupling.transport import InPlace
from ..depth.deepen import Balanced
from ..graph.inputs import as_example
from ..graph.state import device_of
from ..graph.trace import run_once
from ..refit.emit import emit, rescale
from ..refit.moments import Outcome, Refit
from ..spaces.network import OPEN, Network

OWN = "own_features"  # what the network's own trunk hands on


@dataclass(frozen=True, eq=False)
class Graft:
    """A head that reads a fused trunk, beside the same head that reads its own.

    Attributes:
        name: How the head's network is called.
        module: Takes what the fused trunk hands on, and then some of the network's inputs.
        twin: The same nodes; computes from what `moved` makes of the network's own value what the
            network computes.
        moved: `(positions that the twin reads, own positions)`; None if it reads the own value.
        dim: The axis of the units at the cut, None if there are none.
        inputs: The indices of the inputs that both read.
        how: How the head reads the fused trunk, in words.
    """

    name: str
    module: fx.GraphModule
    twin: fx.GraphModule
    moved: csr_array | None
    dim: int | None
    inputs: tuple[int, ...]
    how: str

    def own(self, value: Tensor) -> Tensor:
        """Return what the twin reads for a value of the network's own trunk."""
        if self.moved is None:
            return value
        assert self.dim is not None, "there are units to move"
        mapped = apply_along(self.moved, value.cpu().numpy(), self.dim)
        return torch.from_numpy(np.ascontiguousarray(mapped)).to(value)


def refitted(
    graft: Graft, own: Network, trunk: Network, data: Calibration, refit: Refit
) -> tuple[fx.GraphModule, Outcome]:
    """Refit a head to the values that its own network has behind the cut.

    Args:
        graft: The head; not modified.
        own: The trunk of the head's network.
        trunk: The fused trunk.
        data: Calibration inputs.
        refit: How to correct a network on data.

    Returns:
        The refitted module, and how near it came to its network.
    """
    pairs = data.of_same_samples(_pairs(graft, trunk, own, data))
    example = as_example(pairs.example(), device_of(trunk.module))
    reading = _network(graft, graft.module, example, apart=False)
    knowing = _network(graft, graft.twin, example, apart=True)
    problem, wanted = _alone(reading), _alone(knowing)
    couplings, targets = (InPlace()(p, Evidence({}, {})) for p in (problem, wanted))
    samples = min(pairs.samples, refit.samples([reading, knowing]))
    evidence = measure(wanted, pairs, None, refit.settles(wanted), samples)
    module, plans = emit(couplings, evidence.outputs)
    fused = replace(reading, module=module)
    outcome = refit(fused, targets, plans, pairs, samples)
    rescale(fused, couplings)
    for node in [n for n in module.graph.nodes if n.op == "placeholder" and n.target == OWN]:
        module.graph.erase_node(node)
    for node in module.graph.nodes:
        node.meta.pop(OPEN, None)
    module.recompile()
    return module, outcome


def _pairs(graft: Graft, trunk: Network, own: Network, data: Calibration) -> Iterator[Batch]:
    """Yield what the fused trunk and the head's own one make of each batch, with its inputs."""
    for batch in data.own(working_batch([trunk, own])):
        inputs = as_example(batch, device_of(trunk.module))
        value, theirs = (run_once(n.module, inputs, n.name)[0] for n in (trunk, own))
        yield (value, graft.own(theirs), *(batch[i] for i in graft.inputs))


def _network(graft: Graft, module: fx.GraphModule, example: Batch, apart: bool) -> Network:
    """Analyse a head that is given both values, and reads one of them."""
    module = copy.deepcopy(module)
    value = next(iter(module.graph.nodes))
    with module.graph.inserting_after(value):
        own = module.graph.placeholder(OWN)
    if apart:
        value.replace_all_uses_with(own)
    if graft.dim is not None:
        value.meta[OPEN] = own.meta[OPEN] = graft.dim
    module.recompile()
    return Network.of(graft.name, module, example)


def _alone(network: Network) -> Problem:
    """Return the problem of fusing a single network."""
    return Problem.of(Balanced((network,), ((),), (0.0,)), 0, (1.0,))
