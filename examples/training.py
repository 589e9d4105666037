"""Training and distillation that the examples share: small networks, minutes on a CPU."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxfuse._files import write_atomically

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    """Train a classifier with flips: SGD, momentum 0.9, weight decay 5e-4, one cycle up to 0.1."""
    generator = torch.Generator().manual_seed(seed)
    net = net.to(DEVICE).train()
    optimiser = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, steps, pct_start=0.2)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimiser.zero_grad()
            logits = net(flipped(x[batch], generator).to(DEVICE))
            F.cross_entropy(logits, y[batch].to(DEVICE)).backward()
            optimiser.step()
            schedule.step()
    return net.cpu().eval()


def flipped(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images `(n, c, h, w)`, each mirrored or not."""
    chosen = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(chosen[:, None, None, None], x.flip(-1), x)


def cached(path: Path, net: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """Return a network with the weights of a file, which is written first if it is not there."""
    if not path.exists():
        state = make().state_dict()
        write_atomically(path, lambda temporary: save_file(state, temporary))
    net.load_state_dict(load_file(path))
    return net.eval()


def distil(
    teachers: Sequence[nn.Module],
    student: nn.Module,
    x: Tensor,
    seconds: float,
    flips: bool,
    seed: int,
    rate: float = 3e-4,
) -> nn.Module:
    """Distil the teachers' mean logits into a copy of a student, for a given wall time.

    KL divergence at temperature 1, Adam, batches of 50 unlabelled inputs, norms in eval mode. The
    learning rate falls linearly to zero over the time; the teachers' passes count as well.

    Args:
        teachers: Networks of one task, in eval mode.
        student: Where training starts; not modified.
        x: Unlabelled images `(n, c, h, w)`, or other inputs without flips.
        seconds: Wall time.
        flips: Mirror half of the images, for teachers and student alike.
        seed: Of batches and flips.
        rate: Learning rate at the start.
    """
    start, net = time.perf_counter(), copy.deepcopy(student).eval()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(net.parameters(), rate)
    while True:
        for batch in torch.randperm(len(x), generator=generator).split(50):
            left = 1 - (time.perf_counter() - start) / seconds
            if left <= 0:
                return net
            optimiser.param_groups[0]["lr"] = rate * left
            inputs = flipped(x[batch], generator) if flips else x[batch]
            with torch.no_grad():
                aim = (sum(t(inputs) for t in teachers) / len(teachers)).log_softmax(1)
            loss = F.kl_div(net(inputs).log_softmax(1), aim, reduction="batchmean", log_target=True)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
