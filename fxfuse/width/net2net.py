"""Which unit of a network each unit of another of the same structure, but other widths, stands for.

Where there are more units there, some stand for the same one; where there are fewer, for the
strongest. Units inside a block (a group, a head) stand for units of the block that theirs stands
for.

Carry a network's weights into one of the same structure and other widths.

Each unit there stands for one unit here (`stands`). Where units are duplicated, what is written is
copied and what is read is shared out among the copies, so that the function stays; this is measured
before it is claimed.

References:
    Chen et al. 2016 (Net2Net). Difference: any symmetry, not convolutions and linear layers alone;
    products of duplicated units (queries and keys) are scaled so that they stay as they were.

Copies of one network that are deeper, wider or narrower.

The first two keep its function; the third is a start for fusing a network into a smaller one.

References:
    Chen et al. 2016 (Net2Net).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, fx, nn

from ..calibration.affine import fold, folds
from ..calibration.prepare import analysed
from ..coupling.mixing import Mixer, correspond
from ..depth.deepen import Balanced, adopt
from ..errors import ArgumentError, DataError, NotEquivalent, PairingError
from ..graph.trace import Example, copy_modes, device_of, plain_modes, run_once
from ..graph.verify import TOLERANCE, relative_error
from ..ir import Coupling, Space
from ..spaces.network import Network
from .reshape import by_halves, normed, rescaled_sizes, reshaped

Pick = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True, eq=False)
class Resize:
    """A network, one of other widths, and which unit of the first each unit there stands for.

    Attributes:
        mixer: The two as networks of one structure; the second is the anchor.
        stands: Space name -> `(units there,)` units here.
    """

    mixer: Mixer
    stands: dict[str, np.ndarray]

    @property
    def networks(self) -> tuple[Network, Network]:
        """The network, and the one whose widths are taken."""
        here, there = self.mixer.balanced.networks
        return here, there

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return the number of units of each space here and there."""
        spaces = self.mixer.match.spaces
        return {name: (own.size, there.size) for name, (own, there) in spaces.items()}


def resize(network: Network, like: Network, pick: Pick, weigh: bool = False) -> Resize:
    """Choose which unit of a network each unit of another of the same structure stands for.

    Args:
        network: The network.
        like: The network whose widths are wanted, equal to it node for node and name for name.
        pick: Scores of units and a number to that many of the units, in order.
        weigh: Score units by their weights; otherwise all are alike.

    Raises:
        PairingError: If units do not lie in the same places.
    """
    balanced = Balanced((network, like), ((), ()), (0.0, 0.0))
    match = correspond(balanced, 1)
    stands: dict[str, np.ndarray] = {}
    scores = strengths(network) if weigh else {}
    for name, (own, there) in match.spaces.items():
        if not own.size:
            raise _elsewhere(there)
        known = scores.get(own.name, np.zeros(own.size))
        stands[name] = _stands(own, there, stands.get(there.parent or ""), known, pick)
    return Resize(Mixer(balanced, 1, match, (1.0, 0.0)), stands)


def _stands(
    own: Space, there: Space, outer: np.ndarray | None, scores: np.ndarray, pick: Pick
) -> np.ndarray:
    if there.blocks is None and own.blocks is None:
        return pick(scores, there.size)
    if there.blocks is None or own.blocks is None:
        raise _elsewhere(there)
    counts = [int(blocks.max()) + 1 for blocks in (own.blocks, there.blocks)]
    if outer is None and counts[0] != counts[1]:
        raise _elsewhere(there)
    found = np.empty(there.size, dtype=int)
    for b in range(counts[1]):
        here = np.flatnonzero(there.blocks == b)
        units = np.flatnonzero(own.blocks == (b if outer is None else outer[b]))
        found[here] = units[pick(scores[units], len(here))]
    return found


def duplicates(seed: int | None) -> Pick:
    """Return a choice that takes each unit equally often, up to one.

    The first units stand for themselves; of the others each stands for one in turn, or, with a
    seed, for one in random order.
    """
    rng = None if seed is None else np.random.default_rng(seed)

    def pick(scores: np.ndarray, count: int) -> np.ndarray:
        rounds = range(-(-count // len(scores)))
        plain = np.arange(len(scores))
        turns = [rng.permutation(plain) if rng is not None and i else plain for i in rounds]
        return np.concatenate(turns)[:count]

    return pick


def strongest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the units of the highest scores in their order; all in turn if more are wanted."""
    if count >= len(scores):
        return np.arange(count) % len(scores)
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def strengths(network: Network) -> dict[str, np.ndarray]:
    """Return the norm of what writes each unit, its norms folded in, per space."""
    state = fold(network, folds(network))
    contracted = {t for names in network.book.weights.values() for t in names}
    found = {}
    for space in network.spaces:
        total = np.zeros(space.size)
        for axis in space.axes:
            if not axis.reads and axis.tensor in contracted:
                rows = np.moveaxis(state[axis.tensor].astype(float), axis.dim, 0)
                squares = (rows.reshape(len(rows), -1) ** 2).sum(1)
                total += squares[axis.index].sum(1) / max(squares.sum(), 1e-30)
        found[space.name] = np.sqrt(total)
    for space in network.spaces:  # blocks without weights of their own are as strong as what is in
        for inner in network.spaces:
            within = inner.blocks if inner.parent == space.name else None
            if within is not None and not found[space.name].any():
                found[space.name] = np.bincount(within, found[inner.name] ** 2, space.size)
    return found


def _elsewhere(there: Space) -> PairingError:
    return PairingError(
        f"a space of {there.size} units that does not lie in the same places in both networks",
        where=f"space '{there.name}'",
        expected="networks of one structure that differ in width alone",
        do="compare print(fxfuse.find_spaces(...)) of both",
    )


def copies(plan: Resize, name: str) -> list[np.ndarray]:
    """Return, per block of the wanted space, how often each unit of the block here is taken."""
    own, there = plan.mixer.match.spaces[name]
    stands = plan.stands[name]
    if there.blocks is None or own.blocks is None:
        return [np.bincount(stands, minlength=own.size)]
    found = []
    for b in np.unique(there.blocks):
        taken = stands[there.blocks == b]
        units = np.flatnonzero(own.blocks == own.blocks[taken[0]])
        found.append(np.bincount(taken, minlength=own.size)[units])
    return found


EXACT = 1e-6  # relative error of the outputs in float64; a little may be computed in less


_PRODUCTS = ("by the block", "by the width", "fixed", "normalised")  # how code may scale such sums


@dataclass(frozen=True)
class Resizing:
    """What a change of widths did, kept in the `meta["fxfuse"]` of its result.

    Attributes:
        sizes: Space name -> number of units before and after.
        kept: Space name -> why its width could not be changed.
        error: Largest difference of the outputs, relative to the largest output.
    """

    sizes: dict[str, tuple[int, int]]
    kept: dict[str, str]
    error: float


def couple(plan: Resize, products: str) -> None:
    """Fill in the couplings; say how the code scales what sums over units of two activations."""
    summed = _summed(plan)
    for name, (own, there) in plan.mixer.match.spaces.items():
        stands = plan.stands[name]
        shape, rows = (there.size, own.size), np.arange(there.size)
        written = np.ones(there.size)
        if name in summed:
            written = _product_scale(own, there, stands, products)
        shares = 1.0 / np.bincount(stands, minlength=own.size)[stands]
        plan.mixer.couplings[name, 0] = Coupling(
            csr_array((written, (rows, stands)), shape=shape),
            csr_array((shares, (stands, rows)), shape=shape[::-1]),
        )


def _summed(plan: Resize) -> set[str]:
    """Return the spaces that no weight reads: two activations are contracted over their units."""
    spaces = plan.networks[1].spaces
    outer = {s.parent for s in spaces}
    read = {s.name for s in spaces if any(a.reads for a in s.axes)}
    return {s.name for s in spaces if s.axes} - outer - read


def _product_scale(own: Space, there: Space, stands: np.ndarray, products: str) -> np.ndarray:
    """Return the factor of units that no weight reads, as two activations are contracted there.

    Of `m` copies each brings `1 / m` of the product, so each of the two factors brings the root of
    that. Code may scale the sum by the root of the number of units, in the block (the head) or in
    all, which is made up for; it may scale it by a fixed number, or normalise both factors.
    """
    if products == "normalised":
        return np.ones(there.size)
    blocks = np.zeros(there.size, dtype=int) if there.blocks is None else there.blocks
    inside = blocks * own.size + stands
    _, at, times = np.unique(inside, return_inverse=True, return_counts=True)
    scale = 1.0 / times[at]
    if products == "by the width":
        scale = scale * np.sqrt(there.size / own.size)
    if products == "by the block":
        before = own.size if own.blocks is None else np.bincount(own.blocks)[own.blocks[stands]]
        scale = scale * np.sqrt(np.bincount(blocks)[blocks] / before)
    return np.sqrt(scale)


def carried(plan: Resize, source: fx.GraphModule) -> fx.GraphModule:
    """Return the network of the other widths with the weights of a network like the first."""
    module = copy.deepcopy(plan.networks[1].module).to(device_of(source))
    given = dict([*source.named_parameters(), *source.named_buffers()])
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        old = given[name].detach()
        if old.is_floating_point():
            dense = old.cpu() if old.dtype in (torch.float32, torch.float64) else old.cpu().float()
            new = plan.mixer.carry(name, dense.numpy(), 0)
            tensor.data = torch.as_tensor(np.ascontiguousarray(new)).to(old)
        elif old.shape == tensor.shape:
            tensor.data = old.clone()
        tensor.requires_grad_(given[name].requires_grad)
    return module


def nearest(
    plan: Resize, source: fx.GraphModule, example: tuple[Tensor, ...], enough: float
) -> tuple[fx.GraphModule, float]:
    """Return the resized network that is most like a network, and the error of its outputs.

    Args:
        plan: Whose units stand for which; its couplings are filled in.
        source: The network, or one of its structure and widths.
        example: Inputs to compare the outputs on.
        enough: The error at which to look no further.
    """
    found: list[tuple[float, fx.GraphModule]] = []
    for products in _PRODUCTS if _summed(plan) else _PRODUCTS[:1]:
        couple(plan, products)
        module = carried(plan, source)
        found.append((error_of(source, module, example), module))
        if found[-1][0] <= enough:
            break
    error, module = min(found, key=lambda pair: pair[0])
    return module, error


def error_of(before: fx.GraphModule, after: fx.GraphModule, example: tuple[Tensor, ...]) -> float:
    """Return the difference of the outputs of two networks, relative to the largest."""
    return relative_error(*(run_once(m, example, "the resized model") for m in (before, after)))


# --- what is exact ----------------------------------------------------------------------------


def exact(plan: Resize) -> tuple[fx.GraphModule, float]:
    """Return the network at other widths with its function unchanged, and the error measured.

    The maps are checked on a copy of the network in which no tensor is constant first: fresh zeros
    and ones would hide a wrong one.

    Raises:
        PairingError: If a space is narrower there, or cannot be duplicated evenly where it must.
        NotEquivalent: If the function changed.
    """
    _require_no_loss(plan)
    _require_even_norms(plan)
    network = plan.networks[0]
    varied, example, tolerance = _precise(network)
    error = nearest(plan, varied, example, tolerance)[1]
    if error > tolerance:
        raise NotEquivalent(
            f"outputs that differ by {error:.2e} relative once units are duplicated",
            where=network.name,
            expected=f"at most {tolerance:.0e}, in double precision",
            do="widen it into a network that you build wider yourself (`like`), or fewer spaces",
        )
    module = carried(plan, network.module)
    return module, error_of(network.module, module, network.example)


def _precise(network: Network) -> tuple[fx.GraphModule, tuple[Tensor, ...], float]:
    """Return a varied copy of a network, inputs and the error to allow: in float64, if it can run.

    There a small error is a wrong map and no rounding.
    """
    exact = _varied(network.module).double()
    example = tuple(t.double() if t.is_floating_point() else t for t in network.example)
    try:
        run_once(exact, example, network.name)
    except DataError:  # its code asks for another precision
        return _varied(network.module), network.example, TOLERANCE
    return exact, example, EXACT


def _require_no_loss(plan: Resize) -> None:
    for name, (own, there) in plan.mixer.match.spaces.items():
        lost = len(np.unique(plan.stands[name])) < own.size
        if lost or any((counts == 0).any() for counts in copies(plan, name)):
            raise PairingError(
                f"a space of {own.size} units that is to have {there.size}, too few in a place",
                where=f"space '{name}'",
                expected="a network that is nowhere narrower",
                do="use fxfuse.narrow to leave units out, or widen the other one",
            )


def _require_even_norms(plan: Resize) -> None:
    for name in normed(plan.networks[1]):
        if any(len(set(counts)) > 1 for counts in copies(plan, name)):
            own, there = plan.mixer.match.spaces[name]
            raise PairingError(
                f"a space of {own.size} units, to be {there.size}, behind a norm over units",
                where=f"space '{name}'",
                expected="a multiple of the width, so that mean and spread over units stay",
                do="choose widths that are whole multiples, or fuse the networks instead",
            )


def _varied(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy in which tensors that were constant are not."""
    varied, generator = copy.deepcopy(module), torch.Generator().manual_seed(0)
    for tensor in [*varied.parameters(), *varied.buffers()]:
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
            spread = 0.3 / max(tensor[0].numel(), 1) ** 0.5
            noise = torch.rand(tensor.shape, generator=generator) * 2 - 1
            tensor.data.add_((spread * noise).to(tensor))
    return varied


def disturb(plan: Resize, module: fx.GraphModule, noise: float, seed: int) -> None:
    """Add noise to what writes duplicated units, relative to the spread of each weight."""
    wide, generator = plan.networks[1], torch.Generator().manual_seed(seed)
    contracted = {t for names in wide.book.weights.values() for t in names}
    for name, tensor in module.named_parameters():
        axes = [(s, a) for s, a in wide.spaces.on(name) if not a.reads]
        if name not in contracted or tensor.dim() < 2:
            continue
        for space, axis in axes:
            stands = plan.stands[space.name]
            again = np.bincount(stands)[stands] > 1
            rows = torch.as_tensor(axis.index[again].reshape(-1), device=tensor.device)
            part = tensor.detach().index_select(axis.dim, rows)
            drawn = torch.randn(part.shape, generator=generator).to(part)
            tensor.data.index_add_(axis.dim, rows, drawn * noise * tensor.detach().std())


Attempt = tuple[fx.GraphModule, Resize, float]


@plain_modes()
def net2wider(
    model: nn.Module,
    example: Example,
    *,
    factor: float = 2.0,
    like: nn.Module | None = None,
    seed: int | None = None,
    noise: float = 0.0,
) -> fx.GraphModule:
    """Return a wider network that computes the same.

    Every unit of a space is duplicated about equally often. A space over whose units a norm takes
    moments grows by whole multiples only; groups and heads grow inside, or, with `like`, as there.

    Args:
        model: The network; not modified.
        example: One batch as the network takes it.
        factor: Of all widths, at least 1. What cannot be widened keeps its width; the report says
            what and why.
        like: A wider network of the same structure, whose widths are taken instead: the surest way,
            and the result's state loads into its class.
        seed: Duplicate units in random order, not in turn.
        noise: Standard deviation, relative to that of each weight, of what is added to the weights
            that write duplicated units, so that training tells them apart. The function is exact
            only without it.

    Returns:
        A `GraphModule`; its `meta["fxfuse"]` holds a `Resizing`.

    Raises:
        ArgumentError: If an argument is out of range, or nothing can be widened.
        PairingError: If `like` is of another structure or narrower somewhere, or no multiple where
            a norm needs one.
        NotEquivalent: If the function would change.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 3))
        >>> x = torch.randn(7, 4)
        >>> wide = net2wider(net, x)
        >>> wide.get_submodule("0").out_features, torch.allclose(wide(x), net(x), atol=1e-5)
        (10, True)
    """
    if factor < 1 or noise < 0:
        raise _out_of_range("factor" if factor < 1 else "noise", "at least 1, and noise at least 0")
    network = analysed(model, example, "the model")

    def attempt(wide: Network) -> Attempt:
        plan = resize(_like(network, wide), wide, duplicates(seed))
        module, error = exact(plan)
        return module, plan, error

    kept: dict[str, str] = {}
    if like is not None:
        module, plan, error = attempt(analysed(like, example, "the wider model"))
    else:
        (module, plan, error), kept = _rescaled(network, factor, attempt)
    if noise:
        disturb(plan, module, noise, seed or 0)
    return _finished(model, module, plan, kept, error)


@plain_modes()
def narrow(
    model: nn.Module, example: Example, *, share: float = 0.5, like: nn.Module | None = None
) -> fx.GraphModule:
    """Return a narrower network with the strongest units of each space: structured pruning.

    Its function is not the model's. Fuse the model into it to carry over what the other units do.

    Args:
        model: The network; not modified.
        example: One batch as the network takes it.
        share: Of the units of each space that are kept, above 0 and at most 1. Groups and heads
            stay and lose units inside. What cannot be made narrower keeps its width; the report
            says what and why.
        like: A narrower network of the same structure, whose widths are taken instead: the surest
            way, and the result's state loads into its class.

    Returns:
        A `GraphModule`; its `meta["fxfuse"]` holds a `Resizing`.

    Raises:
        ArgumentError: If an argument is out of range, or nothing can be made narrower.
        PairingError: If `like` is of another structure.

    Example:
        >>> import torch, fxfuse
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
        >>> data = torch.randn(64, 4)
        >>> small = narrow(net, data)
        >>> fused = fxfuse.fuse([net, small], data, weights=[1, 0], anchor=1)
        >>> [tuple(p.shape) for p in fused.parameters() if p.dim() == 2]
        [(4, 4), (6, 4)]

    References:
        Singh and Jaggi 2020 (OTFusion), who fuse a network into its pruned self.
        Li et al. 2017, pruning by the norms of filters.
    """
    if not 0 < share <= 1:
        raise _out_of_range("share", "above 0 and at most 1")
    network = analysed(model, example, "the model")

    def attempt(small: Network) -> Attempt:
        own = _like(network, small)
        plan = resize(own, small, strongest, weigh=True)
        module, error = nearest(plan, own.module, own.example, 0.0)
        return module, plan, error

    kept: dict[str, str] = {}
    if like is not None:
        module, plan, error = attempt(analysed(like, example, "the narrower model"))
    else:
        (module, plan, error), kept = _rescaled(network, share, attempt)
    return _finished(model, module, plan, kept, error)


def _like(network: Network, other: Network) -> Network:
    """Return a network in the graph and the names of another of its structure."""
    names = [[(n.name, n.target) for n in x.module.graph.nodes] for x in (network, other)]
    return network if names[0] == names[1] else adopt(network, network.module, other)


def _rescaled(
    network: Network, factor: float, attempt: Callable[[Network], Attempt]
) -> tuple[Attempt, dict[str, str]]:
    """Change the widths of as many spaces as can be; return the result, and why not the others."""
    best: list[Attempt] = []
    even = normed(network)

    def change(names: set[str]) -> None:
        shape = reshaped(network, rescaled_sizes(network, factor, names, even))
        best[:] = [attempt(Network.of(network.name, shape, network.example))]

    alone = rescaled_sizes(network, factor, {s.name for s in network.spaces}, even)
    able = [s.name for s in network.spaces if alone[s.name] != s.size]
    kept = by_halves(able, change)
    if not best:
        raise ArgumentError(
            f"no space of {len(network.spaces)} whose width can be changed by {factor}",
            where=network.name,
            expected=next(iter(kept.values()), "a space of units that are not fixed"),
            do="build the network at the new widths yourself and pass it as `like`",
        )
    outer = {s.parent for s in network.spaces}
    for space in network.spaces:
        if space.name not in able and space.size > 1:
            kept[space.name] = _why_whole(space.name, outer, even)
    return best[0], kept


def _why_whole(name: str, outer: set[str | None], even: set[str]) -> str:
    if name in outer:
        return "its units are blocks, which change inside"
    return "a norm over its units allows whole multiples only" if name in even else "too few units"


def _finished(
    model: nn.Module, module: fx.GraphModule, plan: Resize, kept: dict[str, str], error: float
) -> fx.GraphModule:
    module.meta["fxfuse"] = Resizing(plan.sizes(), kept, error)
    return copy_modes(model, module)


def _out_of_range(argument: str, expected: str) -> ArgumentError:
    return ArgumentError(
        "a value out of range",
        where=f"the argument `{argument}`",
        expected=expected,
        do="leave it out for the default",
    )
