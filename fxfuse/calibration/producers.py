"""Contractions of a network, each with the norm behind it, read as affine maps and written back.

A producer is a node that contracts one parameter which nothing else uses, such as a linear layer or
a convolution. Whether it computes the map that its parameters suggest is checked on real values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import PassError
from ..graph.state import replace_tensor, tensor_at
from ..graph.verify import TOLERANCE
from ..spaces.network import Network
from .affine import Affine
from .data import Calibration
from .moments import Moments
from .norms import Roles, scale_and_shift, write_norm
from .run import record, working_batch


@dataclass(frozen=True, eq=False)
class Producer:
    """A node that contracts one parameter used nowhere else.

    Attributes:
        node: The node.
        weight: Name of the parameter.
        bias: Name of its bias, None if it has none.
        transposed: Whether the parameter is stored `(in, out)`.
        norm: The node behind it that normalises by running statistics, if nothing else reads the
            contraction.
        roles: The tensors of that norm by role, and its epsilon.
        affine: What the node and the norm compute together, in float64.
    """

    node: str
    weight: str
    bias: str | None
    transposed: bool
    norm: str | None
    roles: Roles
    affine: Affine

    @property
    def joint(self) -> str:
        """The node whose value is what the map computes."""
        return self.norm or self.node

    @property
    def biased(self) -> bool:
        """Whether a bias can be stored, by the contraction or by its norm."""
        return self.bias is not None or self.norm is not None

    @property
    def axis(self) -> int:
        """Feature axis of its output."""
        return 1 if self.affine.kernel else -1


def read_producer(network: Network, node: fx.Node) -> Producer | None:
    """Read a node as an affine map; None if it computes no such map on the network's example."""
    inputs = network.inputs_of(node)
    if len(inputs) != 1 or not _contracts_one(network, node):
        return None
    ends = inputs[0].name, node.name
    values = record(network, network.example, dict.fromkeys(ends, Tensor.double))
    return identify(network, node, *(values[name] for name in ends))


def identify(network: Network, node: fx.Node, x: Tensor, y: Tensor) -> Producer | None:
    """Read a node that gave `y` for `x`, both in float64, as an affine map, if it is one."""
    if not _contracts_one(network, node):
        return None
    weights, names = network.weights[node.name], network.tensors[node.name]
    bias = next((n for n in names if n != weights[0]), None)
    for transposed in (False, True):
        affine = _map_of(network, node, x, weights[0], bias, transposed)
        if affine is not None and _computes(affine, x, y):
            norm = _norm_behind(network, node, affine)
            roles: Roles = {} if norm is None else network.norms[norm]
            whole = affine if norm is None else _with_norm(network, affine, roles)
            return Producer(node.name, weights[0], bias, transposed, norm, roles, whole)
    return None


def _contracts_one(network: Network, node: fx.Node) -> bool:
    """Tell whether a node contracts one parameter used nowhere else, and reads at most a bias."""
    weights = network.weights.get(node.name, [])
    names = network.tensors.get(node.name, [])
    uses = [n for names_of_node in network.tensors.values() for n in names_of_node]
    return len(weights) == 1 and uses.count(weights[0]) == 1 and len(names) <= 2


def _map_of(
    network: Network, node: fx.Node, x: Tensor, weight: str, bias: str | None, transposed: bool
) -> Affine | None:
    """Return the map that a node's parameters suggest, if they suggest one."""
    contractions = network.contractions(node)
    kernel = tensor_at(network.module, weight).detach().double()
    offset = None if bias is None else tensor_at(network.module, bias).detach().double()
    fits = offset is None or offset.shape == kernel.shape[transposed : transposed + 1]
    if len(contractions) != 1 or not fits:
        return None
    conv = contractions[0].geometry
    if conv is None:
        return Affine(kernel.T if transposed else kernel, offset) if kernel.dim() == 2 else None
    if conv.transposed or transposed or x.dim() != kernel.dim():
        return None
    groups = x.shape[1] // kernel.shape[1]
    return Affine(kernel, offset, conv.stride, conv.padding, conv.dilation, groups)


def _computes(affine: Affine, x: Tensor, y: Tensor) -> bool:
    """Tell whether a map gives `y` for `x`."""
    if x.shape[1 if affine.kernel else -1] != affine.inputs:
        return False
    if affine.kernel and affine.output_sizes(x.shape[2:]) != y.shape[2:]:
        return False
    output = affine(x)
    scale = y.abs().max().clamp(min=1e-30)
    return output.shape == y.shape and bool((output - y).abs().max() <= TOLERANCE * scale)


def _norm_behind(network: Network, node: fx.Node, affine: Affine) -> str | None:
    """Return the norm that alone reads a node, if its statistics are used once."""
    user = next(iter(node.users))
    roles = network.norms.get(user.name)
    same_axis = bool(affine.kernel) or len(network.shapes[node.name]) == 2
    if roles is None or len(node.users) > 1 or not same_axis:
        return None
    statistics = [r["running_mean"] for r in network.norms.values()]
    return user.name if statistics.count(roles["running_mean"]) == 1 else None


def _with_norm(network: Network, affine: Affine, roles: Roles) -> Affine:
    scale, shift = (torch.as_tensor(v) for v in scale_and_shift(network.module, roles))
    return affine.scaled(scale.to(affine.weight), shift.to(affine.weight))


def write_producer(network: Network, producer: Producer, affine: Affine) -> None:
    """Let a producer and its norm compute another map, perhaps of other widths.

    The norm then only adds the bias; `restate` gives it statistics.

    Args:
        network: Its module is edited in place.
        producer: Which one.
        affine: What it is to compute, of the same kernel and geometry.

    Raises:
        PassError: If the map has a bias and there is nowhere to store it.
    """
    module, offset = network.module, affine.offset
    if not producer.biased and bool(offset.abs().max() > 0):
        raise PassError(
            "a bias that cannot be stored",
            where=f"node '{producer.node}' of {network.name}",
            expected="a bias or a norm there, or a map without a bias",
            do="give the networks biases, or take a gate without an offset",
        )
    weight = affine.weight.T if producer.transposed else affine.weight
    replace_tensor(module, producer.weight, weight)
    if producer.bias is not None:
        replace_tensor(module, producer.bias, offset if producer.norm is None else 0 * offset)
    if producer.norm is not None:
        shift = offset.cpu().numpy()
        one, zero = np.ones_like(shift), np.zeros_like(shift)
        write_norm(module, producer.roles, one, shift, zero, one)


def restate(network: Network, producer: Producer, data: Calibration) -> None:
    """Give the norm of a producer that was just written its statistics; its function stays."""
    roles, moments = producer.roles, Moments()
    if "weight" not in roles:  # there is no norm, or its statistics are its function
        return
    for batch in data.chunks(working_batch([network])):
        value = record(network, batch, {producer.node: lambda v: v.movedim(1, 0)})
        moments.add(value[producer.node])
    _, shift = scale_and_shift(network.module, roles)
    mean, variance = moments.mean, moments.variance
    write_norm(network.module, roles, np.ones_like(shift), shift + mean, mean, variance)
