"""What a network costs: the multiply-adds of a run, and the number of parameters."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ..ir import Cost
from .modes import eval_mode


def cost_of(module: nn.Module, *inputs: torch.Tensor) -> Cost:
    """Count what a module costs on some inputs."""
    state = {name: p.detach() for name, p in module.named_parameters()}  # the counter trips over
    with FlopCounterMode(display=False) as counter, torch.no_grad(), eval_mode(module):
        functional_call(module, state, inputs)  # views of parameters that require gradients
    return Cost(counter.get_total_flops() / 2, sum(p.numel() for p in module.parameters()))


def cost_per_sample(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Cost:
    """Count what a module costs for one sample of some inputs."""
    cost = cost_of(module, *inputs)
    return Cost(cost.multiply_adds / len(inputs[0]), cost.parameters)
