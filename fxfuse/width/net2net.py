"""Copies of one network that are wider and compute the same.

References:
    Chen et al. 2016 (Net2Net). Its deeper copies are `fxfuse.net2deeper`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx, nn

from .._checked import checked
from ..calibration.data import analyse_alike
from ..errors import ArgumentError
from ..graph.calls import Example, ToCall
from ..graph.trace import as_given, without_autocast
from ..ir import LayerFit
from ..report.report import Nearness
from ..spaces.network import Network
from ._carry import (
    ResizedCopy,
    add_noise,
    exact_copy,
    in_turn,
    plan_copies,
    with_graph_of,
)
from .reshape import change_most, reshaped, scaled_sizes, spaces_under_norms


@dataclass(frozen=True)
class WidthReport:
    """What a change of widths did, kept in the `meta["fxfuse"]` of its result.

    Attributes:
        sizes: Space name -> number of units before and after.
        kept: Space name -> why its width could not be changed.
        error: Largest difference of the outputs, relative to the largest output.
        layers: What was refitted, in order.
        nearness: How far a narrower network's outputs are from the model's, and those of the
            network whose widths it took, if any.
        warnings: What was warned of.
    """

    sizes: dict[str, tuple[int, int]]
    kept: dict[str, str]
    error: float
    layers: tuple[LayerFit, ...] = ()
    nearness: Nearness | None = None
    warnings: tuple[str, ...] = ()


@checked()
@without_autocast()
def net2wider(
    model: nn.Module,
    example: Example,
    *,
    factor: float = 2.0,
    like: nn.Module | None = None,
    seed: int | None = None,
    noise: float = 0.0,
    inputs: ToCall | None = None,
) -> fx.GraphModule:
    """Return a wider network that computes the same.

    The units of each space are duplicated, all about equally often. A space over whose units a norm
    averages grows by whole factors only. Groups and heads stay as many as they are and grow inside;
    with `like`, they are as in that network.

    Args:
        model: The network; not modified.
        example: One batch as the network takes it.
        factor: What all widths are multiplied by, at least 1. What cannot be widened keeps its
            width; the report says what and why.
        like: A wider network of the same structure, whose widths are taken instead. This is the
            surest way, and the result's state loads into its class.
        seed: Duplicate units in random order; if not given, they are duplicated in turn.
        noise: Standard deviation, relative to that of each weight, of noise on the weights that
            write duplicated units, so that training tells them apart. Without it the function is
            exact.
        inputs: From the example to args, kwargs of forward, where it is no batch as usual.

    Returns:
        A `GraphModule`; its `meta["fxfuse"]` holds a `WidthReport`.

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
    network, *wider = _analysed(model, like, example, "the wider model", inputs)

    def widen(wide: Network) -> ResizedCopy:
        return exact_copy(plan_copies(with_graph_of(wide, network), wide, in_turn(seed)))

    kept: dict[str, str] = {}
    if wider:
        copied = widen(*wider)
    else:
        copied, kept = _with_scaled_widths(network, factor, widen)
    if noise:
        add_noise(copied, noise, seed or 0)
    return _reported(model, copied, kept)


def _analysed(
    model: nn.Module, like: nn.Module | None, example: Example, name: str, to_call: ToCall | None
) -> list[Network]:
    """Analyse a model, and the one whose widths it is to have, if there is one."""
    models = [model] if like is None else [model, like]
    return analyse_alike(models, example, ["the model", name][: len(models)], to_call)


def _with_scaled_widths(
    network: Network, factor: float, copy_into: Callable[[Network], ResizedCopy]
) -> tuple[ResizedCopy, dict[str, str]]:
    """Change the widths of as many spaces as possible.

    Args:
        network: The network.
        factor: What the widths are multiplied by.
        copy_into: Makes a copy of the network with the widths of the one it is given.

    Returns:
        The copy, and why the spaces that kept their width did.
    """
    whole = spaces_under_norms(network)

    def change(names: set[str]) -> ResizedCopy:
        module = reshaped(network, scaled_sizes(network, dict.fromkeys(names, factor), whole))
        return copy_into(Network.of(network.name, module, network.example))

    every = [s.name for s in network.spaces]
    wanted = scaled_sizes(network, dict.fromkeys(every, factor), whole)
    changing = [s.name for s in network.spaces if wanted[s.name] != s.size]
    copied, kept = change_most(changing, change)
    if copied is None:
        raise ArgumentError(
            f"no space of {len(network.spaces)} whose width can be changed by {factor}",
            where=network.name,
            expected=next(iter(kept.values()), "a space of units that are not fixed"),
            do="build the network at the new widths yourself and pass it as `like`",
        )
    parents = {s.parent for s in network.spaces}
    for space in network.spaces:
        if space.name not in changing and space.size > 1:
            kept[space.name] = _why_unchanged(space.name, parents, whole)
    return copied, kept


def _why_unchanged(name: str, parents: set[str | None], whole: set[str]) -> str:
    if name in parents:
        return "its units are blocks, which change inside"
    return "a norm over its units allows whole multiples only" if name in whole else "too few units"


def _reported(model: nn.Module, copied: ResizedCopy, kept: dict[str, str]) -> fx.GraphModule:
    """Return the copy with its report and in the model's modes."""
    copied.module.meta["fxfuse"] = WidthReport(copied.plan.sizes(), kept, copied.error)
    return as_given(model, copied.module)


def _out_of_range(argument: str, expected: str) -> ArgumentError:
    return ArgumentError(
        "a value out of range",
        where=f"the argument `{argument}`",
        expected=expected,
        do="leave it out for the default",
    )
