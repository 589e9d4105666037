"""Values that make a copied layer neutral, so that it passes on what it reads.

1. A plain layer becomes the identity: ones at the centre of its kernel, a norm without effect. Its
   activation must not change what an activation before it has left, as ReLU behind ReLU.
2. A residual block gets a branch that writes zero.
3. A run of layers whose last one has no activation (an inverted bottleneck) carries its input
   through: scaled and shifted to where its activations are straight lines, and back at the end.

References:
    Chen et al. 2016 (Net2Net); CLAFusion, section 3.2 (adding layers). Difference: only the last
    parameters of an added branch are zero, so that the added block can be trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..alignment.normal_form import unread_writers, writers_of
from ..calibration.norms import tensors_for
from ..calibration.run import record
from ..errors import PassError
from ..graph.state import fill, part_at, tensor_at
from ..ir import Layer
from ..spaces.network import Network


@dataclass(frozen=True, eq=False)
class Insertion:
    """A layer that a network lacks, and where a copy of it goes.

    Attributes:
        template: The network that the layer is copied from.
        layer: The layer; of a run, all its layers as one.
        into: The network that lacks it.
        after: Node of that network behind which the copy goes.
        parts: The layers of a run that is neutral only as a whole; empty for a single layer.
        beside: What the layer reads besides its entry -> the node of that network with this value.
        shared: Modules and tensors of the layer that others use too -> what they are there.
    """

    template: Network
    layer: Layer
    into: Network
    after: str
    parts: tuple[Layer, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class LayerCopy:
    """The copy of a layer in another network; its tensors are found by their template names.

    Attributes:
        insertion: What was copied, and where to.
        width: Number of units of the stream there.
        module: The network that is being edited.
        paths: Module or tensor in the template -> its copy in `module`.
    """

    insertion: Insertion
    width: int
    module: fx.GraphModule
    paths: Mapping[str, str]

    def name_of(self, tensor: str) -> str:
        """Return the name that the copy of a template's tensor has."""
        return renamed(tensor, self.paths)

    def has(self, tensor: str) -> bool:
        """Tell whether a template's tensor was copied with the layer."""
        return any(tensor == p or tensor.startswith(p + ".") for p in self.paths)

    def __getitem__(self, tensor: str) -> Tensor:
        return tensor_at(self.module, self.name_of(tensor))

    def fill(self, tensor: str, value: float | np.ndarray | Tensor) -> None:
        """Set the copy of a template's tensor to one value, or to values that expand to it."""
        fill(self.module, self.name_of(tensor), value)


def renamed(tensor: str, paths: Mapping[str, str]) -> str:
    """Return the name of a tensor once modules and tensors have gone from old to new paths."""
    path = max((p for p in paths if tensor == p or tensor.startswith(p + ".")), key=len)
    return paths[path] + tensor[len(path) :]


def make_neutral(copied: LayerCopy, approximate: bool) -> frozenset[str]:
    """Set the values of a copied layer so that it passes on what it reads.

    Args:
        copied: The copy; its tensors are edited.
        approximate: Whether its activation may change what it passes on.

    Returns:
        The tensors of the copy that were set to zero to silence a branch.

    Raises:
        PassError: If the layer has no neutral form.
    """
    insertion = copied.insertion
    layer, template = insertion.layer, insertion.template
    zeroed: frozenset[str] = frozenset()
    _require_own_weights(template, layer)
    _require_no_other_steps(insertion)
    if insertion.shared:
        raise no_neutral_form(layer.name, "it computes with a weight of another layer")
    if insertion.parts:
        _carry_through(copied)
        return zeroed
    if layer.branched:
        zeroed = zero_branch(copied)
    else:
        _make_identity(copied)
    for name in layer.nodes[layer.nodes.index(layer.merge) + 1 :]:
        node = template.nodes[name]
        if template.is_activation(node) and not (approximate or changes_nothing(insertion, node)):
            raise no_neutral_form(
                layer.name, f"activation '{name}' changes the values behind '{insertion.after}'"
            )
        if template.is_norm(node):
            fill_norm(copied, node)
    return zeroed


def _require_no_other_steps(insertion: Insertion) -> None:
    """Refuse layers with other steps than norms and activations in front of them or behind."""
    layer, template = insertion.layer, insertion.template
    at = layer.nodes.index(layer.merge)
    in_front = () if layer.branched or insertion.parts else layer.nodes[:at]
    beside = [template.nodes[name] for name in (*in_front, *layer.nodes[at + 1 :])]
    writers = writers_of(template)
    if any(unread_writers(writers, template.nodes[n]) for n in layer.nodes):
        raise no_neutral_form(layer.name, "it writes into its values in place")
    for node in beside:
        usual = template.is_norm(node) or template.is_activation(node) or template.is_idle(node)
        if not usual:
            raise no_neutral_form(layer.name, f"'{node.name}' belongs to it")


class NoNeutralForm(PassError):
    """A layer that cannot be inserted so that it passes on what it reads."""

    START = "a layer that has no neutral form: "

    @property
    def why(self) -> str:
        """Why it cannot."""
        return self.met.removeprefix(self.START)

    def for_balancing_only(self) -> NoNeutralForm:
        """Return the refusal for a layer that fusing passes by, with this among the advice."""
        fused = "call fxfuse.fuse, which needs no balanced networks and passes the layer by, or "
        return NoNeutralForm(self.met, where=self.where, expected=self.expected, do=fused + self.do)


def no_neutral_form(name: str, why: str) -> NoNeutralForm:
    """Say that a layer cannot be inserted, and why."""
    return NoNeutralForm(
        NoNeutralForm.START + why,
        where=f"layer '{name}'",
        expected="a plain layer behind an activation like its own, or a block around a skip",
        do="remove the layers that not all networks have: "
        "method=fxfuse.Method(balancing=fxfuse.depth.Shorten())",
    )


# --- plain layers -----------------------------------------------------------------------------


def _make_identity(copied: LayerCopy) -> None:
    layer = copied.insertion.layer
    weight = copy_inputs(copied, layer)
    if weight.dim() == 2 and weight.shape[0] != weight.shape[1]:
        raise no_neutral_form(layer.name, "its width changes")


def copy_inputs(copied: LayerCopy, layer: Layer) -> Tensor:
    """Let the contraction of a plain layer copy its inputs; return its weight.

    Rows beyond the number of inputs write zeros.
    """
    template = copied.insertion.template
    weights = template.weights[layer.merge]
    if not all(copied.has(name) for name in template.tensors[layer.merge]):
        raise no_neutral_form(layer.name, "it computes with a weight of another layer")
    convolutions = [s.geometry for s in template.contractions(layer.merge) if s.geometry]
    if len(weights) > 1 or len(convolutions) > 1:
        raise no_neutral_form(layer.name, "several contractions in one step")
    axes = 2 + sum(len(conv.kernel) for conv in convolutions)
    whole = [n for n in weights if _reads(template, template.nodes[layer.merge], n)]
    if not whole or copied[whole[0]].dim() != axes:
        raise no_neutral_form(layer.name, "its weight is no tensor of its own")
    for name in template.tensors[layer.merge]:
        copied.fill(name, 0.0)
    weight = copied[whole[0]].data
    for conv in convolutions:
        sides = zip(conv.kernel, conv.padding, conv.dilation)
        centred = all(2 * p == d * (k - 1) for k, p, d in sides)
        if conv.transposed or set(conv.stride) != {1} or not centred:
            raise no_neutral_form(layer.name, "its convolution changes the size or is not centred")
    grouped = any(conv.grouping != "dense" for conv in convolutions)
    rows = torch.arange(weight.shape[0] if grouped else min(weight.shape[:2]))
    centre = tuple(k // 2 for k in weight.shape[2:])
    at: tuple[Any, ...] = (rows, rows % weight.shape[1], *centre)
    weight[at] = 1.0
    return weight


def _require_own_weights(network: Network, layer: Layer) -> None:
    """Refuse a layer whose weight is a part of a tensor that holds those of other layers, too."""
    inside = [network.nodes[name] for name in layer.nodes]
    parts = {
        weight
        for node in inside
        for weight in network.weights.get(node.name, ())
        if not _reads(network, node, weight)
    }
    for node, names in network.weights.items():
        if node not in layer.nodes and not parts.isdisjoint(names):
            raise PassError(
                f"a layer whose weight is a part of '{min(parts)}', as that of '{node}' is",
                where=f"layer '{layer.name}' of {network.name}",
                expected="layers whose weights are tensors of their own, where depths differ",
                do="give each layer its own parameters, as by nn.ParameterList",
            )


def fill_norm(copied: LayerCopy, node: fx.Node, scale: float = 1.0, shift: float = 0.0) -> None:
    """Let a norm compute `scale * x + shift`."""
    insertion = copied.insertion
    roles = insertion.template.norms.get(node.name)
    if roles is None:
        raise no_neutral_form(insertion.layer.name, f"norm '{node.name}' depends on its input")
    for name, values in tensors_for(roles, scale, shift).items():
        copied.fill(name, values)


# --- blocks -----------------------------------------------------------------------------------


def zero_branch(copied: LayerCopy) -> frozenset[str]:
    """Set the last parameters of a block's branches to zero, and return their names.

    The block then adds nothing to its skip.
    """
    layer, template = copied.insertion.layer, copied.insertion.template
    terms = _terms(template, template.nodes[layer.merge], layer)
    branches = [n for n in terms if not is_skip(template, n, layer.entry)]
    if not branches or len(terms) != len(branches) + 1:
        raise no_neutral_form(
            layer.name, f"'{layer.merge}' is not the sum of branches and the entry"
        )
    return frozenset(name for node in branches for name in _silenced(copied, node))


def _terms(network: Network, node: fx.Node, layer: Layer) -> list[fx.Node]:
    """Return what a node of a layer is the sum of.

    The entry may be rows of a table of parameters, which the sum then touches but does not read.
    """
    own = node.op == "call_module" or any(n.op == "get_attr" for n in node.all_input_nodes)
    if node.name not in layer.nodes or not network.adds(node) or own:
        return [node]
    inputs = network.inputs_of(node)
    if len(inputs) < 2:
        return [node]
    return [term for n in inputs for term in _terms(network, n, layer)]


def _silenced(copied: LayerCopy, node: fx.Node) -> frozenset[str]:
    """Set the last parameters that write a node's value to zero, and return their names."""
    layer, template = copied.insertion.layer, copied.insertion.template
    behind = [node]
    while behind and behind[0].name != layer.entry:
        node = behind[0]
        own = [
            n for n in last_writers(template, node) if copied.has(n) and _reads(template, node, n)
        ]
        parameters = [name for name in own if isinstance(copied[name], nn.Parameter)]
        if parameters and not template.adds(node):
            for name in parameters:
                copied.fill(name, 0.0)
            return frozenset(copied.name_of(name) for name in parameters)
        if not _keeps_zeros(template, node):
            raise no_neutral_form(layer.name, f"'{node.name}' makes something else of zeros")
        behind = [n for n in template.inputs_of(node) if n.name in template.fed()]
    raise no_neutral_form(layer.name, "its branch ends in nothing that can be set to zero")


def _reads(network: Network, node: fx.Node, name: str) -> bool:
    """Tell whether a node reads a tensor as it is, not what is computed of it (`1 + weight`)."""
    waiting = [node]
    while waiting:
        for read in waiting.pop().all_input_nodes:
            if read.op == "get_attr" and read.target == name:
                return True
            if read.name not in network.fed() and not network.steps(read):
                waiting.append(read)
    return node.op == "call_module"


def _keeps_zeros(network: Network, node: fx.Node) -> bool:
    """Tell whether a node without weights is known to give zeros if it first reads zeros."""
    if network.is_idle(node) or network.moves_or_resamples(node) or network.multiplies(node):
        return True
    if not network.is_activation(node):
        return False
    zero = torch.zeros(1, device=next(network.module.parameters()).device)
    return not apply_activation(network, node, zero).any()


def _branch(insertion: Insertion, layer: Layer) -> fx.Node | None:
    """Return the last node of a block's branch, if the block ends in its entry and one branch."""
    template, merge = insertion.template, insertion.template.nodes[layer.merge]
    inputs = template.inputs_of(merge)
    branches = [n for n in inputs if not is_skip(template, n, layer.entry)]
    return branches[0] if len(inputs) == 2 and len(branches) == 1 else None


def last_writers(network: Network, node: fx.Node) -> list[str]:
    """Return the tensors of a node's last contraction; all of a node that contracts nothing.

    A recurrent layer has no last one: what one step writes, the next one reads.
    """
    names = network.tensors.get(node.name, [])
    part = part_at(network.module, str(node.target)) if node.op == "call_module" else None
    if isinstance(part, (nn.RNNBase, nn.RNNCellBase)):
        return names
    earlier = network.weights.get(node.name, [])[:-1]
    return names[names.index(earlier[-1]) + 1 :] if earlier else names


def is_skip(network: Network, node: fx.Node, entry: str) -> bool:
    """Tell whether a node holds the value of the entry, with nothing but dropout between."""
    while node.name != entry and network.is_idle(node) and network.inputs_of(node):
        node = network.inputs_of(node)[0]
    return node.name == entry


# --- runs of layers ---------------------------------------------------------------------------

# Where an activation may be a straight line: within a distance of a centre. Tried in this order.
STRAIGHT = ((3.0, 2.5), (40.0, 16.0))  # (centre, distance)

SATURATED = 30.0  # gate activations map it to one

MARGIN = 4.0  # how much farther than on the example an input may reach


def _carry_through(copied: LayerCopy) -> None:
    """Let a run of plain layers and gates pass on its input.

    Behind each layer the value is `scale * input + shift`. Scale and shift keep it where the
    activation is a straight line; behind the last layer they are 1 and 0.
    """
    insertion = copied.insertion
    template, into = insertion.template, insertion.into
    largest = record(into, into.example, {insertion.after: lambda v: float(v.abs().max())})
    reach = max(MARGIN * largest[insertion.after], 1e-6)
    scale, shift = 1.0, 0.0
    for layer in insertion.parts:
        if layer.branched:
            _open_gate(copied, layer)
            continue
        weight = copy_inputs(copied, layer)
        if weight.shape[0] < copied.width:
            raise no_neutral_form(layer.name, "it is narrower than the stream it has to carry")
        behind = [insertion.template.nodes[n] for n in layer.nodes[1:]]
        behind = [n for n in behind if not template.is_idle(n)]
        activation = next((n for n in behind if template.is_activation(n)), None)
        centre, distance = (0.0, reach) if activation is None else _straight(insertion, activation)
        gain = (distance / reach) / scale
        if behind and template.is_norm(behind[0]):
            fill_norm(copied, behind[0], gain, centre - shift * gain)
        else:
            _scale_and_shift(copied, layer, gain, centre - shift * gain)
        scale, shift = distance / reach, centre
        if activation is not None:
            ends = torch.tensor([centre - distance, centre, centre + distance]).double()
            low, middle, high = map(float, apply_activation(template, activation, ends))
            slope = (high - low) / (2 * distance)
            scale, shift = scale * slope, middle


def _scale_and_shift(copied: LayerCopy, layer: Layer, scale: float, shift: float) -> None:
    """Let a layer without a norm, whose weight copies its inputs, scale and shift them."""
    template = copied.insertion.template
    names, weight = template.tensors[layer.merge], template.weights[layer.merge][0]
    if len(names) != 2:
        layer_as_a_whole = copied.insertion.layer
        raise no_neutral_form(
            layer_as_a_whole.name, f"'{layer.name}' has neither a bias nor a norm"
        )
    copied[weight].data.mul_(scale)
    copied.fill(next(n for n in names if n != weight), shift)


def _straight(insertion: Insertion, node: fx.Node) -> tuple[float, float]:
    """Return a centre and a distance from it within which an activation is a straight line."""
    for centre, distance in STRAIGHT:
        x = torch.linspace(centre - distance, centre + distance, 101, dtype=torch.float64)
        y = apply_activation(insertion.template, node, x)
        line = torch.linspace(float(y[0]), float(y[-1]), 101, dtype=torch.float64)
        bend, rise = float((y - line).abs().max()), float(y[-1] - y[0])
        if bend < 1e-6 * distance and rise > 0.1 * distance:
            return centre, distance
    raise no_neutral_form(
        insertion.layer.name, f"activation '{node.name}' is nowhere a straight line"
    )


def _open_gate(copied: LayerCopy, layer: Layer) -> None:
    """Let a gate multiply by one, by a bias that its activation maps to one."""
    insertion = copied.insertion
    template, node = insertion.template, _branch(insertion, layer)
    if node is None or not template.multiplies(layer.merge):
        raise no_neutral_form(insertion.layer.name, f"'{layer.name}' is neither plain nor a gate")
    while not template.weights.get(node.name):
        node = template.inputs_of(node)[0]
    writers = last_writers(template, node)
    if len(writers) != 2:
        raise no_neutral_form(
            insertion.layer.name, f"the gate '{layer.name}' has no bias to open it"
        )
    for name in writers:
        copied.fill(name, 0.0 if name in template.weights[node.name] else SATURATED)


# --- activations ------------------------------------------------------------------------------


def changes_nothing(insertion: Insertion, node: fx.Node) -> bool:
    """Tell whether a layer's activation would leave its inputs as they are.

    Its inputs must come from another activation (pooling may lie between) whose outputs it maps to
    themselves, as ReLU does with the outputs of ReLU.
    """
    into = insertion.into
    before = into.nodes[insertion.after]
    while not into.is_activation(before):
        if not (into.is_idle(before) or into.moves_or_resamples(before)):
            return False
        inputs = into.inputs_of(before)
        if not inputs:
            return False
        before = inputs[0]
    device = next(insertion.template.module.parameters()).device
    values = torch.linspace(-12, 12, 6001, device=device).sinh()  # dense near zero, far out too
    once = apply_activation(into, before, values)
    return torch.equal(apply_activation(insertion.template, node, once), once)


def apply_activation(network: Network, node: fx.Node, values: Tensor) -> Tensor:
    """Apply the activation at a node to some values."""
    read = values.clone()  # the activation may write to it
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: read)
    result: Tensor
    if node.op == "call_module":
        result = network.module.get_submodule(str(node.target))(*args, **kwargs)
    elif isinstance(node.target, str):
        result = getattr(read, node.target)(*args[1:], **kwargs)
    else:
        result = node.target(*args, **kwargs)
    return result
