"""Let a network's head read the fused trunk, through the unproject map of the value it was cut at.

The map is folded into the contractions that read this value, where nothing else does; a permutation
is carried through the head, whose own units move along; otherwise the map stands in front of the
head as a linear layer. Whether a head still computes the same is tried out on signed noise, which
tells a linear step from any other.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, fx, nn

from .checks import TOLERANCE, relative_error, sizes_of
from .cutting import Head
from .errors import FuseError, PairingError
from .interpreter import OPEN, label_network
from .ir import Spaces
from .mixing import Mixer, apply_along
from .spaces import rearrange
from .ties import spaces_of
from .tracing import run_once


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
        own = apply_along(self.read, value.detach().cpu().numpy(), self.dim)
        return torch.from_numpy(np.ascontiguousarray(own)).to(value)

    @property
    def source(self) -> fx.Node:
        """The node by which the head takes the value."""
        found: fx.Node = next(iter(self.head.module.graph.nodes))
        return found


def graft(head: Head, mixer: Mixer, k: int, value: Tensor) -> tuple[fx.GraphModule, str]:
    """Let the head of network `k` read the fused trunk.

    Args:
        head: The head; its module may be taken over.
        mixer: The trunks and their couplings.
        k: Which network's head it is.
        value: What the fused trunk returns for the anchor's example.

    Returns:
        The head's module for the fused value, and how it reads it.

    Raises:
        PairingError: If the values at the cuts cannot be mapped to each other.
    """
    at, dim = _axis(mixer, k)
    head.module.to(value if value.is_floating_point() else value.device)
    if dim is None:
        return head.module, "as it is"
    read = mixer.reading_map(at, dim, k)
    if _same_places(read):
        return head.module, "as it is"
    example = mixer.balanced.networks[mixer.anchor].example
    crossing = Crossing(head, value, tuple(example[i] for i in head.inputs), dim, read)
    spaces = head_spaces(crossing)
    for how, made in (("folded into its weights", folded), ("its own units moved", permuted)):
        module = made(crossing, spaces)
        if module is not None and reads_alike(crossing, module):
            return module, how
    return in_front(crossing), "through a linear map"


def _axis(mixer: Mixer, k: int) -> tuple[str, int | None]:
    """Return the node at which balanced trunks end, and the axis of its units, if it has such."""
    networks = [mixer.balanced.networks[i] for i in (mixer.anchor, k)]
    at = networks[0].module.graph.output_node().all_input_nodes[0].name
    axes = [
        sorted({a.dim for s in n.spaces for a in s.features if a.tensor == at}) for n in networks
    ]
    shapes = [n.book.shapes[at] for n in networks]
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
    spaces = spaces_of(label_network(crossing.head.module, example))
    del crossing.source.meta[OPEN]
    return spaces


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
        own = module.get_parameter(name).detach().cpu().numpy().take(order, dim)
        _replace(module, name, apply_along(matrix, own, dim))
    return module


def _replace(module: fx.GraphModule, name: str, values: np.ndarray) -> None:
    owner, _, leaf = name.rpartition(".")
    part, old = module.get_submodule(owner), module.get_parameter(name)
    new = torch.from_numpy(np.ascontiguousarray(values)).to(old)
    setattr(part, leaf, nn.Parameter(new, old.requires_grad))
    for size, count in sizes_of(part).items():
        setattr(part, size, count)


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
            there = order[space.name] = np.argsort(goes[:, 0])
            inside = space.blocks is None or (space.blocks[there] == space.blocks).all()
            if space.name in outer or not inside:
                return None
            moved[feature.index] = False
    return None if moved.any() else rearrange(crossing.head.module, spaces, order)


def in_front(crossing: Crossing) -> fx.GraphModule:
    """Put the map in front of a head as a linear layer, in place."""
    module, rank, dim = crossing.head.module, crossing.value.dim(), crossing.dim
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
    graph, value = module.graph, crossing.source
    readers = list(value.users)
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        value = graph.call_method("transpose", (value, dim, -1)) if swapped else value
        value = graph.call_module(name, (value,))
        value = graph.call_method("transpose", (value, dim, -1)) if swapped else value
    for reader in readers:
        reader.replace_input_with(crossing.source, value)
    module.recompile()
    return module
