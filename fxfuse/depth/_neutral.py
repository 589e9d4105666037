"""Layers that hand on what they read: the values that make them neutral, and the room they need.

A plain layer becomes the identity (centre tap of the kernel, exactly neutral norm), which needs an
activation that does nothing the second time. A residual block gets a branch that writes zero. A
block that joins its output to its input writes units that nobody reads: the layers behind it get
places for them, with zero weights. A run of layers that ends without an activation carries its
input through where its activations are straight lines, and takes out at the end what that added.

References:
    Chen et al. 2016 (Net2Net); CLAFusion, section 3.2 (adding layers). Difference: only the last
    writer of an added branch is zero, so that the added block can be trained.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..calibration.run import record
from ..errors import PassError
from ..graph.state import fill, part_at, replace_tensor, settle_sizes, tensor_at, tensors_of
from ..ir import Layer
from ..spaces._labels import TensorAxis
from ..spaces.network import OPEN, Network


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
    source = part_at(insertion.template.module, path)
    if isinstance(source, Tensor):
        return _refill(source, _shape(insertion, path, source))
    assert source is not None, f"nothing is called '{path}'"
    part = copy.deepcopy(source)
    conv = part if isinstance(part, nn.modules.conv._ConvNd) else None
    depthwise = conv is not None and conv.groups == conv.in_channels > 1
    for name, tensor in tensors_of(part).items():
        shape = _shape(insertion, f"{path}.{name}", tensor)
        if shape != tuple(tensor.shape):
            replace_tensor(part, name, _refill(tensor, shape))
    if conv is not None and depthwise:
        conv.groups = conv.weight.shape[0]
    for module in part.modules():
        settle_sizes(module)
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


Place = tuple[str, int]  # a tensor or a node's output, and an axis of it


class Room:
    """Places for new units on the streams of one network that is being edited.

    Args:
        network: The network as it was analysed, before any edit.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._units = _units_by_place(network)
        self._added: dict[Place, list[tuple[int, int]]] = {}

    def width(self, node: str) -> int:
        """Return the present size of the stream behind a node."""
        place = self._stream(node)
        if place is None:
            shape = self.network.book.shapes[node]
            return shape[1 if len(shape) in (2, 4, 5) else -1]
        return len(self._units[place]) + sum(n for _, n in self._added.get(place, ()))

    def add(self, module: fx.GraphModule, node: str, count: int) -> bool:
        """Widen all that works on a node's stream behind it; tell whether there is such a stream.

        Contractions read the new units with zeros; norms treat them like an average unit.
        """
        place = self._stream(node)
        if place is None or (self._units[place] < 0).any():
            return False
        stream = self._units[place]
        if self._leaves(node, stream):
            return False
        self._added.setdefault(place, []).append((len(stream), count))
        for name in self._behind(node):
            for other in (p for p in self._units if p[0] == name):
                at = _find(self._units[other], stream)
                if at is None:
                    continue
                point, added = at + len(stream), self._added.setdefault(other, [])
                position = point + sum(n for p, n in added if p <= point)
                added.append((point, count))
                if name in self.network.book.features:
                    continue
                reads = any(a.reads for _, a in self.network.spaces.places[other])
                _widen(module, other, position, count, reads)
        return True

    def _leaves(self, node: str, stream: np.ndarray) -> bool:
        """Tell whether the network is cut at a value behind a node that holds the stream."""
        output = self.network.module.graph.output_node()
        sources = {n.name for n in output.all_input_nodes} & {node, *self._behind(node)}
        held = [units for place, units in self._units.items() if place[0] in sources]
        return OPEN in output.meta and any(_find(units, stream) is not None for units in held)

    def _stream(self, node: str) -> Place | None:
        return next((p for p in self._units if p[0] == node), None)

    def _behind(self, node: str) -> list[str]:
        """Return the nodes behind a node, and the parameters and buffers they touch."""
        nodes = {n.name: n for n in self.network.module.graph.nodes}
        found: dict[str, None] = {}
        waiting = [nodes[node]]
        while waiting:
            for user in waiting.pop().users:
                if user.name not in found:
                    found[user.name] = None
                    found |= dict.fromkeys(self.network.book.tensors.get(user.name, ()))
                    waiting.append(user)
        return list(found)


def _units_by_place(network: Network) -> dict[Place, np.ndarray]:
    """Return a number for the unit at each position of each axis, -1 where nothing can move."""
    sizes = dict(network.spaces.sizes)
    found: dict[Place, np.ndarray] = {}
    start = 0
    for space in network.spaces:
        for axis in (*space.features, *space.axes):
            place = axis.tensor, axis.dim
            if axis.groups == 1:
                size = sizes.get(place) or network.book.shapes[axis.tensor][axis.dim]
                numbers = np.repeat(start + np.arange(space.size), axis.index.shape[1])
                found.setdefault(place, np.full(size, -1))[axis.index.reshape(-1)] = numbers
        start += space.size
    return found


def _find(units: np.ndarray, run: np.ndarray) -> int | None:
    """Return where a run of units begins."""
    for at in np.flatnonzero(units[: len(units) - len(run) + 1] == run[0]):
        if np.array_equal(units[at : at + len(run)], run):
            return int(at)
    return None


def _widen(module: fx.GraphModule, place: Place, at: int, count: int, reads: bool) -> None:
    path, dim = place
    data = tensor_at(module, path).detach()
    head, tail = data.narrow(dim, 0, at), data.narrow(dim, at, data.shape[dim] - at)
    shape = [count if d == dim else n for d, n in enumerate(data.shape)]
    new = torch.zeros(shape, dtype=data.dtype, device=data.device)
    if not reads:
        new += data.mean(dim, keepdim=True)
    replace_tensor(module, path, torch.cat([head, new, tail], dim))


def neutralise(
    module: fx.GraphModule, insertion: Insertion, paths: dict[str, str], room: Room
) -> dict[str, tuple[int, ...]]:
    """Make a layer neutral; return the node that silences it and which of its tensors are zero."""
    layer, template = insertion.layer, insertion.template
    nodes = {n.name: n for n in template.module.graph.nodes}
    tensors, zeroed = _Tensors(module, paths), {}
    if insertion.parts:
        _carry_through(insertion, nodes, tensors)
        return {}
    if not layer.branched:
        _make_identity(insertion, tensors)
    elif joins(insertion):
        _leave_unread(module, insertion, room)
    else:
        zeroed = _zero_branch(insertion, nodes, tensors)
    merge = layer.nodes.index(layer.merge)
    for node in (nodes[name] for name in layer.nodes[merge + (1 if layer.branched else 0) :]):
        if template.is_activation(node):
            _require_absorbed(insertion, node)
        elif template.is_norm(node):
            _neutral_norm(insertion, node, tensors)
    return zeroed


class _Tensors:
    """The parameters and buffers of an inserted layer, by the names they have in the template."""

    def __init__(self, module: fx.GraphModule, paths: dict[str, str]) -> None:
        self.module, self.paths = module, paths

    def __getitem__(self, name: str) -> Tensor:
        return tensor_at(self.module, self._path(name))

    def fill(self, name: str, value: float | Tensor) -> None:
        fill(self.module, self._path(name), value)

    def _path(self, name: str) -> str:
        path = max((p for p in self.paths if name == p or name.startswith(p + ".")), key=len)
        return self.paths[path] + name[len(path) :]


def _make_identity(insertion: Insertion, tensors: _Tensors) -> None:
    layer = insertion.layer
    weight = _copy_inputs(insertion, layer, tensors)
    if weight.dim() == 2 and weight.shape[0] != weight.shape[1]:
        raise no_neutral_form(layer, "its width changes")


def _copy_inputs(insertion: Insertion, layer: Layer, tensors: _Tensors) -> Tensor:
    """Let a plain layer's contraction write its input, place by place; return its weight."""
    book = insertion.template.book
    weights = book.weights[layer.merge]
    for name in book.tensors[layer.merge]:
        tensors.fill(name, 0.0)
    weight = tensors[weights[0]].data
    steps = [s for s in insertion.template.steps(layer.merge) if s[0] == "convolution"]
    if len(weights) != 1 or len(steps) > 1:
        raise no_neutral_form(layer, "several contractions in one step")
    for _, kernel, stride, padding, dilation, _, transposed, _ in steps:
        centred = all(2 * p == d * (k - 1) for k, p, d in zip(kernel, padding, dilation))
        if transposed or set(stride) != {1} or not centred:
            raise no_neutral_form(layer, "its convolution changes the size or is not centred")
    grouped = bool(steps) and steps[0][-1] != "dense"
    rows = torch.arange(weight.shape[0] if grouped else min(weight.shape[:2]))
    centre = tuple(k // 2 for k in weight.shape[2:])
    at: tuple[Any, ...] = (rows, rows % weight.shape[1], *centre)
    weight[at] = 1.0
    return weight


def joins(insertion: Insertion) -> bool:
    """Tell whether a layer ends in a join of its entry with what it computed."""
    layer, template = insertion.layer, insertion.template
    merge = next(n for n in template.module.graph.nodes if n.name == layer.merge)
    parts = template.inputs_of(merge)
    joins = {s[0] for s in template.steps(merge)} == {"cat"} and len(parts) > 1
    return layer.branched and joins and _is_skip(template, parts[0], layer.entry)


def _leave_unread(module: fx.GraphModule, insertion: Insertion, room: Room) -> None:
    layer, shapes = insertion.layer, insertion.template.book.shapes
    sizes = [(a, b) for a, b in zip(shapes[layer.entry], shapes[layer.merge]) if a != b]
    behind = layer.nodes[-1] == layer.merge
    if len(sizes) != 1 or not behind:
        raise no_neutral_form(layer, "what it joins to its input is changed again behind the join")
    if not room.add(module, insertion.after, sizes[0][1] - sizes[0][0]):
        raise no_neutral_form(layer, "it adds units to a stream that cannot be widened")


def _zero_branch(
    insertion: Insertion, nodes: dict[str, fx.Node], tensors: _Tensors
) -> dict[str, tuple[int, ...]]:
    """Zero the last parameters of the branch, so that the merge adds nothing to its skip."""
    layer, template = insertion.layer, insertion.template
    merge = nodes[layer.merge]
    adds = {s[1] for s in template.steps(merge) if len(s) > 1} == {"add"}
    branch = [n for n in template.inputs_of(merge) if not _is_skip(template, n, layer.entry)]
    if not adds or len(branch) != 1 or len(template.inputs_of(merge)) != 2:
        raise no_neutral_form(layer, f"'{merge.name}' is not the sum of a branch and the entry")
    node = branch[0]
    while True:
        own = [x for x in _last_writer(template, node) if _trainable(tensors[x])]
        for name in own:
            tensors.fill(name, 0.0)
        before = template.inputs_of(node)
        if own:
            names = template.book.tensors[node.name]
            return {node.name: tuple(names.index(x) for x in own)}
        if not before or node.name == layer.entry:
            raise no_neutral_form(layer, "its branch ends in nothing that can be set to zero")
        node = before[0]


def _last_writer(network: Network, node: fx.Node) -> list[str]:
    """Return the tensors of a node's last contraction, or all of a node that contracts nothing."""
    names = network.book.tensors.get(node.name, [])
    before = network.book.weights.get(node.name, [])[:-1]
    return names[names.index(before[-1]) + 1 :] if before else names


def _trainable(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _is_skip(network: Network, node: fx.Node, entry: str) -> bool:
    while node.name != entry and network.is_idle(node) and network.inputs_of(node):
        node = network.inputs_of(node)[0]
    return node.name == entry


def _neutral_norm(
    insertion: Insertion, node: fx.Node, tensors: _Tensors, scale: float = 1.0, shift: float = 0.0
) -> None:
    """Let a norm compute `scale * x + shift`."""
    roles = insertion.template.book.norms.get(node.name)
    if roles is None:
        raise no_neutral_form(insertion.layer, f"norm '{node.name}' depends on its input")
    eps, affine = float(roles["eps"]), "weight" in roles
    tensors.fill(str(roles["running_mean"]), 0.0 if affine else -shift / scale)
    tensors.fill(str(roles["running_var"]), 1.0 if affine else 1.0 / scale**2 - eps)
    if affine:
        tensors.fill(str(roles["weight"]), scale * (1.0 + eps) ** 0.5)
        tensors.fill(str(roles["bias"]), shift)


# --- a run of layers ------------------------------------------------------------------------------

LINES = ((3.0, 2.5), (40.0, 16.0))  # where activations are straight: around a centre, how far


CUT_OFF = 30.0  # what any gate takes for one


def _carry_through(insertion: Insertion, nodes: dict[str, fx.Node], tensors: _Tensors) -> None:
    """Make a run of plain layers and gates hand on its input, inside the lines of its activations.

    The input is scaled into the line on the way in and scaled back on the way out; how far it
    reaches is measured on the network's example.
    """
    into = insertion.into
    reach = record(into, into.example, {insertion.after: lambda v: float(v.abs().max())})
    reach = max(4 * reach[insertion.after], 1e-6)
    scale, shift = 1.0, 0.0  # of what the layer before hands on: scale * input + shift
    for layer in insertion.parts:
        if layer.branched:
            _open_gate(insertion, layer, nodes, tensors)
            continue
        weight = _copy_inputs(insertion, layer, tensors)
        if weight.shape[0] < (insertion.width or 0):
            raise no_neutral_form(layer, "it is narrower than the stream it has to carry")
        template = insertion.template
        behind = [nodes[n] for n in layer.nodes[1:] if not template.is_idle(nodes[n])]
        acts = [n for n in behind if template.is_activation(n)]
        centre, far = _line(insertion, acts[0]) if acts else (0.0, reach)
        wanted = far / reach
        if behind and template.is_norm(behind[0]):
            gain = wanted / scale
            _neutral_norm(insertion, behind[0], tensors, gain, centre - shift * gain)
        else:
            _scale_and_shift(insertion, layer, tensors, wanted / scale, centre, shift)
        scale, shift = wanted, centre
        if acts:
            value = respond(
                template, acts[0], torch.tensor([centre - far, centre, centre + far]).double()
            )
            slope = float(value[2] - value[0]) / (2 * far)
            scale, shift = scale * slope, float(value[1])


def _scale_and_shift(
    insertion: Insertion, layer: Layer, tensors: _Tensors, gain: float, centre: float, shift: float
) -> None:
    names = insertion.template.book.tensors[layer.merge]
    if len(names) != 2:
        raise no_neutral_form(insertion.layer, f"'{layer.name}' has neither a bias nor a norm")
    weight = insertion.template.book.weights[layer.merge][0]
    tensors[weight].data.mul_(gain)
    tensors.fill(next(n for n in names if n != weight), centre - shift * gain)


def _line(insertion: Insertion, node: fx.Node) -> tuple[float, float]:
    """Return a centre and a distance from it within which an activation is a straight line."""
    for centre, far in LINES:
        x = torch.linspace(centre - far, centre + far, 101, dtype=torch.float64)
        y = respond(insertion.template, node, x)
        line = torch.linspace(float(y[0]), float(y[-1]), 101, dtype=torch.float64)
        if float((y - line).abs().max()) < 1e-6 * far and float(y[-1] - y[0]) > 0.1 * far:
            return centre, far
    raise no_neutral_form(insertion.layer, f"activation '{node.name}' is nowhere a straight line")


def _open_gate(
    insertion: Insertion, layer: Layer, nodes: dict[str, fx.Node], tensors: _Tensors
) -> None:
    """Let a gate multiply by one: its last contraction writes what its activation takes for one."""
    template, node = insertion.template, nodes[layer.merge]
    names = {s[1] for s in template.steps(node) if len(s) > 1}
    branch = [n for n in template.inputs_of(node) if not _is_skip(template, n, layer.entry)]
    if names != {"mul"} or len(branch) != 1 or len(template.inputs_of(node)) != 2:
        raise no_neutral_form(insertion.layer, f"'{layer.name}' is neither plain nor a gate")
    node = branch[0]
    while not template.book.weights.get(node.name):
        node = template.inputs_of(node)[0]
    own = _last_writer(template, node)
    if len(own) != 2:
        raise no_neutral_form(insertion.layer, f"the gate '{layer.name}' has no bias to open it")
    for name in own:
        tensors.fill(name, 0.0 if name in template.book.weights[node.name] else CUT_OFF)


# --- what an activation does ----------------------------------------------------------------------


def _require_absorbed(insertion: Insertion, node: fx.Node) -> None:
    if not (insertion.approximate or absorbed(insertion, node)):
        raise no_neutral_form(
            insertion.layer,
            f"activation '{node.name}' changes the values behind '{insertion.after}'",
        )


def absorbed(insertion: Insertion, node: fx.Node) -> bool:
    """Tell whether an activation changes nothing that the layer before it hands on."""
    into, source = insertion.into, None
    found = next(n for n in into.module.graph.nodes if n.name == insertion.after)
    while found is not None and source is None:
        if into.is_activation(found):
            source = found
        elif into.is_idle(found) or into.rules(found) <= {"spatial", "move"}:
            found = next(iter(into.inputs_of(found)), None)
        else:
            found = None
    device = next(insertion.template.module.parameters()).device
    values = torch.linspace(-12, 12, 6001, device=device).sinh()  # dense near zero, far out too
    if source is None:
        return False
    once = respond(into, source, values)
    return torch.equal(respond(insertion.template, node, once), once)


def respond(network: Network, node: fx.Node, values: Tensor) -> Tensor:
    """Return what an activation makes of some values."""
    args = tuple(values if isinstance(a, fx.Node) else a for a in node.args)
    found: Tensor
    if node.op == "call_module":
        found = network.module.get_submodule(str(node.target))(values.clone())
    elif isinstance(node.target, str):
        found = getattr(values.clone(), node.target)(*args[1:], **node.kwargs)
    else:
        found = node.target(values.clone(), *args[1:], **node.kwargs)
    return found


def no_neutral_form(layer: Layer, why: str) -> PassError:
    """Say that a layer cannot be inserted, and why."""
    return PassError(
        f"a layer that has no neutral form: {why}",
        where=f"layer '{layer.name}'",
        expected="an identity layer before an absorbing activation, or a block around a skip",
        do="give an alignment in which this layer is matched, or fuse networks of equal depth here",
    )
