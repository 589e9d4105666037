"""Which contractions a norm stands behind, and networks with these norms folded in.

Affine maps that contractions compute (linear layers, convolutions), and two of them as one.

References:
    Composing convolutions: the kernel of two in a row is the convolution of their kernels. Where
    the second pads, the true pair pads the intermediate with zeros and the composite does not: at
    the border they differ, unless `exact_everywhere`.

A contraction of a network read as an affine map, norm behind it included, and written back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import ArgumentError, PassError
from ..graph.state import floats_of, replace_tensor, tensor_at
from ..graph.verify import TOLERANCE
from ..spaces.network import Network
from .data import Calibration
from .moments import Moments
from .run import record, working_batch


@dataclass(frozen=True, eq=False)
class FoldedState:
    """A network's tensors with its norms folded into the weights before them.

    Attributes:
        raw: Every floating-point parameter and buffer by name, as it is.
        factors: Tensor that a norm is folded into -> the axis and the factors `(units,)` along it.
        scales: Per norm node, the factor `(units,)` left to it: ones where it was folded.
        shifts: Per norm node, what it adds `(units,)`.
    """

    raw: dict[str, np.ndarray]
    factors: dict[str, tuple[int, np.ndarray]]
    scales: dict[str, np.ndarray]
    shifts: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a tensor, folded; computed when asked for, so that no second network is held."""
        raw = self.raw[name]
        if name not in self.factors:
            return raw
        dim, factor = self.factors[name]
        along = [-1 if d == dim else 1 for d in range(raw.ndim)]
        folded: np.ndarray = (raw * factor.reshape(along)).astype(raw.dtype)
        return folded


def producers(network: Network) -> dict[str, tuple[str, int]]:
    """Return the nodes that contract one weight used once: its name and the axis it writes."""
    calls: dict[str, int] = {}
    for names in network.book.tensors.values():
        for name in names:
            calls[name] = calls.get(name, 0) + 1
    found = {}
    for node, weights in network.book.weights.items():
        writes = [a.dim for _, a in network.spaces.on(weights[0]) if not a.reads]
        if len(weights) == 1 and calls[weights[0]] == 1 and len(set(writes)) == 1:
            found[node] = (weights[0], writes[0])
    return found


def folds(network: Network) -> dict[str, str]:
    """Return the norm nodes that stand alone behind a producer, and that producer's node."""
    nodes = {n.name: n for n in network.module.graph.nodes}
    able, found = producers(network), {}
    users: dict[str, int] = {}
    for roles in network.book.norms.values():
        users[str(roles["running_mean"])] = users.get(str(roles["running_mean"]), 0) + 1
    for name, roles in network.book.norms.items():
        before = network.inputs_of(nodes[name])[0]
        alone = len(before.users) == 1 and users[str(roles["running_mean"])] == 1
        if before.name in able and alone:
            found[name] = before.name
    return found


def fold(network: Network, folded: dict[str, str]) -> FoldedState:
    """Return a network's tensors with some norms folded into the producers before them.

    Args:
        network: The network; not modified.
        folded: Norm node -> producer node.
    """
    tensors = {n: t.detach().cpu().numpy() for n, t in floats_of(network.module).items()}
    able, factors, scales, shifts = producers(network), {}, {}, {}
    for name, roles in network.book.norms.items():
        mean, variance = (tensors[str(roles[r])] for r in ("running_mean", "running_var"))
        spread = np.sqrt(variance.astype(float) + float(roles["eps"]))
        scale = tensors.get(str(roles.get("weight")), 1.0) / spread
        shift = tensors.get(str(roles.get("bias")), 0.0) - mean * scale
        if name in folded:
            weight, dim = able[folded[name]]
            for tensor in network.book.tensors[folded[name]]:
                factors[tensor] = (dim if tensor == weight else 0, scale)
            scale = np.ones_like(scale)
        scales[name], shifts[name] = scale, shift
    return FoldedState(tensors, factors, scales, shifts)


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


@dataclass(frozen=True, eq=False)
class Producer:
    """A node that contracts one parameter used nowhere else.

    Attributes:
        node: The node.
        weight: Name of the parameter.
        bias: Name of its bias, None if it has none.
        turned: Whether the parameter is stored `(in, out)`.
        norm: The node behind it that normalises by running statistics, if it stands alone there.
        roles: The tensors of that norm by role, and its epsilon.
        affine: What the node and the norm compute together, in float64.
    """

    node: str
    weight: str
    bias: str | None
    turned: bool
    norm: str | None
    roles: dict[str, str | float]
    affine: Affine

    @property
    def joint(self) -> str:
        """The node that holds what the map computes."""
        return self.norm or self.node

    @property
    def biased(self) -> bool:
        """Whether there is a place for a bias."""
        return self.bias is not None or self.norm is not None

    @property
    def axis(self) -> int:
        """Feature axis of its output."""
        return 1 if self.affine.kernel else -1


def read_producer(network: Network, node: fx.Node) -> Producer | None:
    """Read a node as an affine map; None if it is no such map, on the network's own example."""
    inputs = network.inputs_of(node)
    if len(inputs) != 1 or not _contracts_one(network, node):
        return None
    ends = {inputs[0].name: 0, node.name: 1}
    values = record(network, network.example, dict.fromkeys(ends, Tensor.double))
    return identify(network, node, *(values[name] for name in ends))


def identify(network: Network, node: fx.Node, x: Tensor, y: Tensor) -> Producer | None:
    """Read a node that gave `y` for `x`, both in float64, as an affine map, if it is one."""
    if not _contracts_one(network, node):
        return None
    weights, names = network.book.weights[node.name], network.book.tensors[node.name]
    bias = next((n for n in names if n != weights[0]), None)
    for turned in (False, True):
        affine = _map(network, node, x, weights[0], bias, turned)
        if affine is not None and _computes(affine, x, y):
            norm = _norm_behind(network, node, affine)
            roles = {} if norm is None else network.book.norms[norm]
            folded = affine if norm is None else _folded(network, affine, roles)
            return Producer(node.name, weights[0], bias, turned, norm, roles, folded)
    return None


def _contracts_one(network: Network, node: fx.Node) -> bool:
    """Tell whether a node contracts one parameter used nowhere else, beside a bias at most."""
    weights, names = (
        book.get(node.name, []) for book in (network.book.weights, network.book.tensors)
    )
    calls = [n for touched in network.book.tensors.values() for n in touched]
    return len(weights) == 1 and calls.count(weights[0]) == 1 and len(names) <= 2


def write_producer(network: Network, producer: Producer, affine: Affine) -> None:
    """Let a producer and its norm compute another map, of other widths perhaps.

    The norm does nothing but add the bias afterwards; `restate` gives it statistics.

    Args:
        network: Its module is edited in place.
        producer: Which one.
        affine: What it is to compute, of the kernel and geometry it has.

    Raises:
        PassError: If the map has a bias and there is no place for it.
    """
    module, offset = network.module, affine.offset
    if not producer.biased and bool(offset.abs().max() > 0):
        raise PassError(
            "a bias that has no place",
            where=f"node '{producer.node}' of {network.name}",
            expected="a bias or a norm there, or a map without a bias",
            do="give the networks biases, or take a gate without an offset",
        )
    replace_tensor(module, producer.weight, affine.weight.T if producer.turned else affine.weight)
    if producer.bias is not None:
        replace_tensor(module, producer.bias, offset if producer.norm is None else 0 * offset)
    if producer.norm is None:
        return
    roles, one = producer.roles, torch.ones_like(offset)
    eps, plain = float(roles["eps"]), "weight" not in roles  # without an affine part
    replace_tensor(module, str(roles["running_mean"]), -offset if plain else 0 * one)
    replace_tensor(module, str(roles["running_var"]), one - eps if plain else one)
    if not plain:
        replace_tensor(module, str(roles["weight"]), one * (1 + eps) ** 0.5)
        replace_tensor(module, str(roles["bias"]), offset)


def restate(network: Network, producer: Producer, data: Calibration) -> None:
    """Give the norm of a freshly written producer its running statistics, its function kept."""
    roles, moments = producer.roles, Moments()
    if "weight" not in roles:
        return
    for batch in data.chunks(working_batch([network])):
        value = record(network, batch, {producer.node: lambda v: v.movedim(1, 0)})
        moments.add(value[producer.node])
    mean, variance = (torch.as_tensor(m) for m in (moments.mean, moments.variance))
    offset = tensor_at(network.module, str(roles["bias"])).detach().double().cpu()
    replace_tensor(network.module, str(roles["running_mean"]), mean)
    replace_tensor(network.module, str(roles["running_var"]), variance)
    replace_tensor(network.module, str(roles["weight"]), (variance + float(roles["eps"])).sqrt())
    replace_tensor(network.module, str(roles["bias"]), offset + mean)


def _map(
    network: Network, node: fx.Node, x: Tensor, weight: str, bias: str | None, turned: bool
) -> Affine | None:
    steps = [s for s in network.steps(node) if s[0] in ("convolution", "matmul")]
    kernel = tensor_at(network.module, weight).detach().double()
    offset = None if bias is None else tensor_at(network.module, bias).detach().double()
    if len(steps) != 1 or offset is not None and offset.shape != kernel.shape[turned : turned + 1]:
        return None
    if steps[0][0] == "matmul":
        return Affine(kernel.T if turned else kernel, offset) if kernel.dim() == 2 else None
    _, _, stride, padding, dilation, _, transposed, _ = steps[0]
    if transposed or turned or x.dim() != kernel.dim():
        return None
    return Affine(kernel, offset, stride, padding, dilation, x.shape[1] // kernel.shape[1])


def _computes(affine: Affine, x: Tensor, y: Tensor) -> bool:
    width = x.shape[1 if affine.kernel else -1]
    if width != affine.inputs or (affine.kernel and affine.places(x.shape[2:]) != y.shape[2:]):
        return False
    found = affine(x)
    scale = y.abs().max().clamp(min=1e-30)
    return found.shape == y.shape and bool((found - y).abs().max() <= TOLERANCE * scale)


def _norm_behind(network: Network, node: fx.Node, affine: Affine) -> str | None:
    """Return the norm that is all that reads a node, if its statistics are used once."""
    user = next(iter(node.users))
    roles = network.book.norms.get(user.name)
    along = bool(affine.kernel) or len(network.book.shapes[node.name]) == 2
    if roles is None or len(node.users) > 1 or not along:
        return None
    every = [r["running_mean"] for r in network.book.norms.values()]
    return user.name if every.count(roles["running_mean"]) == 1 else None


def _folded(network: Network, affine: Affine, roles: dict[str, str | float]) -> Affine:
    def role(name: str, default: float) -> Tensor:
        known = name in roles
        given = tensor_at(network.module, str(roles[name])).detach().double() if known else None
        return affine.weight.new_full((affine.outputs,), default) if given is None else given

    scale = role("weight", 1.0) / (role("running_var", 1.0) + float(roles["eps"])).sqrt()
    return affine.scaled(scale, role("bias", 0.0) - role("running_mean", 0.0) * scale)
