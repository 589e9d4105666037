"""Affine maps as linear layers and convolutions compute them: read, composed, written back.

A producer is a node that contracts one parameter which nothing else uses, such as a linear layer or
a convolution, together with the norm behind it. Whether it computes the map that its parameters
suggest is checked on real values.

References:
    Composing convolutions: the kernel of two in a row is the convolution of their kernels. Where
    the second pads, the pair pads the intermediate values with zeros and the composite does not:
    near the border they differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..errors import ArgumentError, PassError
from ..graph.compare import TOLERANCE
from ..graph.state import replace_tensor, tensor_at
from ..spaces.network import Network
from .data import Calibration
from .moments import Moments
from .norms import Roles, scale_and_shift, write_norm
from .run import record, working_batch


@dataclass(frozen=True, eq=False)
class Affine:
    """A linear map or convolution with zero padding, and its bias.

    Attributes:
        weight: `(out, in / groups, *kernel)`. Without kernel axes it is a linear map of the last
            axis, with `n` of them a convolution over `n` spatial axes.
        bias: `(out,)`, or None.
        stride: One number per kernel axis.
        padding: One number per kernel axis.
        dilation: One number per kernel axis.
        groups: Number of groups.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it to `(batch, ..., in)`, or as a convolution to `(batch, in, *spatial)`."""
        if not self.kernel:
            return F.linear(x, self.weight, self.bias)
        geometry = self.stride, self.padding, self.dilation
        no_output_padding = (0,) * len(self.kernel)
        return torch.convolution(
            x, self.weight, self.bias, *geometry, False, no_output_padding, self.groups
        )

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of the kernel along each spatial axis."""
        return tuple(self.weight.shape[2:])

    @property
    def inputs(self) -> int:
        """Number of units it reads."""
        return self.weight.shape[1] * self.groups

    @property
    def outputs(self) -> int:
        """Number of units it writes."""
        return self.weight.shape[0]

    def output_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of the spatial axes of its output, given those of its input."""
        extents = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel))
        axes = zip(sizes, extents, self.stride, self.padding)
        return tuple((n + 2 * p - extent) // s + 1 for n, extent, s, p in axes)

    def scaled(self, scale: Tensor, shift: Tensor) -> Affine:
        """Return the map `scale * self(x) + shift`, unit by unit; both are `(out,)`."""
        weight = self.weight * scale.view(-1, *[1] * (self.weight.dim() - 1))
        return replace(self, weight=weight, bias=shift + scale * self.offset)

    @property
    def offset(self) -> Tensor:
        """The bias `(out,)`, zeros if it has none."""
        return self.weight.new_zeros(self.outputs) if self.bias is None else self.bias

    def in_groups(self, groups: int) -> Affine:
        """Return the same map with fewer groups: a divisor of their number."""
        joined = self.groups // groups  # groups that become one
        weight = self.weight.view(groups, joined, -1, 1, *self.weight.shape[1:])
        eye = torch.eye(joined).to(weight).view(1, joined, 1, joined, *[1] * (weight.dim() - 4))
        dense = (weight * eye).flatten(3, 4).flatten(0, 2)
        return replace(self, weight=dense, groups=groups)


def compose(first: Affine, second: Affine) -> Affine:
    """Return one map that does what two in a row do, except near borders that the second pads.

    With weights `W`, strides `s`, dilations `d` and paddings `p`, the composite has per axis the
    weight `W[o, i, t] = sum over m, u, v with d1 u + s1 d2 v = t of W2[o, m, v] W1[m, i, u]`, the
    stride `s1 s2` and the padding `p1 + s1 p2`. It has as many groups as both divide into.

    Raises:
        ArgumentError: If the second does not read what the first writes.

    Example:
        >>> a, b = Affine(torch.ones(2, 3), torch.ones(2)), Affine(torch.ones(4, 2))
        >>> composite = compose(a, b)
        >>> tuple(composite.weight.shape), composite.bias.tolist()
        ((4, 3), [2.0, 2.0, 2.0, 2.0])
    """
    if first.outputs != second.inputs or len(first.kernel) != len(second.kernel):
        raise ArgumentError(
            f"a map to {first.outputs} units before one of {second.inputs}",
            where="the arguments of `compose`",
            expected="a second map that reads what the first writes, both of one kind",
            do="give them in the order in which they are applied",
        )
    groups = math.gcd(first.groups, second.groups)
    a, b = (m.in_groups(groups).weight.unflatten(0, (groups, -1)) for m in (first, second))
    # how far one tap of each kernel moves over the input; kernels of one tap do not move
    u_step = [d if k > 1 else 0 for d, k in zip(first.dilation, first.kernel)]
    v_step = [
        s * d if k > 1 else 0 for s, d, k in zip(first.stride, second.dilation, second.kernel)
    ]
    dilation = [math.gcd(x, y) or 1 for x, y in zip(u_step, v_step)]
    axes = zip(u_step, first.kernel, v_step, second.kernel, dilation)
    kernel = [(x * (k - 1) + y * (m - 1)) // d + 1 for x, k, y, m, d in axes]
    weight = a.new_zeros(groups, b.shape[1], a.shape[2], *kernel)
    for u in product(*map(range, first.kernel)):
        for v in product(*map(range, second.kernel)):
            taps = zip(u_step, u, v_step, v, dilation)
            t = tuple((x * i + y * j) // d for x, i, y, j, d in taps)
            weight[(..., *t)] += torch.matmul(b[(..., *v)], a[(..., *u)])
    return Affine(
        weight.flatten(0, 1),
        _composed_bias(first, second),
        tuple(x * y for x, y in zip(first.stride, second.stride)),
        tuple(p + s * q for p, s, q in zip(first.padding, first.stride, second.padding)),
        tuple(dilation),
        groups,
    )


def _composed_bias(first: Affine, second: Affine) -> Tensor | None:
    if first.bias is None:
        return second.bias
    summed = second.weight.flatten(2).sum(2) if second.kernel else second.weight
    grouped = summed.unflatten(0, (second.groups, -1))
    carried = grouped @ first.bias.view(second.groups, -1, 1)
    offset: Tensor = second.offset + carried.flatten()
    return offset


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


def identify(
    network: Network, node: fx.Node, x: Tensor, y: Tensor, shared: bool = False
) -> Producer | None:
    """Read a node that gave `y` for `x`, both in float64, as an affine map, if it is one.

    Args:
        network: The network.
        node: The node.
        x: What it read.
        y: What it gave.
        shared: Whether other nodes may use its parameter, too.
    """
    if not _contracts_one(network, node, shared):
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


def _contracts_one(network: Network, node: fx.Node, shared: bool = False) -> bool:
    """Tell whether a node contracts one parameter, and reads at most a bias.

    Others may use the parameter only if it may be shared.
    """
    weights = network.weights.get(node.name, [])
    names = network.tensors.get(node.name, [])
    alone = len(weights) == 1 and (shared or len(users_of(network, weights[0])) == 1)
    return alone and len(names) <= 2


def users_of(network: Network, tensor: str) -> list[str]:
    """Return the nodes that touch a parameter or buffer, each as often as it does."""
    return [node for node, names in network.tensors.items() for n in names if n == tensor]


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
    """Tell whether a map gives `y` for `x`; of no values, nothing can be told."""
    if not y.numel():
        return False
    if x.shape[1 if affine.kernel else -1] != affine.inputs:
        return False
    if affine.kernel and affine.output_sizes(x.shape[2:]) != y.shape[2:]:
        return False
    output = affine(x)
    scale = y.abs().max().clamp(min=1e-30)
    return output.shape == y.shape and bool((output - y).abs().max() <= TOLERANCE * scale)


def _norm_behind(network: Network, node: fx.Node, affine: Affine) -> str | None:
    """Return the norm that alone reads a node, if its statistics are used once."""
    user = next(iter(node.users), None)
    roles = None if user is None else network.norms.get(user.name)
    same_axis = bool(affine.kernel) or len(network.shapes[node.name]) == 2
    if user is None or roles is None or len(node.users) > 1 or not same_axis:
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
