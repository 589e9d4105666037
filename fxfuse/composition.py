"""Affine maps that contractions compute (linear layers, convolutions), and two of them as one.

References:
    Composing convolutions: the kernel of two in a row is the convolution of their kernels. Where
    the second pads, the true pair pads the intermediate with zeros and the composite does not: at
    the border they differ, unless `exact_everywhere`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Affine:
    """A linear map or convolution with zero padding, and its bias.

    Attributes:
        weight: `(out, in / groups, *kernel)`; without kernel axes it is a linear map of the last
            axis, with `n` of them a convolution of the last `n` axes.
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

    @classmethod
    def of(cls, module: nn.Module) -> Affine:
        """Read a `torch.nn` linear layer or convolution.

        Raises:
            ArgumentError: If it is another module, transposed, or pads with anything but zeros.
        """
        bias = getattr(module, "bias", None)
        bias = None if bias is None else bias.detach()
        if isinstance(module, nn.Linear):
            return cls(module.weight.detach(), bias)
        if not isinstance(module, nn.modules.conv._ConvNd) or module.transposed:
            raise _not_affine(type(module).__name__)
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise _not_affine(
                f"{type(module).__name__} with {module.padding} {module.padding_mode}"
            )
        steps = tuple(module.stride), tuple(module.padding), tuple(module.dilation)
        return cls(module.weight.detach(), bias, *steps, module.groups)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it to `(batch, ..., in)`, or as a convolution to `(batch, in, *places)`."""
        if not self.kernel:
            return F.linear(x, self.weight, self.bias)
        steps = self.stride, self.padding, self.dilation
        none = (0,) * len(self.kernel)
        return torch.convolution(x, self.weight, self.bias, *steps, False, none, self.groups)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of the kernel along each place axis."""
        return tuple(self.weight.shape[2:])

    @property
    def inputs(self) -> int:
        """Number of units it reads."""
        return self.weight.shape[1] * self.groups

    @property
    def outputs(self) -> int:
        """Number of units it writes."""
        return self.weight.shape[0]

    def places(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of the place axes behind it."""
        steps = zip(sizes, _extents(self), self.stride, self.padding)
        return tuple((n + 2 * p - e) // s + 1 for n, e, s, p in steps)

    def scaled(self, scale: Tensor, shift: Tensor) -> Affine:
        """Return what computes `scale * self(x) + shift`, unit by unit; both are `(out,)`."""
        weight = self.weight * scale.view(-1, *[1] * (self.weight.dim() - 1))
        return replace(self, weight=weight, bias=shift + scale * self.offset)

    @property
    def offset(self) -> Tensor:
        """The bias `(out,)`, zeros if it has none."""
        return self.weight.new_zeros(self.outputs) if self.bias is None else self.bias

    def in_groups(self, groups: int) -> Affine:
        """Return the same map as one of fewer groups, a divisor of what it has."""
        inner = self.groups // groups
        grouped = self.weight.view(groups, inner, -1, 1, *self.weight.shape[1:])
        apart = torch.eye(inner).to(grouped).view(1, inner, 1, inner, *[1] * (grouped.dim() - 4))
        dense = (grouped * apart).flatten(3, 4).flatten(0, 2)
        return replace(self, weight=dense, groups=groups)


def compose(first: Affine, second: Affine) -> Affine:
    """Return the one map that does what two in a row do, away from the borders they pad.

    With kernels `k`, strides `s`, dilations `d`, per axis
    `K[o, i, t] = sum over m, u, v with d1 u + s1 d2 v = t of W2[o, m, v] W1[m, i, u]`,
    stride `s1 s2`, padding `p1 + s1 p2`. Groups are kept as far as both agree on them.

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
    steps = [d if k > 1 else 0 for d, k in zip(first.dilation, first.kernel)]
    jumps = [s * d if k > 1 else 0 for s, d, k in zip(first.stride, second.dilation, second.kernel)]
    unit = [math.gcd(x, y) or 1 for x, y in zip(steps, jumps)]
    reach = zip(steps, first.kernel, jumps, second.kernel, unit)
    extent = [(x * (k - 1) + y * (m - 1)) // g + 1 for x, k, y, m, g in reach]
    kernel = a.new_zeros(groups, b.shape[1], a.shape[2], *extent)
    for u in product(*map(range, first.kernel)):
        for v in product(*map(range, second.kernel)):
            at = tuple((x * i + y * j) // g for x, i, y, j, g in zip(steps, u, jumps, v, unit))
            kernel[(..., *at)] += torch.matmul(b[(..., *v)], a[(..., *u)])
    return Affine(
        kernel.flatten(0, 1),
        _composed_bias(first, second),
        tuple(x * y for x, y in zip(first.stride, second.stride)),
        tuple(p + s * q for p, s, q in zip(first.padding, first.stride, second.padding)),
        tuple(unit),
        groups,
    )


def exact_everywhere(first: Affine, second: Affine, sizes: tuple[int, ...] = ()) -> bool:
    """Tell whether `compose` of two maps does what they do at the borders too.

    It does if the second does not pad, or if what lies beyond the intermediate would be zero: no
    bias, and every window of the first that starts out there reads nothing but padding.

    Args:
        first: The map that is applied first.
        second: The map that is applied to what it writes.
        sizes: Sizes of the place axes of the input.
    """
    silent = not bool(first.offset.any())
    behind = first.places(sizes)
    geometry = zip(sizes, behind, _extents(first), first.stride, first.padding, second.padding)
    for n, m, extent, stride, padding, beyond in geometry:
        left, right = extent <= stride + padding, m * stride - padding >= n
        if beyond and not (silent and left and right):
            return False
    return True


def _composed_bias(first: Affine, second: Affine) -> Tensor | None:
    if first.bias is None:
        return second.bias
    taps = second.weight.flatten(2).sum(2) if second.kernel else second.weight
    grouped = taps.unflatten(0, (second.groups, -1))
    moved = grouped @ first.bias.view(second.groups, -1, 1)
    offset: Tensor = second.offset + moved.flatten()
    return offset


def _extents(affine: Affine) -> tuple[int, ...]:
    return tuple(d * (k - 1) + 1 for d, k in zip(affine.dilation, affine.kernel))


def _not_affine(what: str) -> ArgumentError:
    return ArgumentError(
        f"a {what}",
        where="the argument `module`",
        expected="a torch.nn linear layer or convolution that pads with zeros",
        do="write its map down as an Affine",
    )
