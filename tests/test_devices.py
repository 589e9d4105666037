"""No operation mixes tensors of two devices, whatever device the models are on."""

import pytest
import torch

import fxfuse
from fxfuse.presets import NAMED
from tests.support.nets import gap, randomise, residual
from tests.support.second_device import SECOND, DeviceError, SecondDevice, on_second, put, where
from tests.support.sweeps import some

SAMPLES, PIXELS = 40, 64
X = torch.randn(SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(SAMPLES) % 3


def pair(alike=False):
    """Two networks, of the same layers or not."""
    return [
        randomise(residual((8, 2), (8, n)), k).eval() for k, n in enumerate((2, 2 if alike else 1))
    ]


ALIKE = {"average", "task_arithmetic", "ties", "dare", "slerp"}


@pytest.mark.parametrize("name", some(sorted(NAMED), "best"))
def test_methods_keep_to_the_models_device_and_leave_activations_there(name):
    nets = pair(name in ALIKE)
    expected = fxfuse.fuse(nets, X, method=name)
    with SecondDevice() as mode:
        fused = fxfuse.fuse([on_second(net) for net in nets], X, method=name)
        assert {where(t) for t in (*fused.parameters(), *fused.buffers())} == {SECOND}
        assert max(mode.read, default=0) < SAMPLES * PIXELS
    assert gap(expected, fused, X) < 1e-2


CALLS = {
    "align": lambda nets: fxfuse.align(nets, X),
    "balance": lambda nets: fxfuse.balance(nets, X),
    "barrier": lambda nets: fxfuse.barrier(nets, X, [(X, Y)]),
    "compare": lambda nets: fxfuse.compare({"a": nets[0], "b": nets[1]}, [(X, Y)]),
    "automatic weights": lambda nets: fxfuse.fuse(nets, X, weights="auto"),
    "wider": lambda nets: fxfuse.fuse(nets, X, width=1.5),
    "find_spaces": lambda nets: fxfuse.find_spaces(nets[0], X[:2]),
    "inspect": lambda nets: fxfuse.inspect(nets[0], X[:2]),
    "narrow": lambda nets: fxfuse.narrow(nets[0], X),
    "net2deeper": lambda nets: fxfuse.net2deeper(nets[1], nets[0], X),
    "net2wider": lambda nets: fxfuse.net2wider(nets[0], X[:2]),
}


@pytest.mark.parametrize("name", some(sorted(CALLS), "net2wider"))
def test_every_function_keeps_to_the_models_device(name):
    with SecondDevice():
        CALLS[name]([on_second(net) for net in pair(name == "barrier")])


def test_mixed_devices_are_refused():
    with SecondDevice() as mode:
        x = put(torch.ones(2, 3), SECOND)
        assert x.device == (x @ x.T).device == x[0].device == torch.zeros_like(x).device == SECOND
        assert x.to(torch.zeros(2)).device == x.cpu().device == torch.ones(2).device != SECOND
        assert torch.zeros(2, device=x.device).device == torch.ones(3).to(x).device == SECOND
        assert (x * torch.tensor(2.0)).device == x[:, torch.tensor([0])].device == SECOND
        for mistake in (
            lambda: x + torch.ones(3),
            lambda: torch.cat([x, torch.ones(2, 3)]),
            lambda: x.index_select(0, torch.tensor([0])),
            lambda: x.numpy(),
        ):
            with pytest.raises(DeviceError):
                mistake()
        assert mode.read == [6, 6]
