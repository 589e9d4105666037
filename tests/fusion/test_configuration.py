"""The configuration of a wider fused network: its class, built with it, loads the state."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.width import evenly
from tests.support.nets import randomise
from tests.support.tolerances import FUNCTION


@dataclass
class Config:
    inputs: int = 8
    hidden: int = 8
    inner: int = 8
    length: int = 8  # a number that is no size


class Configured(nn.Module):
    """Has two widths of its own, and inputs of the same size."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.a, self.b = (
            nn.Linear(config.inputs, config.hidden),
            nn.Linear(config.hidden, config.inner),
        )
        self.c = nn.Linear(config.inner, 3)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def fused(width, *models):
    method = fxfuse.Method(room=evenly)
    return fxfuse.fuse(list(models), torch.randn(60, 8), width=width, method=method)


def test_the_report_says_with_which_numbers_the_class_is_built(tmp_path):
    nets = [randomise(Configured(Config()), seed) for seed in (1, 2)]
    wide = fused(1.5, *nets)
    changes = wide.meta["fxfuse"].configuration
    assert set(changes) == {"hidden", "inner"}
    assert all(before == 8 and after > 8 for before, after in changes.values())
    again = Configured(replace(Config(), **{key: new for key, (_, new) in changes.items()}))
    again.load_state_dict(wide.state_dict())
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert torch.allclose(again(x), wide(x), atol=FUNCTION)
    key, (old, new) = next(iter(changes.items()))
    assert f"{key} {old} -> {new}" in str(wide.meta["fxfuse"])
    fxfuse.save(wide, tmp_path / "net.safetensors")
    assert fxfuse.load(tmp_path / "net.safetensors").meta["fxfuse"].configuration == changes


@pytest.mark.parametrize("config", [Config(inner=6), Config(hidden=6)])
def test_with_the_anchors_widths_nothing_changes(config):
    nets = [randomise(Configured(Config()), 1), randomise(Configured(config), 2)]
    net = fused(1, *nets)
    assert net.meta["fxfuse"].configuration == {}


def test_widths_that_no_configuration_has_are_none():
    class Twice(Configured):
        def __init__(self, config):
            super().__init__(config)
            self.b = nn.Linear(config.hidden, config.hidden)
            self.c = nn.Linear(config.hidden, 3)

    nets = [randomise(Twice(Config()), seed) for seed in (1, 2)]
    method = fxfuse.Method(room=fxfuse.width.deepest_first)
    wide = fxfuse.fuse(nets, torch.randn(60, 8), width=1.2, method=method)
    sizes = {tuple(t.shape) for name, t in wide.state_dict().items() if name.endswith("bias")}
    assert len(sizes) == 3 and wide.meta["fxfuse"].configuration == {}
