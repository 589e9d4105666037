"""Networks of different tasks: one trunk, and behind it a head for each task or one for all labels.

Each head reads the fused trunk through the unproject map of its own network, at the value where the
network was cut. The map is folded into the contractions that read this value, where nothing else
does; a permutation is carried through the head, whose own units move along; otherwise the map
stands in front of the head as a linear layer. Whether a head still computes the same is tried out
on signed noise, which tells a linear step from any other.

References:
    Stoica et al. 2024 (ZipIt), partial zip: merged trunk, one head per task.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, eye_array
from torch import Tensor, fx, nn
from torch.nn import functional

from ..coupling.mixing import Couplings, apply_along
from ..errors import ArgumentError, FuseError, PairingError
from ..graph.compare import TOLERANCE, relative_error
from ..graph.state import add_part, replace_tensor, tensor_at
from ..graph.trace import run_once
from ..ir import Spaces
from ..spaces.network import OPEN, Network
from ..spaces.spaces import rearrange
from ._cut import AUTO, Head, output_axis
from ._fit_heads import Graft


@dataclass(frozen=True, eq=False)
class Crossing:
    """A head, and how it is to read the value at the cut.

    Attributes:
        head: The head, on the device of the fused trunk.
        value: What the fused trunk returns for a few samples.
        inputs: What the head reads beside it.
        dim: The axis of the units.
        read: `(own positions, fused positions)` along that axis.
    """

    head: Head
    value: Tensor
    inputs: tuple[Tensor, ...]
    dim: int
    read: csr_array

    def taken(self, value: Tensor) -> Tensor:
        """Return what the head is to take for a value of the fused trunk."""
        mapped = apply_along(self.read, value.detach().cpu().numpy(), self.dim)
        return torch.from_numpy(np.ascontiguousarray(mapped)).to(value)

    @property
    def source(self) -> fx.Node:
        """The node by which the head takes the value."""
        first: fx.Node = next(iter(self.head.module.graph.nodes))
        return first


def graft(head: Head, couplings: Couplings, k: int, value: Tensor) -> Graft:
    """Let the head of network `k` read the fused trunk.

    Args:
        head: The head; its module may be taken over.
        couplings: The maps of the trunks.
        k: Which network's head it is.
        value: What the fused trunk returns for the anchor's example.

    Raises:
        PairingError: If the values at the cuts cannot be mapped to each other.
    """
    at, dim = _axis(couplings, k)
    module = head.module.to(value if value.is_floating_point() else value.device)
    make = partial(Graft, head.name, dim=dim, inputs=head.inputs)
    if dim is None:
        return make(module, module, None, how="as it is")
    read = csr_array(couplings.feature_map(at, dim, k, reads=True).T)
    if _same_places(read):
        return make(module, module, None, how="as it is")
    example = couplings.problem.structure.example
    crossing = Crossing(head, value, tuple(example[i] for i in head.inputs), dim, read)
    spaces = head_spaces(crossing)
    other = folded(crossing, spaces)
    if other is not None and reads_alike(crossing, other):
        return make(other, module, None, how="folded into its weights")
    other = permuted(crossing, spaces)
    if other is not None and reads_alike(crossing, other):
        return make(other, other, csr_array(read.T), how="its own units moved")
    still = replace(crossing, read=csr_array(eye_array(read.shape[0])))
    return make(in_front(crossing), in_front(still), None, how="through a linear map")


def _axis(couplings: Couplings, k: int) -> tuple[str, int | None]:
    """Return the node at which balanced trunks end, and the axis of its units, if it has such."""
    problem = couplings.problem
    networks = [problem.structure, problem.networks[k]]
    at = networks[0].module.graph.output_node().all_input_nodes[0].name
    axes = [
        sorted({a.dim for s in n.spaces for a in s.features if a.tensor == at}) for n in networks
    ]
    shapes = [n.shapes[at] for n in networks]
    if axes[0] != axes[1] or len(axes[0]) > 1 or (not axes[0] and shapes[0] != shapes[1]):
        raise PairingError(
            f"values of shape {shapes[0]} and {shapes[1]} whose units do not correspond",
            where=f"'{at}', where {networks[0].name} and {networks[1].name} are cut",
            expected="units along one axis, or none that could move and equal shapes",
            do="cut behind another layer",
        )
    return at, axes[0][0] if axes[0] else None


def _same_places(read: csr_array) -> bool:
    same = read.shape[0] == read.shape[1] and read.nnz == read.shape[0]
    return bool(same and (read.diagonal() == 1).all())


def head_spaces(crossing: Crossing) -> Spaces:
    """Find the spaces of a head, the units it reads among them."""
    crossing.source.meta[OPEN] = crossing.dim
    example = crossing.taken(crossing.value), *crossing.inputs
    head = Network.of(crossing.head.name, crossing.head.module, example)
    del crossing.source.meta[OPEN]
    return head.spaces


def reads_alike(crossing: Crossing, module: fx.GraphModule) -> bool:
    """Tell whether a module reads the fused value as the head reads its own."""
    noise = torch.randn(crossing.value.shape, generator=torch.Generator().manual_seed(0))
    noise = (noise * crossing.value.double().std().item()).to(crossing.value)
    try:
        for value in (crossing.value, noise, -noise):
            example = crossing.taken(value), *crossing.inputs
            before = run_once(crossing.head.module, example, crossing.head.name)
            after = run_once(module, (value.clone(), *crossing.inputs), crossing.head.name)
            if relative_error(before, after) > TOLERANCE:
                return False
    except FuseError:
        return False
    return True


# --- three ways to read ---------------------------------------------------------------------------


def folded(crossing: Crossing, spaces: Spaces) -> fx.GraphModule | None:
    """Fold the map into all weights that read the value, if only contractions do."""
    own = crossing.read.shape[0]
    found: dict[tuple[str, int], np.ndarray] = {}
    for space in spaces:
        for feature in (a for a in space.features if a.tensor == crossing.source.name):
            for axis in space.axes:
                once = feature.index.shape[1] == axis.index.shape[1] == axis.groups == 1
                if not (axis.reads and once and spaces.sizes[axis.tensor, axis.dim] == own):
                    return None
                order = found.setdefault((axis.tensor, axis.dim), np.full(own, -1))
                order[feature.index[:, 0]] = axis.index[:, 0]
    weights = dict(crossing.head.module.named_parameters())
    if not found or any(name not in weights for name, _ in found):
        return None
    if any((order < 0).any() for order in found.values()):
        return None
    module, matrix = copy.deepcopy(crossing.head.module), csr_array(crossing.read.T)
    for (name, dim), order in found.items():
        rows = tensor_at(module, name).detach().cpu().numpy().take(order, dim)
        replace_tensor(module, name, apply_along(matrix, rows, dim))
    return module


def permuted(crossing: Crossing, spaces: Spaces) -> fx.GraphModule | None:
    """Move the head's own units as a permutation says, if it moves them within their spaces."""
    read = crossing.read
    if read.shape[0] != read.shape[1] or read.nnz != read.shape[0] or (read.data != 1).any():
        return None
    taken = read.indices  # the head's position i reads the fused position taken[i]
    order, outer = {s.name: np.arange(s.size) for s in spaces}, {s.parent for s in spaces}
    moved = taken != np.arange(len(taken))
    for space in spaces:
        for feature in (a for a in space.features if a.tensor == crossing.source.name):
            unit = np.full(len(taken), -1)
            unit[feature.index] = np.arange(space.size)[:, None]
            goes = unit[taken[feature.index]]
            if (goes != goes[:, :1]).any() or (goes < 0).any():
                return None
            moves = order[space.name] = np.argsort(goes[:, 0])
            inside = space.blocks is None or (space.blocks[moves] == space.blocks).all()
            if space.name in outer or not inside:
                return None
            moved[feature.index] = False
    return None if moved.any() else rearrange(crossing.head.module, spaces, order)


def in_front(crossing: Crossing) -> fx.GraphModule:
    """Return the head with the map in front of it as a linear layer."""
    module = copy.deepcopy(crossing.head.module)
    rank, dim = crossing.value.dim(), crossing.dim
    own, fused = crossing.read.shape
    pointwise = dim == 1 and 3 <= rank <= 5
    swapped = not pointwise and dim != rank - 1
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 3] if pointwise else nn.Linear
    part = nn.utils.skip_init(kind, fused, own, *[1] * pointwise, bias=False)
    weight = torch.from_numpy(crossing.read.toarray()).to(crossing.value)
    part.weight = nn.Parameter(weight.view(part.weight.shape))
    name = "unproject"
    while hasattr(module, name):
        name += "_"
    module.add_submodule(name, part)
    graph = module.graph
    value = source = next(iter(graph.nodes))
    readers = list(value.users)
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        value = graph.call_method("transpose", (value, dim, -1)) if swapped else value
        value = graph.call_module(name, (value,))
        value = graph.call_method("transpose", (value, dim, -1)) if swapped else value
    for reader in readers:
        reader.replace_input_with(source, value)
    module.recompile()
    return module


def grafted(trunk: fx.GraphModule, couplings: Couplings, heads: Sequence[Head]) -> list[Graft]:
    """Let all heads read the fused trunk.

    Args:
        trunk: The fused trunk.
        couplings: The maps of the trunks it was fused from.
        heads: What each model does behind the cut; taken over.
    """
    value = trunk_value(trunk, couplings)
    return [graft(head, couplings, k, value) for k, head in enumerate(heads)]


def trunk_value(trunk: fx.GraphModule, couplings: Couplings) -> Tensor:
    """Return what the fused trunk makes of a few samples."""
    network = couplings.problem.structure
    return run_once(trunk, network.example, f"the trunk of {network.name}")[0]


def attach(
    trunk: fx.GraphModule,
    couplings: Couplings,
    modules: list[fx.GraphModule],
    heads: Sequence[Head],
) -> list[fx.Node]:
    """Put heads behind a trunk, as modules `heads.0`, `heads.1` ...; return the calls of them."""
    graph, value = trunk.graph, trunk_value(trunk, couplings)
    name, output = "heads", graph.output_node()
    while hasattr(trunk, name):
        name += "_"
    trunk.add_submodule(name, nn.ModuleList(modules))
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    example = couplings.problem.structure.example
    calls = []
    with graph.inserting_before(output):
        for k, (module, head) in enumerate(zip(modules, heads)):
            source = output.args[0]
            if len(modules) > 1 and _writes(module, (value, *(example[i] for i in head.inputs))):
                source = graph.call_method("clone", (source,))
            inputs = (source, *(placeholders[i] for i in head.inputs))
            calls.append(graph.call_module(f"{name}.{k}", inputs))
    return calls


def _writes(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> bool:
    """Tell whether a head may write to the value it reads, which the others read too."""
    probe, value = copy.deepcopy(module), inputs[0].clone()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for training in (False, True):
                probe.train(training)(value, *inputs[1:])
    except Exception:
        return True  # a batch of two is too small for some norms in training
    return value._version > 0


def give_back(trunk: fx.GraphModule, value: Any) -> None:
    """Let a network that was cut return what is computed from what it returned."""
    output = trunk.graph.output_node()
    output.args = (value,)
    output.meta.pop(OPEN, None)
    trunk.recompile()


def mixed(trunk: fx.GraphModule, calls: list[fx.Node], matrix: Tensor, dim: int) -> fx.Node:
    """Put a constant matrix `(outputs, outputs of all heads)` behind heads, along one axis."""
    owner = str(calls[0].target).rpartition(".")[0]
    add_part(trunk, f"{owner}.mixing", matrix)
    graph = trunk.graph
    with graph.inserting_before(graph.output_node()):
        joined = graph.call_function(torch.cat, (calls, dim))
        moved = graph.call_function(torch.movedim, (joined, dim, -1))
        mixing = graph.get_attr(f"{owner}.mixing")
        product = graph.call_function(functional.linear, (moved, mixing))
        return graph.call_function(torch.movedim, (product, -1, dim))


def single_layer(module: fx.GraphModule) -> tuple[str, nn.Linear] | None:
    """Return the one linear layer that a head consists of, and its name; None if it is more."""
    calls = [n for n in module.graph.nodes if n.op not in ("placeholder", "output")]
    if len(calls) != 1 or calls[0].op != "call_module":
        return None
    part = module.get_submodule(str(calls[0].target))
    return (str(calls[0].target), part) if type(part) is nn.Linear else None


def one_layer(
    trunk: fx.GraphModule, name: str, layers: list[nn.Linear], mixing: list[Tensor], like: nn.Linear
) -> fx.Node:
    """Put one linear layer behind a trunk that mixes the outputs of several; return its call.

    Args:
        trunk: The trunk.
        name: What the layer is to be called.
        layers: Linear layers that read the trunk.
        mixing: For each, the shares `(outputs, its outputs)`.
        like: One of them, whose modes the new one takes.
    """
    biased = any(x.bias is not None for x in layers)
    whole = nn.utils.skip_init(nn.Linear, like.in_features, len(mixing[0]), bias=biased)
    pairs, trained = list(zip(mixing, layers)), like.weight.requires_grad
    with torch.no_grad():
        weights = [m @ x.weight for m, x in pairs]
        whole.weight = nn.Parameter(sum(weights[1:], weights[0]), trained)
        if biased:
            shifts = [m @ x.bias for m, x in pairs if x.bias is not None]
            whole.bias = nn.Parameter(sum(shifts[1:], shifts[0]), trained)
    trunk.add_submodule(name, whole.train(like.training))
    with trunk.graph.inserting_before(trunk.graph.output_node()):
        return trunk.graph.call_module(name, trunk.graph.output_node().args)


@dataclass(frozen=True)
class Separate:
    """One head per network behind the fused trunk; the result returns a tuple, one entry for each.

    The entries are what the networks return, logits as a rule. To predict over the labels of all
    networks, take the softmax of each entry over its own labels and then the largest of all:
    `torch.cat([y.softmax(-1) for y in fused(x)], -1).argmax(-1)`. Logits of different networks are
    not comparable without it. What a network computes in training mode only is left out.

    The heads are modules `heads.0`, `heads.1` ... with the names of their own networks inside
    (`heads_.0` ... where the trunk has a part called `heads`).

    Attributes:
        after: Qualified name of the layer of the anchor, or of the module whose last layer it is,
            behind which the networks are cut; the others are cut behind the layer aligned with it.
            If not given, each network is cut just before its last layer. With "auto", of the cuts
            that the next two allow, the costliest three are tried, and the one whose heads come
            nearest to their networks on samples held out is taken.
        multiply_adds: With "auto", how many multiply-adds the result may take at most, relative to
            the anchor. At 1 nothing but the last layer is apart; the networks side by side take
            the sum of theirs.
        parameters: With "auto", how many parameters it may have at most, relative to the anchor.

    Example:
        >>> import fxfuse
        >>> def net(labels):
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, labels))
        >>> fused = fxfuse.fuse([net(3), net(5)], torch.randn(64, 4), heads=Separate())
        >>> [tuple(y.shape) for y in fused(torch.randn(2, 4))]
        [(2, 3), (2, 5)]
    """

    after: str | None = None
    multiply_adds: float = math.inf
    parameters: float = math.inf

    def check(self, networks: Sequence[Network]) -> None:
        """Accept any networks: their outputs are handed on as they are."""

    def __call__(
        self,
        trunk: fx.GraphModule,
        couplings: Couplings,
        heads: Sequence[Head],
        modules: list[fx.GraphModule],
    ) -> None:
        """Attach heads to a fused trunk.

        Args:
            trunk: The fused trunk; edited in place.
            couplings: The maps of the trunks it was fused from.
            heads: What each model does behind the cut.
            modules: The same, reading the fused trunk; taken over.
        """
        give_back(trunk, tuple(attach(trunk, couplings, modules, heads)))


@dataclass(frozen=True)
class Union:
    """One output per label that any network knows.

    The logit of a label is the mean of the logits that the networks which know it give it, weighted
    by their shares. Where every head is one linear layer, so is the result, under the name that it
    has in the anchor; otherwise the heads are kept, and a constant matrix `heads.mixing` is behind
    them.

    Attributes:
        labels: For each network, the label of each of its outputs, in order.
        after: Where the networks are cut, as in `Separate`.
        multiply_adds: As in `Separate`.
        parameters: As in `Separate`.
        order: The labels in the order of the fused network's outputs; in the order of their first
            appearance over the networks if not given.

    Example:
        >>> import fxfuse
        >>> def net():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> heads = Union(labels=[["cat", "dog", "owl"], ["owl", "ant", "bee"]])
        >>> fused = fxfuse.fuse([net(), net()], torch.randn(64, 4), heads=heads)
        >>> fused(torch.randn(2, 4)).shape[-1], heads.outputs
        (5, ('cat', 'dog', 'owl', 'ant', 'bee'))
    """

    labels: Sequence[Sequence[Hashable]]
    after: str | None = None
    order: Sequence[Hashable] | None = None
    multiply_adds: float = math.inf
    parameters: float = math.inf

    @property
    def outputs(self) -> tuple[Hashable, ...]:
        """The labels in the order of the fused network's outputs."""
        labels = dict.fromkeys(label for of_network in self.labels for label in of_network)
        return tuple(labels if self.order is None else self.order)

    def check(self, networks: Sequence[Network]) -> None:
        """Refuse labels that are not those of the networks' outputs.

        Raises:
            ArgumentError: Saying which network's labels do not fit.
        """
        if len(self.labels) != len(networks):
            raise _misfit(
                f"labels of {len(self.labels)} networks", "labels", f"those of {len(networks)}"
            )
        for own, network in zip(self.labels, networks):
            count = label_axis(network)[1]
            if len(own) != count or len(set(own)) != count:
                raise _misfit(
                    f"{len(set(own))} different labels, {len(own)} in all",
                    f"labels, {network.name}",
                    f"{count}, one for each output",
                )
        known = {label for own in self.labels for label in own}
        if set(self.outputs) != known or len(self.outputs) != len(known):
            raise _misfit(
                f"an order of {len(self.outputs)} labels",
                "order",
                f"each of the {len(known)} labels of all networks once",
            )
        if len({label_axis(n)[0] for n in networks}) > 1:
            raise _misfit("outputs of different layouts", "labels", "one axis of labels for all")

    def __call__(
        self,
        trunk: fx.GraphModule,
        couplings: Couplings,
        heads: Sequence[Head],
        modules: list[fx.GraphModule],
    ) -> None:
        """Attach heads to a fused trunk.

        Args:
            trunk: The fused trunk; edited in place.
            couplings: The maps of the trunks it was fused from.
            heads: What each model does behind the cut.
            modules: The same, reading the fused trunk; taken over.
        """
        mixing = self._mixing(couplings.problem.weights, trunk_value(trunk, couplings))
        layers = [layer for layer in map(single_layer, modules) if layer is not None]
        lead = (
            couplings.problem.lead
        )  # the anchor, also where a wider trunk has a structure of its own
        taken, dim = dict(trunk.named_modules()), heads[lead].dim
        if len(layers) == len(modules) and layers[lead][0] not in taken:
            name, last = layers[lead]
            whole = one_layer(trunk, name, [x for _, x in layers], mixing, last)
        else:
            calls = attach(trunk, couplings, modules, heads)
            assert dim is not None, "labels lie along one axis"
            whole = mixed(trunk, calls, torch.cat(mixing, 1), dim)
        give_back(trunk, whole)

    def _mixing(self, weights: Sequence[float], like: Tensor) -> list[Tensor]:
        """Return, per network, the shares `(labels, own outputs)` of its outputs in the labels."""
        place = {label: i for i, label in enumerate(self.outputs)}
        found = [torch.zeros(len(place), len(own), dtype=torch.float64) for own in self.labels]
        for matrix, own in zip(found, self.labels):
            matrix[[place[x] for x in own], range(len(own))] = 1.0
        known = torch.stack([m.sum(1) for m in found])
        weights = weights[: len(found)]  # a wider trunk's structure is one network more
        shares = known * torch.tensor(weights, dtype=torch.float64)[:, None]
        shares = torch.where(shares.sum(0) > 0, shares, known)
        shares = shares / shares.sum(0)
        return [(m * s[:, None]).to(like) for m, s in zip(found, shares)]


Heads = Separate | Union


def require_heads(heads: Heads, networks: Sequence[Network]) -> None:
    """Refuse heads that are of another type, or do not fit the networks.

    Raises:
        ArgumentError: Saying what does not fit.
    """
    if not isinstance(heads, Separate | Union):
        raise ArgumentError(
            f"heads {heads!r}",
            where="the argument `heads`",
            expected="fxfuse.heads.Separate(...) or fxfuse.heads.Union(labels=[...])",
            do="leave it out to fuse networks with the same outputs",
        )
    if heads.after == AUTO and math.isinf(heads.multiply_adds) and math.isinf(heads.parameters):
        raise ArgumentError(
            "a cut to be chosen without a limit of what the result may cost",
            where="the argument `heads`, after='auto'",
            expected="heads.Separate(after='auto', multiply_adds=1.5), or parameters=",
            do="give one, relative to the anchor network; without a limit nothing need be fused",
        )
    heads.check(networks)


def label_axis(network: Network) -> tuple[int, int]:
    """Return the axis of a network's outputs, of which each is one label, and how many there are.

    Raises:
        ArgumentError: If the network returns several tensors, or none with such an axis.
    """
    dim, returned = output_axis(network), network.module.graph.output_node()
    value = returned.args[0]
    if dim is None or not isinstance(value, fx.Node):
        raise ArgumentError(
            "outputs that are not one tensor with an axis of units that a layer writes",
            where=f"the argument `heads`, {network.name}, which returns {value}",
            expected="one tensor of logits, to give each output a label",
            do="use fxfuse.heads.Separate, which hands on whatever each network returns",
        )
    return dim, network.shapes[value.name][dim]


def _misfit(met: str, where: str, expected: str) -> ArgumentError:
    return ArgumentError(
        met,
        where=f"the argument `heads`, {where}",
        expected=expected,
        do="give for each network, in order, the label of each of its outputs, each once",
    )
