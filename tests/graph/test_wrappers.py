"""What people wrap around a model is taken off; what is compiled for good is refused by name."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fxfuse
from fxfuse.errors import ModelError
from fxfuse.graph.wrappers import unwrapped
from tests.support.nets import gap, mlp, randomise
from tests.support.tolerances import FUNCTION

X = torch.randn(24, 6)
WRAPPERS = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "two": lambda net: nn.DataParallel(AveragedModel(net)),
}


def net(seed=1):
    return randomise(mlp(6, 8, 3), seed=seed).eval()


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_models_are_fused_as_bare_ones(name):
    wrapped, other = WRAPPERS[name](net()), net(2)
    fused = fxfuse.fuse([wrapped, other], X)
    assert gap(fxfuse.fuse([net(), other], X), fused, X) <= FUNCTION
    net().load_state_dict(fused.state_dict())
    assert gap(net(), fxfuse.permute(wrapped, X), X) <= FUNCTION
    assert fxfuse.find_spaces(wrapped, X).free_units == 8
    assert unwrapped(net()) is not None


def test_exported_programs_and_their_modules_are_models():
    program = torch.export.export(
        net(), (X,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    for model in (program, program.module()):
        permuted = fxfuse.permute(model, X)
        assert gap(net(), permuted, X) <= FUNCTION
        assert fxfuse.find_spaces(model, X).free_units == 8
        assert gap(net(), fxfuse.fuse([model, permuted], X), X) <= 10 * FUNCTION


@pytest.mark.parametrize("compiler", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
def test_compiled_by_jit_is_refused_with_what_to_pass(compiler):
    with pytest.raises(ModelError, match="torch.jit") as caught:
        fxfuse.find_spaces(compiler(net()), X)
    assert "torch.jit.script" in caught.value.do
