"""Give a network other widths: its tensors, module attributes and the sizes written in its graph.

The weights of the result mean nothing: it is an empty form to carry weights into. Whether a size in
the graph (768 in `x.view(n, 768, -1)`) must change cannot be read off, so it is tried: a node keeps
its sizes if it runs on the example and gives as many units as its spaces have; if not, other sizes
are tried.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations, product
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from ..errors import FuseError, PassError
from ..graph.state import replace_tensor, settle_sizes, tensors_of
from ..graph.trace import Interpreter
from ..ir import Axis, Space
from ..spaces.network import Network

Place = tuple[str, int]  # name of a tensor or a node, and an axis of it

Changed = TypeVar("Changed")


# --- how many units each space gets -----------------------------------------------------------


def spaces_under_norms(network: Network) -> set[str]:
    """Return the spaces whose units are averaged over by a norm, as LayerNorm does."""
    nodes = {n.name for n in network.module.graph.nodes if network.normalises_across_units(n)}
    return {s.name for s in network.spaces if any(f.tensor in nodes for f in s.features)}


def scaled_sizes(network: Network, factors: Mapping[str, float], whole: set[str]) -> dict[str, int]:
    """Return the number of units of every space once the widths of some are multiplied.

    Groups and heads stay as many as they are, and the units inside them change. The exception is a
    depthwise convolution with several outputs per input: its groups are themselves units of a
    space, so their number changes.

    Args:
        network: The network.
        factors: Space name -> what its width is multiplied by; others stay as they are.
        whole: Spaces that grow by whole factors only; theirs are rounded down.
    """
    parents = {s.parent for s in network.spaces}
    sizes: dict[str, int] = {}
    for space in network.spaces:
        ratio = factors.get(space.name, 1)
        ratio = int(ratio) if space.name in whole and ratio > 1 else ratio
        if space.blocks is not None:
            old_count = int(space.blocks.max()) + 1
            inside, count = space.size // old_count, sizes.get(space.parent or "", old_count)
            if count == old_count:  # if not, the space changes because its parent does
                # a block of one unit would be no block: the unit would be the block itself
                inside = max(round(inside * ratio), min(inside, 2))
            sizes[space.name] = inside * count
        elif space.name in parents and not are_all_groups(network, space.name):
            sizes[space.name] = space.size
        else:
            sizes[space.name] = max(round(space.size * ratio), 1)
    return sizes


def are_all_groups(network: Network, name: str) -> bool:
    """Tell whether each unit of a space is a group of some grouped convolution."""
    space = network.spaces[name]
    return any(axis.groups == space.size for axis in space.axes)


def change_most(
    names: Sequence[str], change: Callable[[set[str]], Changed]
) -> tuple[Changed | None, dict[str, str]]:
    """Change as many spaces as possible: all at once or, if that fails, each half by itself.

    Args:
        names: The spaces.
        change: Returns the result of changing exactly the spaces it is given, or raises a
            `FuseError`.

    Returns:
        The result with as many spaces changed as possible, None if none could be; and the spaces
        that were not changed, with the reason.
    """
    result: Changed | None = None
    changed: set[str] = set()
    unchanged: dict[str, str] = {}
    waiting = [list(names)] if names else []
    while waiting:
        part = waiting.pop()
        try:
            result = change(changed | {*part})
            changed.update(part)
        except FuseError as error:
            if len(part) == 1:
                unchanged[part[0]] = error.met
            else:
                half = len(part) // 2
                waiting += [part[half:], part[:half]]
    return result, unchanged


# --- tensors and module attributes ------------------------------------------------------------


def reshaped(network: Network, sizes: dict[str, int]) -> fx.GraphModule:
    """Return a network of the same structure and other widths, with meaningless weights.

    Args:
        network: The network; not modified.
        sizes: Space name -> number of units.

    Raises:
        PassError: If no sizes in the graph go with these widths.
    """
    module, shapes = copy.deepcopy(network.module).eval(), shapes_at(network, sizes)
    for name, tensor in tensors_of(module).items():
        shape = shapes[name]
        if shape != tuple(tensor.shape):
            replace_tensor(module, name, torch.full(shape, 0.01))
    for path, part in module.named_modules():
        _update_attributes(network, path, part)
    with torch.no_grad():
        _SizeFitter(network, module, sizes).run(*network.example)
    module.recompile()
    return module


def shapes_at(network: Network, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that all parameters and buffers would have at other widths.

    Args:
        network: The network.
        sizes: Space name -> number of units.
    """
    growth, tensors = _tensor_growth(network, sizes), tensors_of(network.module)
    return {name: _shape(network, name, tuple(t.shape), growth) for name, t in tensors.items()}


def _tensor_growth(network: Network, sizes: dict[str, int]) -> dict[Place, int]:
    """Return how many positions each axis of the parameters and buffers gains."""
    axes = [(space, axis) for space in network.spaces for axis in space.axes]
    return _growth(axes, sizes)


def _feature_growth(network: Network, sizes: dict[str, int]) -> dict[Place, int]:
    """Return how many positions each axis of the nodes' outputs gains."""
    axes = [(space, axis) for space in network.spaces for axis in space.features]
    return _growth(axes, sizes)


def _growth(axes: Sequence[tuple[Space, Axis]], sizes: dict[str, int]) -> dict[Place, int]:
    growth: dict[Place, int] = {}
    for space, axis in axes:
        place, positions_per_unit = (axis.tensor, axis.dim), axis.index.shape[1]
        more = (sizes[space.name] - space.size) * positions_per_unit
        growth[place] = growth.get(place, 0) + more
    return growth


def _shape(
    network: Network, name: str, shape: tuple[int, ...], growth: dict[Place, int]
) -> tuple[int, ...]:
    new = list(shape)
    for dim in {axis.dim for _, axis in network.spaces.on(name)}:
        groups = max(axis.groups for _, axis in network.spaces.places[name, dim])
        dense = network.spaces.sizes[name, dim]
        grown = dense + growth[name, dim]
        if groups == 1:
            new[dim] = grown
        else:  # stored is one group's share; a depthwise convolution has as many groups as inputs
            new[dim] = 1 if groups == dense else grown // groups
    return tuple(new)


def _update_attributes(network: Network, path: str, part: Any) -> None:
    """Set the attributes of a module that repeat the sizes of its tensors."""
    inputs = network.spaces.places.get((f"{path}.weight", 1), ())
    if any(axis.groups == network.spaces.sizes[axis.tensor, 1] > 1 for _, axis in inputs):
        old: Any = network.module.get_submodule(path)  # a depthwise convolution
        part.groups = part.weight.shape[0] * old.groups // old.weight.shape[0]
    settle_sizes(part)


# --- sizes written in the graph ---------------------------------------------------------------

Arguments = tuple[Any, ...]  # positional and named arguments of a node, settings of its module

_TRIALS = 64  # combinations of sizes that are tried for one node


class _SizeFitter(Interpreter):
    """Runs a graph with new tensors and changes the sizes written in it where they do not fit."""

    def __init__(self, network: Network, module: fx.GraphModule, sizes: dict[str, int]) -> None:
        super().__init__(module)
        self.network, self.growth = network, _feature_growth(network, sizes)
        self.likely = _likely_sizes(network, sizes)
        self.ratios = {Fraction(sizes[s.name], s.size) for s in network.spaces} - {1}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node as it is written or, if it does not fit, with as few sizes changed as fit."""
        part = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        written, failure = (n.args, n.kwargs, _settings(part)), None
        for n.args, n.kwargs, settings in _variants(written, self._choices):
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
        """Return what a size in the graph may become, the most likely first."""
        likely = self.likely.get(size, [])
        scaled = [size * r for r in self.ratios if size > 1 and (size * r).denominator == 1]
        return [*likely, *(int(n) for n in sorted(scaled) if int(n) not in likely)]

    def _fits(self, n: fx.Node, value: Any) -> bool:
        """Tell whether a value has the shape that its spaces ask for, as far as they say."""
        if isinstance(value, (tuple, list)):
            readers = [u for u in n.users if u.target is operator.getitem]
            pairs = [(u, _item(value, u.args[1])) for u in readers]
            return all(self._fits(u, item) for u, item in pairs if item is not None)
        old = self.network.shapes.get(n.name)
        if not isinstance(value, Tensor) or n.op == "get_attr" or not old:
            return True
        if value.dim() != len(old):
            return False
        dims = self.network.features.get(n.name, ())
        return all(value.shape[d] == old[d] + self._growth_of(n, d) for d in dims)

    def _growth_of(self, n: fx.Node, dim: int) -> int:
        """Return how many positions an axis gains, at least as many as a value that it is added to.

        The zeros that pad a shortcut belong to no space, but their number grows with the sum.
        """
        growth = [self.growth.get((n.name, dim), 0)]
        for user in n.users:
            if self.network.shapes.get(user.name) != self.network.shapes[n.name]:
                continue
            if self.network.is_elementwise(user):
                growth.append(self.growth.get((user.name, dim), 0))
            elif self.network.is_idle(user):
                growth.append(self._growth_of(user, dim))
        return max(growth, key=abs)


def _settings(part: nn.Module | None) -> dict[str, Any]:
    """Return the sizes that a module without tensors keeps as attributes."""
    if part is None or any(True for _ in (*part.parameters(), *part.buffers())):
        return {}
    public = {k: v for k, v in vars(part).items() if not k.startswith("_")}
    return {k: v for k, v in public.items() if type(v) is int or isinstance(v, tuple)}


def _item(values: Sequence[Any], place: Any) -> Any:
    return values[place] if type(place) is int and place < len(values) else None


def _likely_sizes(network: Network, sizes: dict[str, int]) -> dict[int, list[int]]:
    """Return old size -> new sizes: of the axes, of the spaces, and of one block of a space."""
    likely: dict[int, list[int]] = {}

    def add(old: int, new: int) -> None:
        if old != new and old > 1 and new not in likely.setdefault(old, []):
            likely[old].append(new)

    for (node, dim), more in _feature_growth(network, sizes).items():
        size = network.shapes[node][dim]
        add(size, size + more)
    for place, more in _tensor_growth(network, sizes).items():
        size = network.spaces.sizes[place]
        add(size, size + more)
    for space in network.spaces:
        new = sizes[space.name]
        for times in {axis.index.shape[1] for axis in (*space.axes, *space.features)}:
            add(space.size * times, new * times)
        if space.blocks is not None:
            count = int(space.blocks.max()) + 1
            add(space.size // count, new // sizes.get(space.parent or "", count))
    return likely


def _variants(written: Arguments, choices: Callable[[int], list[int]]) -> Iterator[Arguments]:
    """Yield a node's arguments as written, then with one size changed, with two, and so on.

    Later sizes are changed first: in `view(n, tokens, width)` the width comes last.
    """
    literals: list[int] = []
    map_aggregate(written, lambda x: literals.append(x) if type(x) is int else None)
    changeable = [i for i in reversed(range(len(literals))) if choices(literals[i])]
    yield written
    trials = 0
    for count in range(1, len(changeable) + 1):
        for places in combinations(changeable, count):
            for values in product(*(choices(literals[i]) for i in places)):
                trials += 1
                if trials > _TRIALS:
                    return
                yield _with_literals(written, dict(zip(places, values)))


def _with_literals(written: Arguments, values: dict[int, int]) -> Arguments:
    """Return arguments with some of their integers replaced, which are counted in order."""
    position = iter(range(1 << 30))

    def leaf(x: Any) -> Any:
        return values.get(next(position), x) if type(x) is int else x

    return map_aggregate(written, leaf)
