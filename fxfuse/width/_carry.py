"""Carry a network's weights into one of the same structure and other widths.

Each unit of the resized network is a copy of one unit of the original, its source. What writes a
unit is copied. What reads it is divided among the copies: with `m` copies, each is read with `1/m`
of the weight, so the function stays. Where two activations are multiplied and summed over units, as
queries and keys are, no weight can be divided, so both factors are scaled instead.

References:
    Chen et al. 2016 (Net2Net). Difference: any symmetry, not convolutions and linear layers alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, fx

from ..coupling.mixing import Couplings, turned
from ..coupling.problem import Problem
from ..depth import adopt
from ..errors import DataError, NotEquivalent, PairingError
from ..graph.compare import TOLERANCE, relative_error
from ..graph.state import device_of, floats_of, tensors_of
from ..graph.trace import run_once
from ..ir import Coupling, Space
from ..spaces.network import Network
from .reshape import spaces_under_norms

Chooser = Callable[[np.ndarray, int], np.ndarray]  # scores of units, a number -> that many of them

Maps = dict[tuple[str, int], Coupling]  # of each space and network


@dataclass(frozen=True, eq=False)
class CopyPlan:
    """Two networks of one structure, and which unit of the first each unit of the second copies.

    Attributes:
        problem: The original (0) and the resized network (1), which is the anchor.
        sources: Space name -> `(units of the resized network,)` the unit of the original that each
            is a copy of.
        merged: Space name -> `(units of the original,)` the first unit that always has the same
            value; what reads a unit reads this one instead. Spaces that are left out have no such.
    """

    problem: Problem
    sources: dict[str, np.ndarray]
    merged: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def original(self) -> Network:
        """The network whose weights are carried."""
        return self.problem.networks[0]

    @property
    def resized(self) -> Network:
        """The network whose widths are taken."""
        return self.problem.networks[1]

    @property
    def spaces(self) -> dict[str, tuple[Space, Space]]:
        """Space name -> the space in the original and in the resized network."""
        spaces = self.problem.spaces.items()
        return {name: (original, resized) for name, (original, resized) in spaces}

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return the number of units of each space, before and after."""
        return {name: (old.size, new.size) for name, (old, new) in self.spaces.items()}


# --- which units are copied -------------------------------------------------------------------


def plan_copies(
    network: Network,
    like: Network,
    choose: Chooser,
    scores: Mapping[str, np.ndarray] | None = None,
) -> CopyPlan:
    """Choose the source of each unit of a network of other widths.

    A unit inside a block (a group, a head) is a copy of a unit of the block that its block copies.

    Args:
        network: The network whose units are copied.
        like: The network of the wanted widths, equal to it node for node and name for name.
        choose: Takes the units to copy, given the scores of all.
        scores: By space of the network, the scores `(units,)`; if not given, all score 0.

    Raises:
        PairingError: If units do not lie in the same places in both networks.
    """
    problem = Problem.between(network, like)
    sources: dict[str, np.ndarray] = {}
    scores = scores or {}
    for name, (old, new) in problem.spaces.items():
        if not old.size:
            raise _not_in_the_same_places(new)
        blocks = sources.get(new.parent or "")
        sources[name] = _sources(old, new, blocks, scores.get(old.name, np.zeros(old.size)), choose)
    return CopyPlan(problem, sources)


def with_graph_of(other: Network, network: Network) -> Network:
    """Return a network with the graph and the names of another one of its structure."""
    names = [[(n.name, n.target) for n in x.module.graph.nodes] for x in (network, other)]
    return network if names[0] == names[1] else adopt(network, other)[0]


def _sources(
    old: Space, new: Space, block_sources: np.ndarray | None, scores: np.ndarray, choose: Chooser
) -> np.ndarray:
    """Choose the sources of one space; `block_sources` are those of the space of its blocks."""
    if new.blocks is None and old.blocks is None:
        return choose(scores, new.size)
    if new.blocks is None or old.blocks is None:
        raise _not_in_the_same_places(new)
    old_count, new_count = (int(blocks.max()) + 1 for blocks in (old.blocks, new.blocks))
    if block_sources is None:
        if old_count != new_count:
            raise _not_in_the_same_places(new)
        block_sources = np.arange(new_count)
    sources = np.empty(new.size, dtype=int)
    for block, source_block in enumerate(block_sources[:new_count]):
        copies = np.flatnonzero(new.blocks == block)
        candidates = np.flatnonzero(old.blocks == source_block)
        sources[copies] = candidates[choose(scores[candidates], len(copies))]
    return sources


def in_turn(seed: int | None) -> Chooser:
    """Return a choice that takes all units in turn, again and again, so each about equally often.

    Args:
        seed: Go through the units in random order from the second round on.
    """
    rng = None if seed is None else np.random.default_rng(abs(seed))

    def choose(scores: np.ndarray, count: int) -> np.ndarray:
        rounds = range(-(-count // len(scores)))
        units = np.arange(len(scores))
        turns = [rng.permutation(units) if rng is not None and i else units for i in rounds]
        return np.concatenate(turns)[:count]

    return choose


def strongest(scores: np.ndarray, count: int) -> np.ndarray:
    """Choose the units of the highest scores, in their order; all in turn if more are wanted."""
    if count >= len(scores):
        return np.arange(count) % len(scores)
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def copy_counts(plan: CopyPlan, name: str) -> list[np.ndarray]:
    """Return, per block of a resized space, how often each unit of the source block is copied.

    A space without blocks counts as one block.
    """
    old, new = plan.spaces[name]
    sources = plan.sources[name]
    if new.blocks is None or old.blocks is None:
        return [np.bincount(sources, minlength=old.size)]
    counts = []
    for block in np.unique(new.blocks):
        in_block = sources[new.blocks == block]
        candidates = np.flatnonzero(old.blocks == old.blocks[in_block[0]])
        counts.append(np.bincount(in_block, minlength=old.size)[candidates])
    return counts


def _not_in_the_same_places(space: Space) -> PairingError:
    return PairingError(
        f"a space of {space.size} units that does not lie in the same places in both networks",
        where=f"space '{space.name}'",
        expected="networks of one structure that differ in width alone",
        do="compare print(fxfuse.find_spaces(...)) of both",
    )


# --- the weights ------------------------------------------------------------------------------

# How the code of a network may scale sums over units of two activations: by the root of the number
# of units in the block (the head) or in all, by a fixed number; or it normalises both factors.
_SCALINGS = ("by the block", "by the width", "fixed", "normalised")


def copy_maps(plan: CopyPlan, scaling: str) -> Maps:
    """Return the maps from the original's units to their copies.

    Args:
        plan: Which unit each copy is of.
        scaling: How the code scales sums over units of two activations, one of `_SCALINGS`.
    """
    maps, multiplied = {}, plan.problem.unread
    for name, (old, new) in plan.spaces.items():
        sources = plan.sources[name]
        first = plan.merged.get(name, np.arange(old.size))
        shape, copies = (new.size, old.size), np.arange(new.size)
        written = np.ones(new.size)
        if name in multiplied:
            merged = np.sqrt(np.bincount(first, minlength=old.size))[sources]
            written = _factor_scale(old, new, sources, scaling) * merged
        shares = 1.0 / np.bincount(sources, minlength=old.size)[sources]
        unproject = csr_array((shares, (sources, copies)), shape=shape[::-1])
        project = csr_array((written, (copies, sources)), shape=shape)
        gains = written if name in multiplied else None  # it gives whole units, of another size
        maps[name, 0] = Coupling(project, csr_array(unproject[first]), gains=gains)
    return maps


def _factor_scale(old: Space, new: Space, sources: np.ndarray, scaling: str) -> np.ndarray:
    """Return what the copies in both factors of a product are multiplied by.

    Each of `m` copies is to contribute `1/m` of the product, so each factor is scaled by its root.
    If the code divides the sum by the root of the number of units, this is made up for.
    """
    if scaling == "normalised":
        return np.ones(new.size)
    blocks = np.zeros(new.size, dtype=int) if new.blocks is None else new.blocks
    source_in_block = blocks * old.size + sources
    _, at, counts = np.unique(source_in_block, return_inverse=True, return_counts=True)
    scale = 1.0 / counts[at]
    if scaling == "by the width":
        scale = scale * np.sqrt(new.size / old.size)
    if scaling == "by the block":
        before = old.size if old.blocks is None else np.bincount(old.blocks)[old.blocks[sources]]
        scale = scale * np.sqrt(np.bincount(blocks)[blocks] / before)
    return np.sqrt(scale)


def carry_weights(plan: CopyPlan, maps: Maps, module: fx.GraphModule) -> fx.GraphModule:
    """Return the resized network with the weights of a network like the original.

    Args:
        plan: Which units are copies of which.
        maps: The maps to use.
        module: A network with the original's graph and widths; its precision is kept.
    """
    couplings = Couplings(plan.problem, maps)
    resized = copy.deepcopy(plan.resized.module).to(device_of(module))
    given = tensors_of(module)
    for name, tensor in tensors_of(resized).items():
        old = given[name].detach()
        if old.is_floating_point():
            new = couplings.carry(name, old.cpu().numpy(), 0)
            tensor.data = torch.as_tensor(np.array(new, order="C")).to(old)
        elif old.dtype == torch.bool:
            new = couplings.carry(name, old.float().cpu().numpy(), 0)
            tensor.data = torch.as_tensor(np.array(new, order="C") >= 0.5).to(old)
        elif old.shape == tensor.shape:
            tensor.data = old.clone()
        tensor.requires_grad_(given[name].requires_grad)
    return resized


@dataclass(frozen=True, eq=False)
class ResizedCopy:
    """A copy of a network with other widths.

    Attributes:
        plan: Which units it has.
        module: The copy.
        maps: The maps that made its weights.
        error: Largest difference of the outputs on the example, relative to the largest output.
    """

    plan: CopyPlan
    module: fx.GraphModule
    maps: Maps
    error: float


def closest_copy(
    plan: CopyPlan, module: fx.GraphModule, example: tuple[Tensor, ...], enough: float
) -> ResizedCopy:
    """Return the resized copy whose outputs are nearest, over all ways the code may scale products.

    Args:
        plan: Which units are copies of which.
        module: The original, or a network with its graph and widths.
        example: Inputs on which outputs are compared.
        enough: Error at which no other way is tried.
    """
    copies: list[ResizedCopy] = []
    for scaling in _SCALINGS if plan.problem.unread else _SCALINGS[:1]:
        maps = copy_maps(plan, scaling)
        resized = carry_weights(plan, maps, module)
        copies.append(ResizedCopy(plan, resized, maps, _output_error(module, resized, example)))
        if copies[-1].error <= enough:
            break
    return min(copies, key=lambda c: c.error)


def _output_error(
    before: fx.GraphModule, after: fx.GraphModule, example: tuple[Tensor, ...]
) -> float:
    return relative_error(*(run_once(m, example, "the resized model") for m in (before, after)))


# --- copies that keep the function ------------------------------------------------------------

EXACT = 1e-6  # relative error in float64; parts of the network may compute in less


def exact_copy(plan: CopyPlan) -> ResizedCopy:
    """Return a wider copy that computes the same.

    The maps are checked on a variant of the network in which no tensor is constant: fresh zeros and
    ones would hide a wrong map.

    Raises:
        PairingError: If a space gets fewer units, or not a multiple where a norm needs it.
        NotEquivalent: If the function changed.
    """
    _require_no_loss(plan)
    _require_even_copies(plan)
    original = plan.original
    varied, example, tolerance = _precise_variant(original)
    checked = closest_copy(plan, varied, example, tolerance)
    if checked.error > tolerance:
        raise NotEquivalent(
            f"outputs that differ by {checked.error:.2e} relative once units are duplicated",
            where=original.name,
            expected=f"at most {tolerance:.0e}, in double precision",
            do="widen it into a network that you build wider yourself (`like`), or fewer spaces",
        )
    module = carry_weights(plan, checked.maps, original.module)
    error = _output_error(original.module, module, original.example)
    return ResizedCopy(plan, module, checked.maps, error)


def _require_no_loss(plan: CopyPlan) -> None:
    for name, (old, new) in plan.spaces.items():
        lost = len(np.unique(plan.sources[name])) < old.size
        if lost or any((counts == 0).any() for counts in copy_counts(plan, name)):
            raise PairingError(
                f"a space of {old.size} units that is to have {new.size}, so that some are lost",
                where=f"space '{name}'",
                expected="a network that is nowhere narrower",
                do="use fxfuse.narrow to leave units out, or widen the other one",
            )


def _require_even_copies(plan: CopyPlan) -> None:
    """Refuse uneven copies under a norm: they would change the mean over the units."""
    for name in spaces_under_norms(plan.resized):
        if any(len(set(counts)) > 1 for counts in copy_counts(plan, name)):
            old, new = plan.spaces[name]
            raise PairingError(
                f"a space of {old.size} units, to be {new.size}, under a norm over units",
                where=f"space '{name}'",
                expected="a multiple of the width, so that mean and spread over units stay",
                do="choose widths that are whole multiples, or fuse the networks instead",
            )


def _precise_variant(network: Network) -> tuple[fx.GraphModule, tuple[Tensor, ...], float]:
    """Return a variant of a network, inputs for it, and the error to allow.

    It is in float64 if its code can run in that, where even a small error is no rounding.
    """
    precise = _varied(network.module).double()
    example = tuple(t.double() if t.is_floating_point() else t for t in network.example)
    try:
        run_once(precise, example, network.name)
    except DataError:  # the code converts to another precision by itself
        return _varied(network.module), network.example, TOLERANCE
    return precise, example, EXACT


def _varied(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy in which noise is added to every tensor that is constant."""
    varied, generator = copy.deepcopy(module), torch.Generator().manual_seed(0)
    for tensor in floats_of(varied).values():
        if tensor.numel() > 1 and tensor.min() == tensor.max():
            spread = 0.3 / max(tensor[0].numel(), 1) ** 0.5
            noise = torch.rand(tensor.shape, generator=generator) * 2 - 1
            tensor.data.add_((spread * noise).to(tensor))
    return varied


def add_noise(copied: ResizedCopy, noise: float, seed: int) -> None:
    """Add noise to the weights that write duplicated units, so that training tells them apart.

    Args:
        copied: Its module is edited in place.
        noise: Standard deviation, relative to that of each weight.
        seed: Seed of the noise.
    """
    wide, generator = copied.plan.resized, torch.Generator().manual_seed(seed)
    contracted = {t for names in wide.weights.values() for t in names}
    for name, tensor in copied.module.named_parameters():
        written = [(space, axis) for space, axis in wide.spaces.on(name) if not axis.reads]
        if name not in contracted or tensor.dim() < 2:
            continue
        for space, axis in written:
            sources = copied.plan.sources[space.name]
            duplicated = np.bincount(sources)[sources] > 1
            rows = torch.as_tensor(axis.index[duplicated].reshape(-1), device=tensor.device)
            dense, dim = tensor.detach(), axis.dim
            if axis.groups > 1:  # the outputs of a transposed convolution, group by group
                dense, dim = turned(dense, axis.groups), 0
            weights = dense.index_select(dim, rows)
            drawn = torch.randn(weights.shape, generator=generator).to(weights)
            noisy = dense.index_add(dim, rows, drawn * noise * tensor.detach().std())
            tensor.data.copy_(turned(noisy, axis.groups) if axis.groups > 1 else noisy)
