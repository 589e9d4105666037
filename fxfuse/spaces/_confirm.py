"""Confirmation of spaces on other inputs: what changes the function there is frozen.

Labels are those of one run, and they know only what operators show. So every unit is moved once,
and the network runs on inputs of other numbers and, where it takes them, of other sizes. If its
outputs change, the spaces at fault are searched by halves. Rounding is no evidence: where single
precision sees a difference, double precision decides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..graph.compare import TOLERANCE, relative_error, same_chance
from ..graph.modes import eval_mode, is_choice
from ..graph.state import device_of
from ..graph.structures import tensors_in
from ..graph.trace import Interpreter, without_autocast
from ..ir import Space, Spaces
from ._labels import Ledger
from ._moves import draw_orders, rearrange, sources_along
from ._solve import spaces_of

REASON = "moving it changes the outputs on other inputs"
EXACT = 1e-6  # as TOLERANCE, in double precision
ROUGH = 1e-3  # where a network cannot run in double precision
ZERO = 1e-9  # outputs that are smaller are rounding noise

Tensors = tuple[Tensor, ...]
Named = list[tuple[str, Tensor]]  # tensors, each with the node that it is the value of
Returned = tuple[Tensors, Named]  # inputs, and what a network returned for them


def confirmed(module: fx.GraphModule, example: Tensors, ledger: Ledger) -> Spaces:
    """Return the spaces of a ledger whose units keep the function on other inputs, too.

    Args:
        module: The network; not modified.
        example: The inputs that it was labelled on.
        ledger: What was found there; units that are at fault are frozen in it.
    """
    spaces = spaces_of(ledger)
    run = _other_run(module, example) if len(spaces) else None
    while run is not None and len(spaces):  # without a run, nothing more is known
        names, differs = [s.name for s in spaces], partial(_differs, module, run, spaces)
        wrong = set(_at_fault(names, differs)) if differs(names) else ()
        if not wrong:
            break
        for space in spaces:
            if space.name in wrong:
                _freeze(ledger, spaces, space)
        spaces = spaces_of(ledger)
    return spaces


def _freeze(ledger: Ledger, spaces: Spaces, space: Space) -> None:
    """Freeze the units of a space; of one that no tensor has, the units inside its blocks."""
    for axis in space.axes:
        labels = ledger.axes[axis.tensor, axis.dim][axis.index]
        ledger.frozen.append((np.unique(labels), "", REASON))
    if not space.axes:
        for inner in [s for s in spaces if s.parent == space.name]:
            _freeze(ledger, spaces, inner)


def _at_fault(names: list[str], differs: Callable[[list[str]], bool]) -> list[str]:
    """Return those of some spaces at fault that are; all, if they are only together."""
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    wrong = [half for half in halves if half and differs(half)]
    if len(names) == 1 or not wrong:
        return names
    return [name for half in wrong for name in _at_fault(half, differs)]


def _differs(module: fx.GraphModule, run: Returned, spaces: Spaces, names: list[str]) -> bool:
    """Tell whether moving the units of some spaces changes any output of a run."""
    order = draw_orders(spaces, np.random.default_rng(0), names)
    error = _error(module, spaces, order, *run)
    if error <= TOLERANCE:
        return False
    inputs = _doubled(run[0])
    outputs = _run(copy.deepcopy(module).double(), inputs)  # one such copy at a time
    if outputs is None:
        return error > ROUGH
    return _error(module, spaces, order, inputs, outputs, exact=True) > EXACT


def _error(
    module: fx.GraphModule,
    spaces: Spaces,
    order: dict[str, np.ndarray],
    inputs: Tensors,
    outputs: Named,
    exact: bool = False,
) -> float:
    """Return the largest relative difference of a rearranged copy from a run on some inputs.

    Where a network is cut, units of what it reads or returns change places, too. With `exact`, the
    copy runs in double precision.
    """
    names = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    given = tuple(_moved(t, spaces, order, name) for name, t in zip(names, inputs))
    copied = rearrange(module, spaces, order)
    moved = _run(copied.double() if exact else copied, given)
    if moved is None or len(moved) != len(outputs):
        return float("inf")
    pairs = [(_moved(a, spaces, order, name), b) for (name, a), (_, b) in zip(outputs, moved)]
    pairs = [(a, b) for a, b in pairs if not _is_noise(a, b)]
    return relative_error([a for a, _ in pairs], [b for _, b in pairs])


def _moved(tensor: Tensor, spaces: Spaces, order: dict[str, np.ndarray], node: str) -> Tensor:
    """Return the value of a node with its units in a new order."""
    for dim, size in enumerate(tensor.shape):
        axes = [(s, a) for s in spaces for a in s.features if (a.tensor, a.dim) == (node, dim)]
        if axes:
            source = sources_along(size, axes, order)
            tensor = tensor.index_select(dim, source.to(tensor.device))
    return tensor


def _is_noise(a: Tensor, b: Tensor) -> bool:
    return a.is_floating_point() and all(not t.numel() or t.abs().max() < ZERO for t in (a, b))


def _run(module: fx.GraphModule, inputs: Tensors) -> Named | None:
    """Return what a network returns in either mode, with the same random numbers at each call.

    None if it refuses the inputs, or if outputs are not finite.
    """
    device, returned = device_of(module), Named()

    def look(node: fx.Node, _: Any, values: dict[fx.Node, Any]) -> None:
        if node.op == "output" or is_choice(module, node):
            for part in [part for part in tree_leaves(node.args) if isinstance(part, fx.Node)]:
                returned.extend((part.name, t) for t in tensors_in(values[part]))

    interpreter = Interpreter(module, look=look)
    interpreter.extra_traceback = False
    with same_chance(device), without_autocast(), eval_mode(module), torch.no_grad():
        try:
            interpreter.run(*[t.clone() for t in inputs])
        except Exception:
            return None
    finite = all(t.isfinite().all() for _, t in returned if t.is_floating_point())
    return returned if finite else None


def _other_run(module: fx.GraphModule, example: Tensors) -> Returned | None:
    """Run a network on inputs of other numbers, larger where it takes larger ones.

    None if it takes no inputs, or none gives finite outputs.
    """
    generator = torch.Generator().manual_seed(0)
    turned = tuple(t.flip(0) if t.dim() else t for t in example)
    sizes = sorted({n for t in example for n in t.shape}, reverse=True)
    for inputs in (tuple(_other_numbers(t, generator) for t in example), turned, example):
        larger = (tuple(map(_grown, inputs, example, [size] * len(inputs))) for size in sizes)
        for tried in (*larger, inputs):
            outputs = _run(module, tried)
            if outputs is not None:
                return tried, outputs
    return None


def _other_numbers(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return numbers like those of a tensor: as scattered, or within the same bounds."""
    shape = tuple(tensor.shape)
    if tensor.is_floating_point() and tensor.numel():
        scale = float(tensor.double().std(correction=0)) or 1.0
        noise = torch.randn(shape, generator=generator).to(tensor)
        return tensor + scale * noise
    if tensor.is_complex() or not tensor.numel():
        return tensor
    low, high = int(tensor.min()), int(tensor.max())
    return torch.randint(low, high + 1, shape, generator=generator).to(tensor)


def _grown(tensor: Tensor, given: Tensor, size: int) -> Tensor:
    """Return a tensor with one place more, a copy of the first, along axes of a size at first."""
    for dim in [d for d, n in enumerate(given.shape) if n == size]:
        tensor = torch.cat([tensor, tensor.narrow(dim, 0, min(1, tensor.shape[dim]))], dim)
    return tensor


def _doubled(inputs: Tensors) -> Tensors:
    return tuple(t.double() if t.is_floating_point() else t for t in inputs)
