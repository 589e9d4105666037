"""The parameters and buffers of a module by qualified name: read, filled, replaced and added.

Names are those of `state_dict`, as `layer1.0.conv1.weight`. A tensor that several modules share
stays one tensor, a parameter stays a parameter, and attributes that repeat sizes of a module's
tensors (`in_features`) follow them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

EXTRA_STATE = nn.modules.module._EXTRA_STATE_KEY_SUFFIX  # ends the name of what is no tensor

_SIZES = {  # attribute of a torch.nn module -> the tensor and axis whose size it is
    nn.Linear: {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    nn.Bilinear: {
        "out_features": ("weight", 0),
        "in1_features": ("weight", 1),
        "in2_features": ("weight", 2),
    },
    nn.modules.batchnorm._NormBase: {"num_features": ("weight", 0)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.EmbeddingBag: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.RNNBase: {"input_size": ("weight_ih_l0", 1), "hidden_size": ("weight_hh_l0", 1)},
    nn.RNNCellBase: {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)},
}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters, then all buffers, each by the first of its names."""
    return dict([*module.named_parameters(), *module.named_buffers()])


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model; the CPU if it has no tensors."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def names_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return all parameters, then all buffers, each as often as it has names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return [*parameters, *module.named_buffers(remove_duplicate=False)]


def ties_of(module: nn.Module) -> list[tuple[str, str]]:
    """Return the places of parameters that another module has, too, each after the first place.

    Example:
        >>> net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        >>> net[1].weight = net[0].weight
        >>> ties_of(net)
        [('0.weight', '1.weight')]
    """
    first: dict[int, str] = {}
    ties = []
    for path, part in module.named_modules():
        for leaf, tensor in part._parameters.items():
            name = f"{path}.{leaf}".lstrip(".")
            if tensor is not None and first.setdefault(id(tensor), name) != name:
                ties.append((first[id(tensor)], name))
    return ties


def untie(module: nn.Module) -> None:
    """Give every module a parameter of its own, in place; the function stays."""
    for _, name in ties_of(module):
        owner, leaf = _owner(module, name)
        assert owner is not None, f"the module of '{name}'"
        tied = owner.get_parameter(leaf)
        owner._parameters[leaf] = nn.Parameter(tied.detach().clone(), tied.requires_grad)


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Give the buffers that a forward writes to the values that they had before."""
    buffers = [
        (b, b._version, b.detach().clone()) for b in module.buffers() if not b.is_inference()
    ]
    try:
        yield
    finally:
        for buffer, version, values in buffers:
            if buffer._version != version:
                buffer.data.copy_(values)


def floats_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point parameters and buffers."""
    return {name: t for name, t in tensors_of(module).items() if t.is_floating_point()}


def unreadable(tensor: Tensor) -> tuple[str, str] | None:
    """Return what keeps a tensor from being worked on, and what to do; None if nothing does."""
    if is_lazy(tensor):
        return "a lazy tensor, whose shape is not known", "run one batch through the model first"
    if tensor.is_meta:
        return "a tensor without data, on the meta device", "load its values onto a real device"
    if tensor.layout != torch.strided:
        return f"a {tensor.layout} tensor", "replace it by tensor.to_dense()"
    if tensor.is_quantized:
        return "a quantized tensor", "replace it by tensor.dequantize()"
    return None


def not_finite(module: nn.Module) -> dict[str, int]:
    """Return how many values of each tensor are not finite; a buffer (a mask) may hold `-inf`."""
    counts = {}
    for name, tensor in floats_of(module).items():
        if math.isfinite(tensor.detach().sum()):  # much faster, and infinite if any value is
            continue
        wrong = ~tensor.isfinite()
        if not isinstance(tensor, nn.Parameter):
            wrong &= ~tensor.isneginf()
        counts[name] = int(wrong.sum())
    return {name: count for name, count in counts.items() if count}


def state_values_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point tensors and truth values that the state dictionary holds.

    What it lacks (non-persistent buffers, tensors that are attributes, constants of forward) is
    made anew by the model's class, so nothing may be changed in it.
    """
    kept = {id(t) for t in module.state_dict(keep_vars=True).values()}
    return {name: t for name, t in values_of(module).items() if id(t) in kept}


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of floating-point numbers or truth values."""
    kinds = tensors_of(module).items()
    return {name: t for name, t in kinds if t.is_floating_point() or t.dtype == torch.bool}


def movable_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state whose units may be moved: those with memory of their own.

    Memory that two tensors share, or that one tensor shows several times, cannot be moved for one
    of its uses only.
    """
    shared = _sharing_memory(list(tensors_of(module).values()))
    return {name: t for name, t in state_values_of(module).items() if id(t) not in shared}


def _sharing_memory(tensors: Sequence[Tensor]) -> set[int]:
    """Return the ids of tensors that overlap in memory with others, or with themselves."""
    shared = {id(t) for t in tensors if any(n > 1 and not s for n, s in zip(t.shape, t.stride()))}
    ranges = []
    for t in tensors:
        if t.numel():
            last = sum((n - 1) * step for n, step in zip(t.shape, t.stride()))
            ranges.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), t))
    ranges.sort(key=lambda r: r[:2])
    for i, (_, end, t) in enumerate(ranges):
        for start, _, other in ranges[i + 1 :]:
            if start >= end:
                break
            shared |= {id(t), id(other)}
    return shared


def part_at(module: nn.Module, name: str) -> nn.Module | Tensor | None:
    """Return the module, parameter or buffer of a name, from torch's tables only; None if none."""
    owner, leaf = _owner(module, name)
    tables: tuple[dict[str, Any], ...] = ()
    if owner is not None:
        tables = (owner._modules, owner._parameters, owner._buffers)
    return next((table[leaf] for table in tables if leaf in table), None)


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer of a name."""
    tensor = part_at(module, name)
    assert isinstance(tensor, Tensor), f"no tensor is called '{name}'"
    return tensor


def fill(module: nn.Module, name: str, values: float | np.ndarray | Tensor) -> None:
    """Write values into a parameter or buffer, which keeps its shape, type and device."""
    memory, source = tensor_at(module, name).data, torch.as_tensor(values)
    for d, step in enumerate(memory.stride()):  # what is expanded is written once
        if not step and memory.shape[d] > 1:
            memory = memory.narrow(d, 0, 1)
            source = source.narrow(d, 0, 1) if source.dim() == memory.dim() else source
    memory.copy_(source)


def replace_tensor(module: nn.Module, name: str, values: np.ndarray | Tensor) -> None:
    """Replace a parameter or buffer by one with other values, and possibly another shape.

    The new tensor has the type, device, `requires_grad` and all names of the old one. The size
    attributes of its modules are set to fit.
    """
    old = tensor_at(module, name)
    new = torch.as_tensor(values).detach().to(old).clone(memory_format=torch.contiguous_format)
    new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    for part in module.modules():
        names = [n for table in (part._parameters, part._buffers) for n in table if table[n] is old]
        for leaf in names:
            setattr(part, leaf, new)
        if names:
            settle_sizes(part)


def add_part(module: fx.GraphModule, name: str, part: nn.Module | Tensor) -> None:
    """Add a module, parameter or buffer, and the modules of its name that are not there yet."""
    if isinstance(part, nn.Module):
        module.add_submodule(name, part)
        return
    path, _, leaf = name.rpartition(".")
    if path and part_at(module, path) is None:
        module.add_submodule(path, nn.Module())
    owner = module.get_submodule(path)
    if isinstance(part, nn.Parameter):
        owner.register_parameter(leaf, part)
    else:
        owner.register_buffer(leaf, part)


def drop_unused(module: fx.GraphModule) -> None:
    """Delete the parameters and buffers that no node uses."""
    used = {str(n.target) for n in module.graph.nodes if n.op in ("call_module", "get_attr")}
    for name, _ in names_of(module):
        if not any(name == u or name.startswith(f"{u}.") for u in used):
            owner, leaf = _owner(module, name)
            delattr(owner, leaf)


def order_like(module: nn.Module, other: nn.Module) -> None:
    """Order the parts of a module as another has them, since a shared tensor has the first name."""
    for path, like in other.named_modules():
        part = part_at(module, path) if path else module
        if isinstance(part, nn.Module):
            names = [name for name in like._modules if name in part._modules]
            parts = {name: part._modules.pop(name) for name in names}
            part._modules = {**parts, **part._modules}


def is_hidden(module: nn.Module, name: str) -> bool:
    """Tell whether a name is that of a buffer that state dictionaries leave out."""
    owner, leaf = _owner(module, name)
    return owner is not None and leaf in owner._non_persistent_buffers_set


def hide(module: nn.Module, name: str) -> None:
    """Leave a buffer out of state dictionaries."""
    owner, leaf = _owner(module, name)
    assert owner is not None, f"no buffer is called '{name}'"
    owner._non_persistent_buffers_set.add(leaf)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """Return the module that holds a name, None if there is no such module, and the last name."""
    path, _, leaf = name.rpartition(".")
    owner: nn.Module | None = module
    for step in path.split(".") if path else ():
        parts = () if owner is None else owner._modules.items()  # a script's table has no `get`
        owner = dict(parts).get(step)
    return owner, leaf


def sizes_of(module: nn.Module) -> dict[str, Any]:
    """Return the size attributes of a torch.nn module as its parameters imply them."""
    weight: Any = getattr(module, "weight", None)
    weight = getattr(module, "running_mean", None) if weight is None else weight
    if isinstance(module, nn.modules.conv._ConvNd):
        out, inner = ("in", "out") if module.transposed else ("out", "in")
        sizes = {f"{out}_channels": weight.shape[0]}
        return sizes | {f"{inner}_channels": weight.shape[1] * module.groups}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {} if weight is None else {"normalized_shape": tuple(weight.shape)}
    if getattr(module, "proj_size", 0):  # an LSTM that hands on less than it holds
        return {"input_size": module.get_parameter("weight_ih_l0").shape[1]}
    if isinstance(module, nn.MultiheadAttention):
        joint, width = module.in_proj_weight, module.out_proj.weight.shape[0]
        read = (module.k_proj_weight, module.v_proj_weight) if joint is None else (joint, joint)
        sizes = {name: t.shape[1] for name, t in zip(("kdim", "vdim"), read)}
        return sizes | {"embed_dim": width, "head_dim": width // module.num_heads}
    for kind, sizes in _SIZES.items():
        if isinstance(module, kind):
            axes = {
                size: (weight if tensor == "weight" else getattr(module, tensor), dim)
                for size, (tensor, dim) in sizes.items()
            }
            return {size: t.shape[dim] for size, (t, dim) in axes.items() if t is not None}
    return {}


def settle_sizes(module: nn.Module) -> None:
    """Let the size attributes of a torch.nn module say what its parameters imply."""
    for name, size in sizes_of(module).items():
        setattr(module, name, size)
