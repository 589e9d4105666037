"""Whether two networks compute the same: how unlike their outputs are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from ..errors import NotEquivalent
from .hooks import copied
from .inputs import Inputs
from .modes import evaluating_part
from .structures import tensors_in

ModelT = TypeVar("ModelT", bound=nn.Module)
TOLERANCE = 1e-4  # relative, of the largest output, in float32


def relative_error(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference of outputs, relative to the largest value in each.

    It is infinite if shapes or numbers of outputs differ. Whole numbers are right (0) or wrong (1).

    Args:
        a: Outputs; the differences are relative to these.
        b: The outputs to compare with them.
    """
    worst = 0.0
    for x, y in zip(a, b):
        x, y = x.detach(), y.detach()
        if x.shape != y.shape:
            return math.inf
        if not x.is_floating_point():
            worst = max(worst, float(not torch.equal(x, y)))
        elif x.numel():
            difference = (x.double() - y.double()).abs().max()
            error = float(difference / x.double().abs().max().clamp(min=1e-12))
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst if len(a) == len(b) else math.inf


@contextmanager
def same_chance(device: torch.device | None = None) -> Iterator[None]:
    """Draw the same random numbers each time, on the CPU and on a device that is named.

    The caller's generators stay as they are, of other accelerators too, all of which
    `torch.manual_seed` would seed.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(0)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(0)
        yield


def require_same(model: nn.Module, module: fx.GraphModule, inputs: Inputs) -> None:
    """Compare a graph with its model in eval mode, on the example and on other inputs of its kind.

    Inputs that the model itself refuses, or of which it makes values that are not finite, say
    nothing.

    Args:
        model: The model; not modified.
        module: Its graph; not modified.
        inputs: The example; nothing is compared without one.

    Raises:
        NotEquivalent: If outputs differ.
    """
    pair = None  # copies that have run on the same inputs, so that their buffers agree
    for kind, tensors, do in _kinds(inputs) if inputs.tensors else ():
        original, graph = pair or (_copied(model), _evaluating(_copied(module)))
        pair = None
        try:
            expected = _outputs(original, inputs, tensors)
        except Exception:
            continue
        if not all(t.isfinite().all() for t in expected if t.is_floating_point()):
            continue
        error = relative_error(expected, _outputs(graph, None, tensors))
        if error > TOLERANCE:
            raise NotEquivalent(
                f"a graph whose outputs differ by {error:.2e} relative on {kind}",
                where=type(model).__name__,
                expected=f"at most {TOLERANCE:.0e}",
                do=do,
            )
        pair = original, graph


def _evaluating(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without what only training computes, which may refuse other inputs."""
    return evaluating_part(graph) or graph


VALUES = "look for a branch on the values or the type of a tensor"
SAMPLES = (
    "look for a loop over the samples or a branch on how many there are, and write it for a whole "
    "batch"
)


def _kinds(inputs: Inputs) -> Iterator[tuple[str, tuple[Tensor, ...], str]]:
    """Yield the example and inputs like it, and what to do where a graph is wrong on them.

    These are mirrored and smaller inputs, in batches of two more sizes.
    """
    yield "the example", inputs.tensors, VALUES
    mirrored = tuple(_scaled(t.flip(-1) if t.dim() > 1 else t) for t in inputs.tensors)
    mirrored = tuple(t.roll(i, 0) if t.dim() else t for i, t in enumerate(mirrored))
    yield "mirrored inputs", mirrored, VALUES
    count = len(mirrored[0]) if mirrored[0].dim() else 0  # others, as edges, may have their own
    longer = tuple(torch.cat([t, t[:1], t[:1]]) if t.dim() else t for t in mirrored)
    yield "a batch of another size", longer, SAMPLES
    if any(t.dim() and len(t) != count for t in mirrored):
        pairs = zip(mirrored, longer)
        more = tuple(b if a.dim() and len(a) == count else a for a, b in pairs)
        yield "a graph with more nodes", more, SAMPLES
    yield "a batch of one sample", tuple(t[:1] if t.dim() else t for t in mirrored), SAMPLES


def _scaled(tensor: Tensor) -> Tensor:
    return tensor * 0.75 if tensor.is_floating_point() else tensor


def _copied(module: ModelT) -> ModelT:
    """Copy a network, but not its parameters: a forward may write to its buffers."""
    return copied(module).eval()


def _outputs(module: nn.Module, inputs: Inputs | None, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Run a network; what it draws at random is the same for all networks."""
    copies = [t.clone() for t in tensors]
    with torch.no_grad(), same_chance():
        if inputs is None:
            return tensors_in(module.forward(*copies))
        return tensors_in(inputs.call(module.forward, copies))
