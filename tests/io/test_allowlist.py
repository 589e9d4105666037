"""What a saved network may call, and what it may not."""

import builtins
import math
import operator
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models, ops

from fxfuse.graph import modes
from fxfuse.io import _allowlist as allowlist

FUNCTIONS = [
    *(torch.relu, torch.relu_, torch.cat, torch.flatten, torch.arange, torch.zeros, torch._assert),
    *(F.relu, F.max_pool2d, F.scaled_dot_product_attention, F.gelu, F.interpolate, F.softmax),
    *(torch.linalg.norm, torch.fft.fft, torch.special.expit, operator.add, operator.getitem),
    *(math.sqrt, getattr, len, ops.stochastic_depth, ops.nms, F.hardsigmoid),
    models.swin_transformer.shifted_window_attention,
]


HARMFUL = [
    *("torch.load", "torch.save", "torch.hub.load", "torch.compile", "torch.from_file"),
    *("torch.jit.load", "torch.ops.load_library", "torch.import_ir_module"),
    *("torch.nn.functional.boolean_dispatch", "torch.nn.functional.importlib", "torch.os"),
    *("torch.set_num_threads", "operator.call", "operator.methodcaller", "operator.attrgetter"),
    *("os.system", "builtins.eval"),
    *("builtins.exec", "builtins.open", "builtins.__import__", "builtins.setattr", "math.__doc__"),
    *("torchvision.io.write_file", "torchvision.models.get_model", "torchvision.ops.os.system"),
    *("torchvision.datasets.utils.download_url", "torchvision.models.resnet.resnet18"),
    *("torchvision.models._api.get_weight", "torchvision.ops.misc.warnings.warn"),
    *("", ".", "torch."),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functions_on_tensors_have_a_name_that_leads_back(function):
    assert allowlist.function_of(allowlist.name_of_function(function)) is function


@pytest.mark.parametrize("name", HARMFUL)
def test_no_other_name_leads_to_a_function(name):
    assert allowlist.function_of(name) is None and allowlist.class_of(name) is None


@pytest.mark.parametrize(
    "function", [torch.load, os.system, eval, operator.methodcaller, lambda x: x, open]
)
def test_no_other_function_has_a_name(function):
    assert allowlist.name_of_function(function) is None


def test_no_function_reaches_files_or_the_interpreter():
    words = ("load", "save", "file", "import", "script", "compile", "eval", "exec", "thread")
    names = [n for n in allowlist._functions() if any(w in n.rpartition(".")[2] for w in words)]
    assert not names
    allowed = [f for f in vars(builtins).values() if allowlist.name_of_function(f)]
    assert {f.__name__ for f in allowed} == set(allowlist._BUILTINS)


def test_methods_and_attributes_are_those_of_tensors():
    assert all(map(allowlist.is_method, ["view", "add_", "size", "to", "contiguous", "expand"]))
    harmful = ["apply_", "map_", "backward", "register_hook", "numpy", "storage", "__class__"]
    assert not any(
        map(allowlist.is_method, [*harmful, "format", "no_such", "a.b", "_make_subclass"])
    )
    assert all(map(allowlist.is_attribute, ["shape", "device", "T", "values", "indices", "real"]))
    harmful = ["__class__", "grad_fn", "_base", "numpy", "apply_", "__globals__", "format", None, 5]
    assert not any(map(allowlist.is_attribute, harmful))


@pytest.mark.parametrize("kind", [nn.Linear, nn.MultiheadAttention, ops.StochasticDepth, modes.Tap])
def test_classes_of_layers_have_a_name_that_leads_back(kind):
    assert allowlist.class_of(allowlist.name_of_class(kind)) is kind


class Custom(nn.Linear):
    pass


@pytest.mark.parametrize("kind", [Custom, torch.Tensor, dict, nn.Parameter, type])
def test_other_classes_have_no_name(kind):
    assert allowlist.name_of_class(kind) is None


def test_imports_of_a_module_are_no_classes_of_it():
    assert allowlist.class_of("torch.nn.modules.linear.F") is None
    assert allowlist.class_of("torch.nn.modules.conv.Module") is None
    assert allowlist.class_of("fxfuse.graph.modes.nn") is None
