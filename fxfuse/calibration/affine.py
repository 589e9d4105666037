"""Affine maps as linear layers and convolutions compute them, and two in a row as one.

References:
    Composing convolutions: the kernel of two in a row is the convolution of their kernels. Where
    the second pads, the pair pads the intermediate values with zeros and the composite does not:
    near the border they differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError


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
