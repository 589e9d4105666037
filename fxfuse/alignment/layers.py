"""Cut a network into its chain, layers and segments, from the graph alone.

The nodes that every path from input to output passes through form the chain. Between two
neighbours on the chain lies either nothing or a region with parallel paths (a block). A layer is a
step of the chain that contracts parameters, with the norm and activation behind it. A segment is a
maximal run of layers on one kind of tensor at one output resolution. The layer that writes the
output is a segment of its own. Blocks can be taken apart into the layers of the chains inside them.

Other steps (a pad, a shuffle, a product with an input) belong to no layer, as a pooling does, or,
where each layer has its own, to the layer in front of them or behind them.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import groupby, takewhile
from typing import Literal, NamedTuple

from torch import fx

from ..ir import Layer, Segment
from ..spaces.network import Network
from .chain import SOURCE, Chain, End, Step, chain_between, chain_steps, chains_inside
from .normal_form import NormalForm

# The layer that steps between layers belong to; "around": one that works on another form of a value
Owner = Literal["none", "in front", "behind", "around"]
OWNERS: tuple[Owner, ...] = ("none", "in front", "behind", "around")


def partition(network: Network) -> tuple[Segment, ...]:
    """Return the segments of a network in the order of its chain."""
    return Anatomy(network).segments


def chain_of(network: Network) -> tuple[str, ...]:
    """Return the nodes that every path from input to output passes through, in order."""
    return tuple(step.exit.name for step in chain_steps(NormalForm(network)))


class Anatomy:
    """The layers of a network, and on request those inside a block.

    Args:
        network: The network; not modified.
        owner: Which layer steps belong to that contract nothing.

    Attributes:
        segments: Its layers along its chain, see `partition`.
        front: What lies in front of the chain, as of several inputs, as a block; None if nothing
            there contracts parameters.
    """

    def __init__(self, network: Network, owner: Owner = "none") -> None:
        self._form, self._names, self._owner = NormalForm(network), set[str](), owner
        self._parts: dict[tuple[str, ...], _Part] = {}
        first, *steps = chain_steps(self._form)
        layers = self._layers(steps)
        self.segments = (*_runs(layers[:-1]), Segment((layers[-1],))) if layers else ()
        self.front: Layer | None = None
        if any(n.name in network.weights for n in first.region):
            tail = [s.exit for s in takewhile(partial(_follows_layer, network), steps)]
            self.front = self._layer(_Part(first, [*first.region, first.exit], tail))

    def inside(self, block: Layer) -> Iterator[tuple[Segment, ...]]:
        """Yield the segments inside a block, in each way to take it apart."""
        names, part = set(self._names), self._parts[block.nodes]
        ends = [part.step.exit, *part.tail]
        tail = [Step(before, [], node) for before, node in zip(ends, ends[1:])]
        for chains in chains_inside(self._form, part.step):
            self._names = set(names)
            chains[-1].extend(tail)
            yield tuple(segment for c in chains for segment in _runs(self._layers(c)))

    def output_past(self, layers: Sequence[Layer]) -> str:
        """Return a hash of what the network computes if some layers are passed by."""
        output = self._form.network.module.graph.output_node()
        return self._form.hashes_past(entries_of(self._form, layers))[output]

    def _layers(self, chain: Chain) -> list[Layer]:
        steps = [step for step in chain if step.entry != SOURCE]
        parts = _with_other_steps(self._form.network, *_parts(self._form, steps), self._owner)
        return [self._layer(part) for part in _without_norms_of_their_own(self._form, parts)]

    def _layer(self, part: _Part) -> Layer:
        layer = _layer(self._form, part, self._names)
        self._names.add(layer.name)
        self._parts[layer.nodes] = part
        return layer


def layers_between(network: Network, entry: str, nodes: Collection[str]) -> list[Layer]:
    """Return the layers that some nodes behind a node are, wherever in the network these lie."""
    anatomy, named = Anatomy(network), network.nodes
    chain = chain_between(anatomy._form, named[entry], {named[n] for n in nodes})
    return anatomy._layers(chain)


def entries_of(form: NormalForm, layers: Sequence[Layer]) -> dict[fx.Node, fx.Node]:
    """Return the node that counts at the end of each layer -> the layer's entry."""
    nodes = form.network.nodes
    return {form.source(nodes[x.nodes[-1]]): nodes[x.entry] for x in layers}


def _runs(layers: Sequence[Layer]) -> tuple[Segment, ...]:
    """Cut layers where the form or the resolution of their outputs changes."""
    runs = groupby(layers, key=lambda x: (x.layout, x.resolution))
    return tuple(Segment(tuple(run)) for _, run in runs)


class _Part(NamedTuple):
    """The nodes of a layer: its step of the chain, and what belongs to it there.

    Attributes:
        step: The step that contracts parameters.
        nodes: Its nodes, and those that pick one of several outputs.
        tail: The norms and activations behind it.
        lead: Other steps in front of it.
        rest: Other steps behind it.
    """

    step: Step
    nodes: list[fx.Node]
    tail: list[fx.Node]
    lead: Sequence[Step] = ()
    rest: Sequence[Step] = ()

    @property
    def entry(self) -> End:
        return self.lead[0].entry if self.lead else self.step.entry

    @property
    def all_nodes(self) -> list[fx.Node]:
        """All its nodes, in order."""
        return [*_nodes_of(self.lead), *self.nodes, *self.tail, *_nodes_of(self.rest)]


def _nodes_of(steps: Sequence[Step]) -> list[fx.Node]:
    return [node for step in steps for node in (*step.region, step.exit)]


def _parts(form: NormalForm, steps: Chain) -> tuple[list[_Part], list[Chain]]:
    """Return the steps that contract parameters, each with the norms and activations behind it.

    And other steps: in front of the first of these, between two of them, behind the last.
    """
    network, i = form.network, 0
    parts: list[_Part] = []
    gaps: list[Chain] = [[]]
    while i < len(steps):
        step = steps[i]
        i += 1
        if not any(n.name in network.weights for n in [*step.region, step.exit]):
            gaps[-1].append(step)
            continue
        part = _Part(step, [*step.region, step.exit], [])
        while i < len(steps) and _picks_output(network, steps[i]):
            part.nodes.append(steps[i].exit)
            i += 1
        while i < len(steps) and _follows_layer(network, steps[i]):
            part.tail.append(steps[i].exit)
            i += 1
        parts.append(part)
        gaps.append([])
    return parts, gaps


def _with_other_steps(
    network: Network, parts: Sequence[_Part], gaps: Sequence[Chain], owner: Owner
) -> list[_Part]:
    """Give layers the steps between them that keep, or restore, the form of what they hand on."""
    if owner == "none":
        return list(parts)
    if owner == "around":
        around: list[_Part] = []
        for part, gap, behind in zip(parts, gaps, gaps[1:]):
            free = () if around and around[-1].rest else gap  # else it is the previous layer's
            around.append(_with_reshapes(network, part, free, behind))
        return around
    owning = []
    for part, gap in zip(parts, gaps if owner == "behind" else gaps[1:]):
        form = _form_of(network, part.nodes[-1])[:2]
        step_ends = [s.entry if owner == "behind" else s.exit for s in gap]
        alike = [
            i
            for i, end in enumerate(step_ends)
            if isinstance(end, fx.Node)
            and end.op != "output"
            and _form_of(network, end)[:2] == form
        ]
        if alike and owner == "behind":
            part = part._replace(lead=gap[alike[0] :])
        elif alike:
            part = part._replace(rest=gap[: alike[-1] + 1])
        owning.append(part)
    return owning


def _with_reshapes(network: Network, part: _Part, front: Sequence[Step], behind: Chain) -> _Part:
    """Give a layer the steps that reshape its input and those that undo it behind the layer.

    An example is a block that works on all positions of a batch as if these were its samples.
    """
    if any(map(network.is_activation, part.tail)):
        return part
    own = _form_of(network, part.nodes[-1])[:2]
    leads = list(takewhile(partial(_reshapes, network), reversed(front)))
    rests = list(takewhile(partial(_reshapes, network), behind))
    for i, first in enumerate(leads):
        outer = _form_of(network, first.entry)[:2] if isinstance(first.entry, fx.Node) else own
        for j, last in enumerate(rests):
            if outer == _form_of(network, last.exit)[:2] != own:
                return part._replace(lead=leads[i::-1], rest=rests[: j + 1])
    return part


def _reshapes(network: Network, step: Step) -> bool:
    """Tell whether a step only gives a value another shape."""
    node = step.exit
    return not step.region and node.name in network.shapes and network.is_idle(node)


def _form_of(network: Network, node: fx.Node) -> tuple[tuple[int, int], tuple[int, ...], int]:
    """Return the layout of a value, its resolution and its width."""
    shape = network.shapes.get(node.name, ())
    dim = _feature_axis(network, node, shape)
    samples = [axis for axis in network.samples_axes(node) if axis != dim] or [0]
    resolution = tuple(n for d, n in enumerate(shape) if d not in (samples[0], dim))
    return (len(shape), dim), resolution, shape[dim] if shape else 0


def _without_norms_of_their_own(form: NormalForm, parts: list[_Part]) -> list[_Part]:
    """Cut off the norm behind a layer that is a step of its own, as behind the last of some blocks.

    It is one if layers that are the same but for it have none, or if the block has a norm in front.
    """
    ends = [None if part.rest else _end_of_its_own(form, part) for part in parts]
    plain = {
        _kind(form, part.step.entry, [*part.nodes, *part.tail])
        for part, end in zip(parts, ends)
        if end is None
    }
    cut = []
    for part, end in zip(parts, ends):
        bare = part._replace(tail=part.tail[:end])
        own = _kind(form, part.step.entry, [*part.nodes, *bare.tail]) in plain
        cut.append(bare if own or _norm_in_front(form, part.step) else part)
    return cut


def _end_of_its_own(form: NormalForm, part: _Part) -> int | None:
    """Return where in the tail there is a norm behind a block's join or behind an activation.

    Behind a block with a norm in front, an activation is as much by itself.
    """
    network = form.network
    if part.tail and part.step.region and _norm_in_front(form, part.step):
        return 0
    for i, node in enumerate(part.tail):
        behind = part.step.region or any(map(network.is_activation, part.tail[:i]))
        if behind and network.is_norm(node):
            return i
    return None


def _norm_in_front(form: NormalForm, step: Step) -> bool:
    """Tell whether all that a block's branches read of the entry goes through norms."""
    network = form.network
    entry = form.source(step.entry) if isinstance(step.entry, fx.Node) else step.entry
    readers = [n for n in step.region if form.counts(n) and entry in form.inputs_of(n)]
    return bool(readers) and all(map(network.is_norm, readers))


def _picks_output(network: Network, step: Step) -> bool:
    """Tell whether a step picks one of several tensors that a module returns, as of an LSTM."""
    returns_several = network.shapes.get(str(step.entry)) == ()
    return returns_several and not step.region and step.exit.target is operator.getitem


def _follows_layer(network: Network, step: Step) -> bool:
    """Tell whether a step is the norm, activation or dropout behind a layer."""
    if step.region or step.exit.op == "output":
        return False
    node, shapes = step.exit, network.shapes
    belongs = network.is_norm(node) or network.is_activation(node) or network.is_idle(node)
    return belongs and shapes.get(node.name) == shapes.get(str(step.entry))


def _layer(form: NormalForm, part: _Part, taken: set[str]) -> Layer:
    network, step, nodes = form.network, part.step, part.all_nodes
    firsts = [*takewhile(lambda n: not network.is_activation(n), part.tail)]
    pre_activation = [part.nodes[-1], *firsts][-1]
    if firsts == part.tail and all(_reshapes(network, step) for step in part.rest):
        pre_activation = nodes[-1]
    layout, resolution, width = _form_of(network, nodes[-1])
    return Layer(
        name=_name(network, nodes, taken),
        kind=_kind(form, part.entry, nodes),
        nodes=tuple(n.name for n in nodes),
        entry=str(part.entry),
        merge=step.exit.name,
        pre_activation=pre_activation.name,
        producers=tuple(n.name for n in nodes if n.name in network.weights),
        branched=bool(step.region),
        resolution=resolution,
        layout=layout,
        width=width,
    )


def _feature_axis(network: Network, node: fx.Node, shape: tuple[int, ...]) -> int:
    """Return the axis of a node's units; if no labels show it, that of one unit, or the usual."""
    axis, rank = network.feature_axis(node), len(shape)
    if axis is not None:
        return axis
    usual = 1 if rank in (2, 4, 5) else rank - 1
    single = [dim for dim in range(1, rank) if shape[dim] == 1]
    return single[0] if len(single) == 1 else usual


def _name(network: Network, nodes: list[fx.Node], taken: set[str]) -> str:
    """Name a layer by the module that holds its contractions, in a way that no other layer has."""
    paths = [module_path(n) for n in nodes if n.name in network.weights]
    common = paths[0].split(".")
    for path in paths[1:]:
        parts = path.split(".")
        same = [a == b for a, b in zip(common, parts)]
        common = common[: same.index(False) if False in same else len(same)]
    name = ".".join(common)
    if name and name not in taken:
        return name
    joined = f"{paths[0]}..{paths[-1]}" if len(paths) > 1 else paths[0]
    return joined if joined and joined not in taken else f"{joined}@{nodes[0].name}"


def module_path(node: fx.Node) -> str:
    """Return the qualified name of the module that a node belongs to."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack), "").split("@")[0] or node.name


def describe(network: Network, node: fx.Node) -> str:
    """Return which operators a node runs, without widths; the same however the code spells it."""
    return repr(network.steps(node))


def _kind(form: NormalForm, entry: End, nodes: list[fx.Node]) -> str:
    """Hash what a layer computes from its entry, so that equal structures have equal kinds."""
    hashes: dict[End, str] = {entry: "entry"}
    for node in nodes:
        inputs = [hashes.get(n) or form.hash_given(n) for n in form.network.inputs_of(node)]
        hashes[node] = form.hash_of(node, inputs) if form.counts(node) else inputs[0]
    return f"{', '.join(_summary(form, nodes[-1], hashes))} [{hashes[nodes[-1]][:8]}]"


def _summary(form: NormalForm, last: fx.Node, hashes: dict[End, str]) -> list[str]:
    """Name the operators up to a node, as "conv3x3, relu", branch by branch in a fixed order."""
    words: list[str] = []
    waiting, seen = [last], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen or node not in hashes or hashes[node] == "entry":
            continue
        seen.add(node)
        waiting += sorted(form.network.inputs_of(node), key=lambda n: hashes.get(n, ""))
        if form.counts(node):
            words += [step.word for step in reversed(form.network.steps(node)) if step.word]
    return words[::-1]
