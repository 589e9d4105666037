"""A contraction of a network read as an affine map, norm behind it included, and written back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .checks import TOLERANCE, sizes_of
from .composition import Affine
from .data import Calibration
from .errors import PassError
from .moments import Moments
from .network import Network
from .statistics import record, working_batch


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
    _store(module, producer.weight, affine.weight.T if producer.turned else affine.weight)
    if producer.bias is not None:
        _store(module, producer.bias, offset if producer.norm is None else 0 * offset)
    if producer.norm is None:
        return
    roles, one = producer.roles, torch.ones_like(offset)
    eps, plain = float(roles["eps"]), "weight" not in roles  # without an affine part
    _store(module, str(roles["running_mean"]), -offset if plain else 0 * one)
    _store(module, str(roles["running_var"]), one - eps if plain else one)
    if not plain:
        _store(module, str(roles["weight"]), one * (1 + eps) ** 0.5)
        _store(module, str(roles["bias"]), offset)


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
    _store(network.module, str(roles["running_mean"]), mean)
    _store(network.module, str(roles["running_var"]), variance)
    _store(network.module, str(roles["weight"]), (variance + float(roles["eps"])).sqrt())
    _store(network.module, str(roles["bias"]), offset + mean)


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its qualified name."""
    owner, _, leaf = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), leaf)
    return found


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


def _store(module: nn.Module, name: str, values: Tensor) -> None:
    """Set a parameter or buffer, whose shape may change, and the sizes its module knows."""
    owner, _, leaf = name.rpartition(".")
    part, old = module.get_submodule(owner), tensor_at(module, name)
    new = values.detach().to(old).clone()
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, old.requires_grad)
    setattr(part, leaf, new)
    for size, held in sizes_of(part).items():
        setattr(part, size, held)
