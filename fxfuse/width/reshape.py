"""Which unit of a network each unit of another of the same structure, but other widths, stands for.

Where there are more units there, some stand for the same one; where there are fewer, for the
strongest. Units inside a block (a group, a head) stand for units of the block that theirs stands
for.

Give a network other widths: tensors, module attributes and the sizes written in its graph.

The weights of the result mean nothing; it is a shape to carry weights into. Sizes in the graph
(`view(n, 768, -1)`) are changed only where a node would not run or would give another width than
its units have, by trial on the example, so nothing is known to be right before it is verified.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from ..errors import FuseError, PassError
from ..graph.trace import Interpreter
from ..graph.verify import sizes_of
from ..spaces.network import Network


def normed(network: Network) -> set[str]:
    """Return the spaces over whose units a norm takes moments."""
    nodes = {
        n.name
        for n in network.module.graph.nodes
        if network.rules(n) & {"layer_norm", "group_norm"}
    }
    return {s.name for s in network.spaces if any(f.tensor in nodes for f in s.features)}


Place = tuple[str, int]  # a tensor or a node's output, and an axis of it


Given = tuple[Any, ...]  # what a node is given: arguments, settings


_TRIALS = 64  # ways to change the sizes of one node


def rescaled_sizes(
    network: Network, factor: float, wanted: set[str], even: set[str]
) -> dict[str, int]:
    """Return the number of units of each space once some are wider or narrower by a factor.

    Blocks (groups, heads) stay as many as they are and change inside; where units are blocks
    themselves (the inputs of a depthwise convolution with several outputs each), their number does.

    Args:
        network: The network.
        factor: Of the widths.
        wanted: The spaces to change.
        even: Spaces that take whole multiples only.
    """
    outer = {s.parent for s in network.spaces}
    sizes: dict[str, int] = {}
    for space in network.spaces:
        ratio = int(factor) if space.name in even and factor > 1 else factor
        ratio = ratio if space.name in wanted else 1
        if space.blocks is not None:
            count = int(space.blocks.max()) + 1
            inside, blocks = space.size // count, sizes.get(space.parent or "", count)
            if blocks == count:  # else it changes with its blocks
                inside = max(round(inside * ratio), min(inside, 2))  # one alone would be its block
            sizes[space.name] = inside * blocks
        elif space.name in outer and not _counted_by_groups(network, space.name):
            sizes[space.name] = space.size
        else:
            sizes[space.name] = max(round(space.size * ratio), 1)
    return sizes


def _counted_by_groups(network: Network, name: str) -> bool:
    return any(a.groups == network.spaces[name].size for a in network.spaces[name].axes)


def reshaped(network: Network, sizes: dict[str, int]) -> fx.GraphModule:
    """Return a network of one structure and other widths; its weights mean nothing.

    Args:
        network: The network; not modified.
        sizes: Space name -> number of units.

    Raises:
        PassError: If a node takes no sizes that fit.
    """
    module, shapes = copy.deepcopy(network.module).eval(), shapes_at(network, sizes)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        shape = shapes[name]
        if shape != tuple(tensor.shape):
            _replace(
                module, name, torch.full(shape, 0.01, dtype=tensor.dtype, device=tensor.device)
            )
    for path, part in module.named_modules():
        _settle_attributes(network, path, part)
    with torch.no_grad():
        _Fitter(network, module, sizes).run(*network.example)
    module.recompile()
    return module


def shapes_at(network: Network, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters and buffers at other numbers of units.

    Args:
        network: The network.
        sizes: Space name -> number of units.
    """
    growth, module = _growth(network, sizes, False), network.module
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: _shape(network, name, tuple(t.shape), growth) for name, t in tensors}


def by_halves(names: Sequence[str], change: Callable[[set[str]], None]) -> dict[str, str]:
    """Change as many spaces as can be: all at once, or else by halves on top of what was done.

    Args:
        names: The spaces.
        change: Changes all that it is given, or raises an error of this library.

    Returns:
        The spaces that could not be changed, with the reason.
    """
    done: set[str] = set()
    kept: dict[str, str] = {}

    def attempt(part: Sequence[str]) -> None:
        try:
            change(done | {*part})
            done.update(part)
        except FuseError as error:
            if len(part) == 1:
                kept[part[0]] = error.met
                return
            attempt(part[: len(part) // 2])
            attempt(part[len(part) // 2 :])

    if names:
        attempt(names)
    return kept


def _growth(network: Network, sizes: dict[str, int], features: bool) -> dict[Place, int]:
    """Return by how much each axis of the parameters and buffers, or of node outputs, grows."""
    found: dict[Place, int] = {}
    for space in network.spaces:
        for axis in space.features if features else space.axes:
            place, more = (axis.tensor, axis.dim), sizes[space.name] - space.size
            found[place] = found.get(place, 0) + more * axis.index.shape[1]
    return found


def _shape(
    network: Network, name: str, shape: tuple[int, ...], growth: dict[Place, int]
) -> tuple[int, ...]:
    new = list(shape)
    for dim in {a.dim for _, a in network.spaces.on(name)}:
        groups = max(a.groups for _, a in network.spaces.places[name, dim])
        dense = network.spaces.sizes[name, dim]
        grown = dense + growth[name, dim]
        new[dim] = grown // (grown if groups == dense else groups) if groups > 1 else grown
    return tuple(new)


def _replace(module: nn.Module, path: str, data: Tensor) -> None:
    owner, _, leaf = path.rpartition(".")
    part = module.get_submodule(owner)
    known = getattr(part, leaf)
    setattr(part, leaf, nn.Parameter(data) if isinstance(known, nn.Parameter) else data)


def _settle_attributes(network: Network, path: str, part: Any) -> None:
    """Make a module's attributes say what its tensors say."""
    depthwise = network.spaces.places.get((f"{path}.weight", 1), ())
    if any(a.groups == network.spaces.sizes[a.tensor, 1] > 1 for _, a in depthwise):
        before: Any = network.module.get_submodule(path)  # a convolution, as its axis has groups
        part.groups = part.weight.shape[0] * before.groups // before.weight.shape[0]
    for name, size in sizes_of(part).items():
        setattr(part, name, size)
    if isinstance(part, nn.MultiheadAttention):
        joint = part.in_proj_weight
        part.embed_dim = part.out_proj.weight.shape[0]
        part.kdim, part.vdim = (
            t.shape[1] for t in ((joint, joint) if joint is not None else _projections(part))
        )
        part.head_dim = part.embed_dim // part.num_heads


def _projections(part: nn.MultiheadAttention) -> tuple[Tensor, Tensor]:
    return part.k_proj_weight, part.v_proj_weight


class _Fitter(Interpreter):
    """Run a graph and change the sizes written in it where its new tensors do not fit them."""

    def __init__(self, network: Network, module: fx.GraphModule, sizes: dict[str, int]) -> None:
        super().__init__(module)
        self.network, self.growth = network, _growth(network, sizes, True)
        self.changes = _changes(network, sizes)
        self.ratios = {Fraction(sizes[s.name], s.size) for s in network.spaces} - {1}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node as it is written, or with the fewest of its sizes changed that do."""
        part = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        given, failure = (n.args, n.kwargs, _settings(part)), None
        for n.args, n.kwargs, settings in _variants(given, self._choices):
            for name, setting in settings.items():
                setattr(part, name, setting)
            try:
                value = super().run_node(n)
            except Exception as error:
                failure = failure or error
                continue
            if self._fits(n, value):
                return value
        raise PassError(
            f"sizes that cannot be changed with the widths: {failure or 'another width results'}",
            where=f"node '{n.name}' of {self.network.name}",
            expected="sizes in the graph that follow from the widths of its layers",
            do="build the network at the new widths yourself and pass it as `like`",
        ) from failure

    def _choices(self, size: int) -> list[int]:
        """Return what a size in the graph may become: best known, then any multiple in use."""
        scaled = [size * r for r in self.ratios if size > 1 and (size * r).denominator == 1]
        known = self.changes.get(size, [])
        return [*known, *(int(n) for n in sorted(scaled) if int(n) not in known)]

    def _fits(self, n: fx.Node, value: Any) -> bool:
        """Tell whether a value has the shape that its units ask for, where that is known."""
        if isinstance(value, (tuple, list)):
            parts = [u for u in n.users if u.target is operator.getitem]
            return all(self._fits(u, p) for u in parts if (p := _at(value, u.args[1])) is not None)
        old = self.network.book.shapes.get(n.name)
        if not isinstance(value, Tensor) or n.op == "get_attr" or not old:
            return True
        if value.dim() != len(old):
            return False
        known = {axis.dim for axis in self.network.book.features.get(n.name, [])}
        return all(value.shape[d] == old[d] + self._more(n, d) for d in known)

    def _more(self, n: fx.Node, dim: int) -> int:
        """Return how much an axis grows, at least as much as what its values are added to."""
        found = [self.growth.get((n.name, dim), 0)]
        for user in n.users:
            if self.network.book.shapes.get(user.name) != self.network.book.shapes[n.name]:
                continue
            if self.network.rules(user) == {"pointwise"}:
                found.append(self.growth.get((user.name, dim), 0))
            elif self.network.is_idle(user):
                found.append(self._more(user, dim))
        return max(found, key=abs)


def _settings(part: nn.Module | None) -> dict[str, Any]:
    """Return the sizes that a module without tensors keeps as attributes."""
    if part is None or any(True for _ in (*part.parameters(), *part.buffers())):
        return {}
    shown = {k: v for k, v in vars(part).items() if not k.startswith("_")}
    return {k: v for k, v in shown.items() if type(v) is int or isinstance(v, tuple)}


def _at(parts: Sequence[Any], place: Any) -> Any:
    return parts[place] if type(place) is int and place < len(parts) else None


def _changes(network: Network, sizes: dict[str, int]) -> dict[int, list[int]]:
    """Return what each size of the network may become: lengths of axes, of blocks, of parts."""
    found: dict[int, list[int]] = {}

    def note(old: int, new: int) -> None:
        if old != new and old > 1 and new not in found.setdefault(old, []):
            found[old].append(new)

    for (node, dim), more in _growth(network, sizes, True).items():
        note(network.book.shapes[node][dim], network.book.shapes[node][dim] + more)
    for place, more in _growth(network, sizes, False).items():
        note(network.spaces.sizes[place], network.spaces.sizes[place] + more)
    for space in network.spaces:
        new = sizes[space.name]
        for times in {a.index.shape[1] for a in (*space.axes, *space.features)}:
            note(space.size * times, new * times)
        if space.blocks is not None:
            count = int(space.blocks.max()) + 1
            note(space.size // count, new // sizes.get(space.parent or "", count))
    return found


def _variants(given: Given, choices: Callable[[int], list[int]]) -> Iterator[Given]:
    """Return a node's arguments, then with more and more of their sizes changed, last ones first.

    A size of an axis that all users spell the same way is most often the last one.
    """
    literals: list[int] = []
    map_aggregate(given, lambda x: literals.append(x) if type(x) is int else None)
    able = [i for i in reversed(range(len(literals))) if choices(literals[i])]
    yield given
    tried = 0
    for count in range(1, len(able) + 1):
        for places in combinations(able, count):
            for values in product(*(choices(literals[i]) for i in places)):
                tried += 1
                if tried > _TRIALS:
                    return
                yield _with(given, dict(zip(places, values)))


def _with(given: Given, values: dict[int, int]) -> Given:
    position = iter(range(1 << 30))

    def leaf(x: Any) -> Any:
        return values.get(next(position), x) if type(x) is int else x

    return map_aggregate(given, leaf)
