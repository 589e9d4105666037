"""The processes of one run, as `torchrun` starts them, and sums over all of them.

Each process runs the same calls on a share of the samples. What is summed over samples is summed
over processes by `total`, so that all of them go on with the same numbers. Outside `summing` it
returns what it is given: then each process has seen all samples itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ProcessError

_apart: ContextVar[bool] = ContextVar("apart", default=False)
_summing: ContextVar[bool] = ContextVar("summing", default=False)


def world() -> int:
    """Return how many processes work together; join them, if `torchrun` started this one."""
    if _apart.get() or not dist.is_available():
        return 1
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return 1
        with _errors():
            dist.init_process_group("gloo")
    return dist.get_world_size()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


@contextmanager
def apart() -> Iterator[None]:
    """Let each process work by itself, on all data that it is given.

    Use it where only one process fuses, or each fuses other networks.

    Example:
        >>> with apart():
        ...     world()
        1
    """
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


@contextmanager
def summing(on: bool) -> Iterator[None]:
    """Let `total` sum over processes inside, if each sees samples of its own there."""
    token = _summing.set(on)
    try:
        yield
    finally:
        _summing.reset(token)


def sums_up() -> bool:
    """Tell whether `total` sums over processes here."""
    return _summing.get()


def total(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the sums over processes of some tensors, which all processes have in these shapes.

    Sums are in float64.
    """
    if not _summing.get():
        return tensors
    device = _workplace(tensors[0].device)
    flat = torch.cat([t.to(device, torch.float64).flatten() for t in tensors])
    with _errors():
        dist.all_reduce(flat)
    sums = zip(flat.split([t.numel() for t in tensors]), tensors)
    return tuple(part.view(t.shape).to(t.device) for part, t in sums)


def total_of(number: float) -> float:
    """Return the sum over processes of a number."""
    return float(total(torch.tensor(number, dtype=torch.float64))[0])


def gathered(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all processes, whose first axes may differ in length."""
    if world() == 1:
        return [tensor]
    device = _workplace(tensor.device)
    own = torch.tensor([len(tensor)], device=device)
    with _errors():
        lengths = [torch.empty_like(own) for _ in range(world())]
        dist.all_gather(lengths, own)
        counts = [int(n) for n in lengths]
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:], device=device)
        padded[: len(tensor)] = tensor
        content = padded.flatten().view(torch.uint8)  # whatever the type
        parts = [torch.empty_like(content) for _ in counts]
        dist.all_gather(parts, content)
    whole = (part.view(tensor.dtype).view(padded.shape) for part in parts)
    return [part[:count].to(tensor.device) for part, count in zip(whole, counts)]


def require_alike(numbers: Sequence[int], what: str) -> None:
    """Refuse processes that do not work on the same.

    Args:
        numbers: Numbers that say what a process works on.
        what: What they are numbers of.

    Raises:
        ProcessError: If some process has other numbers.
    """
    if world() == 1:
        return
    first, *others = gathered(torch.tensor(numbers, dtype=torch.long))
    if not all(torch.equal(first, other) for other in others):
        raise ProcessError(
            f"processes with different {what}",
            where="the processes of this run, each in its call of fxfuse",
            expected="the same call, with the same models, in every process",
            do="load the same checkpoints everywhere; to fuse in one process alone, or other "
            "models in each, do it inside `with fxfuse.calibration.apart():`",
        )


def taken_from_first(tensors: Sequence[Tensor]) -> None:
    """Write the values that the first process has into tensors that all processes have."""
    for tensor in tensors if world() > 1 else ():
        values = tensor.detach().to(_workplace(tensor.device)).contiguous()
        content = values.flatten().view(torch.uint8).clone()
        with _errors():
            dist.broadcast(content, 0)
        tensor.detach().copy_(content.view(values.dtype).view(values.shape))


def _workplace(device: torch.device) -> torch.device:
    """Return a device on which the processes can exchange tensors; the one given, if they can."""
    backends = dict(part.split(":") for part in str(dist.get_backend_config()).split(","))
    if backends.get(device.type) not in (None, "undefined"):
        return device
    if "cpu" in backends:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what the exchange raises into an error of the library."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"an exchange between processes that failed: {error}",
            where="torch.distributed",
            expected="processes that all make the same calls, and go on until the end",
            do="look for the first error among the outputs of the processes; call fxfuse in all of "
            "them, or in one alone inside `with fxfuse.calibration.apart():`",
        ) from error
