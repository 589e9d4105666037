"""Carry a network's weights into one of the same structure and other widths.

Each unit there stands for one unit here (`stands`). Where units are duplicated, what is written is
copied and what is read is shared out among the copies, so that the function stays; this is measured
before it is claimed.

References:
    Chen et al. 2016 (Net2Net). Difference: any symmetry, not convolutions and linear layers alone;
    products of duplicated units (queries and keys) are scaled so that they stay as they were.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, fx

from .checks import TOLERANCE, relative_error
from .errors import DataError, NotEquivalent, PairingError
from .ir import Coupling, Space
from .network import Network
from .stands import Resize, copies, normed
from .tracing import device_of, run_once

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
