"""Copies of one network that are deeper, wider or narrower.

The first two keep its function; the third is a start for fusing a network into a smaller one.

References:
    Chen et al. 2016 (Net2Net).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from .adoption import adopt
from .errors import ArgumentError
from .fusion import balance
from .intake import analysed
from .ir import Alignment
from .network import Network
from .reshaping import by_halves, rescaled_sizes, reshaped
from .resizing import Resizing, disturb, exact, nearest
from .stands import Resize, duplicates, normed, resize, strongest
from .tracing import Example, copy_modes, plain_modes

Attempt = tuple[fx.GraphModule, Resize, float]


def net2deeper(
    model: nn.Module, like: nn.Module, data: Any, alignment: Alignment | None = None
) -> fx.GraphModule:
    """Return a network of the depth of another: the depth-aligned shallow network.

    It has neutral layers where the other has layers that it lacks, at its own widths, and computes
    what the model computes. If the widths agree, its state loads into the deeper class.

    Args:
        model: The network; not modified.
        like: The deeper network; not modified.
        data: Calibration inputs, as for `fuse`.
        alignment: Which layers correspond, of `[model, like]`; found by `align` if not given.

    Raises:
        PairingError: If the networks do not belong to one family.
        PassError: If a layer that the network lacks has no neutral form.
        NotEquivalent: If the function would change.

    Example:
        >>> import torch
        >>> def net(*widths):
        ...     pairs = zip((4, *widths), widths)
        ...     hidden = [m for i, o in pairs for m in (nn.Linear(i, o), nn.ReLU())]
        ...     return nn.Sequential(*hidden, nn.Linear(widths[-1], 3))
        >>> shallow, deep, x = net(5, 5), net(5, 5, 5), torch.randn(64, 4)
        >>> deeper = net2deeper(shallow, deep, x)
        >>> deep.load_state_dict(deeper.state_dict())
        <All keys matched successfully>
        >>> torch.allclose(deep(x), shallow(x), atol=1e-5)
        True
    """
    return balance([model, like], data, alignment=alignment)[0]


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
