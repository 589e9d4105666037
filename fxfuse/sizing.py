"""Copies of another network's modules at this network's width."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import sizes_of
from .errors import PassError
from .ir import Layer
from .labels import TensorAxis
from .network import Network


@dataclass(frozen=True, eq=False)
class Insertion:
    """A layer of one network to be put into another as a neutral layer.

    Attributes:
        template: The network that has the layer.
        layer: The layer.
        into: The network that lacks it.
        after: Node of that network behind which it goes.
        parts: The layers it joins, if it is a run of them that is neutral only as a whole.
        width: Size of the feature axis there, if layers inserted before have changed it.
        approximate: Whether its activation may change what it hands on.
    """

    template: Network
    layer: Layer
    into: Network
    after: str
    parts: tuple[Layer, ...] = ()
    width: int | None = None
    approximate: bool = False


def resized_copy(insertion: Insertion, path: str) -> nn.Module | Tensor:
    """Copy a module or tensor of the template at the target's width, freshly initialised.

    Axes that belong to the stream the layer reads and writes take the target's width; axes inside
    a block keep the template's. Initial values do not depend on global random state.
    """
    source = insertion.template.module
    owner, _, leaf = path.rpartition(".")
    found: Any = getattr(source.get_submodule(owner), leaf)
    if isinstance(found, Tensor):
        return _refill(found, _shape(insertion, path, found))
    part: nn.Module = copy.deepcopy(found)
    conv = part if isinstance(part, nn.modules.conv._ConvNd) else None
    depthwise = conv is not None and conv.groups == conv.in_channels > 1
    for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
        shape = _shape(insertion, f"{path}.{name}", tensor)
        if shape != tuple(tensor.shape):
            inner, _, key = name.rpartition(".")
            setattr(part.get_submodule(inner), key, _refill(tensor, shape))
    if conv is not None and depthwise:
        conv.groups = conv.weight.shape[0]
    for module in part.modules():
        for name, size in sizes_of(module).items():
            setattr(module, name, size)
        if hasattr(module, "reset_parameters"):
            reset: Any = module.reset_parameters
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                reset()
    return part


def _refill(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    data = tensor.detach()
    if shape != tuple(data.shape):
        mean = data.double().mean().to(data.dtype)
        data = mean.expand(shape)
    filled = data.clone()
    return nn.Parameter(filled) if isinstance(tensor, nn.Parameter) else filled


def _shape(insertion: Insertion, name: str, tensor: Tensor) -> tuple[int, ...]:
    spaces, layer, book = insertion.template.spaces, insertion.layer, insertion.template.book
    into = insertion.into.book
    new = insertion.width or _width(
        into.features.get(insertion.after), into.shapes[insertion.after]
    )
    shape = list(tensor.shape)
    for space, axis in spaces.on(name):
        ends = [layer.entry] if layer.branched else [layer.entry, layer.nodes[-1]]
        end = next((e for e in ends if any(f.tensor == e for f in space.features)), None)
        if end is None:
            continue
        full, old = spaces.sizes[name, axis.dim], _width(book.features.get(end), book.shapes[end])
        if axis.groups == 1:
            shape[axis.dim] = full * new // old
        elif full != axis.groups and new != old:  # depthwise keeps one input per row
            raise PassError(
                f"a grouped convolution on a stream of {old} units, to be rebuilt for {new}",
                where=f"'{name}' of layer '{layer.name}'",
                expected="equal widths where a grouped convolution works on the stream itself",
                do="fuse networks of equal width at this stage",
            )
    return tuple(shape)


def _width(features: list[TensorAxis] | None, shape: tuple[int, ...]) -> int:
    return len(features[0].labels) if features else shape[1 if len(shape) in (2, 4, 5) else -1]
