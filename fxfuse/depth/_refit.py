"""Refit a layer next to removed ones by least squares, to the values of the original network.

1. Removed plain layers are made up for by the next layer. It is refitted to its pre-activation in
   the original network, from its present inputs.
2. Removed blocks are made up for by the block before them. Its branch is refitted to add what it
   and the removed blocks added together.

If one of the two is impossible, the other is tried. Layers that follow are then refitted to their
original values too, which makes up for some of the error that is left.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..alignment.layers import describe
from ..calibration.affine import Affine, Producer, read_producer, restate, write_producer
from ..calibration.data import Calibration
from ..calibration.least_squares import AffineFit
from ..calibration.run import record
from ..errors import DataError
from ..graph.compare import TOLERANCE
from ..ir import Layer
from ..spaces.network import Network
from ._neutral import apply_activation
from ._removal import (
    MergeIntoNext,
    Removal,
    Unsuitable,
    WorkingCopy,
    cannot_remove,
    fitted_line,
    fitted_line_through_zero,
)

FIT_BYTES, FIT_SAMPLES = 1 << 28, 128  # of the patches of one batch

LARGEST = 1 << 13  # inputs of a contraction that is refitted only to make up for others


@dataclass(frozen=True)
class RefitNeighbour:
    """Refits a layer next to the removed ones, and layers that follow; a `Strategy`.

    The fit is drawn to the present weights in a block. In a plain layer it is drawn to those of a
    merge through straight lines, where that is possible.

    Attributes:
        data: What is fitted on.
        ridge: How strongly, see `least_squares.AffineFit.solve`.
        rounds: How often to fit again to targets that are easier to reach. A ReLU maps -1 and -2 to
            the same, so a further round aims at the one that is nearer to the last fit.
        reach: How many of the layers that follow are refitted.
    """

    data: Calibration
    ridge: float = 1e-3
    rounds: int = 1
    reach: int = 4

    def __call__(self, network: WorkingCopy, removal: Removal) -> None:
        """Remove the layers and refit.

        Raises:
            PassError: If no neighbour can be refitted.
        """
        choices, reasons = [self._refit_next, self._refit_previous], []
        if removal.last.branched:
            choices.reverse()
        for refit in choices:
            try:
                refit(network, removal)
            except Unsuitable as error:
                reasons.append(str(error))
                continue
            left = removal.following[1:] if refit == self._refit_next else removal.following
            for layer in left[: self.reach]:
                with suppress(Unsuitable):
                    self._correct(network, layer)
            return
        do = "give an alignment in which they are matched, or fuse without Shorten()"
        raise cannot_remove(network.original, removal, reasons, do)

    def _refit_next(self, network: WorkingCopy, removal: Removal) -> None:
        """Remove the layers, and refit the next one to its original values."""
        original, layer = network.original, removal.behind
        if layer is None:
            raise Unsuitable("no layer behind")
        site, shapes = find_site(original, layer), original.shapes
        ends = [(shapes[p[0].entry], shapes[p[-1].nodes[-1]]) for p in removal.pieces]
        if layer.branched and any(before != after for before, after in ends):
            reason = f"'{layer.name}' is a block, and without them reads values of another shape"
            raise Unsuitable(reason)
        prior: Affine | None = site.producer.affine
        if site.branch is None:
            gate = fitted_line if site.producer.biased else fitted_line_through_zero
            prior = None
            with suppress(Unsuitable):
                prior = MergeIntoNext(gate, self.data).merged(network, removal)[1]
        with network.without(removal):
            self._fit(network, site, site.output, _activation(original, layer, site.output), prior)

    def _refit_previous(self, network: WorkingCopy, removal: Removal) -> None:
        """Refit the layer before to the values of the last removed layer, and remove the layers."""
        original, layer, last = network.original, removal.before, removal.last
        if layer is None or len(removal.pieces) > 1:
            raise Unsuitable("no layer directly before")
        site = find_site(original, layer)
        producer = network.producer(last)
        target = producer.joint if producer else last.merge
        _require_alike(original, removal, layer, site, target)
        prior = None if site.branch is None else site.producer.affine
        self._fit(network, site, target, _activation(original, last, target), prior)
        behind = nodes_behind(original, last, target)
        if any(n.name in original.tensors for n in behind):
            network.redirect(target, site.output)  # the norm behind the last removed sum stays
        else:
            network.redirect(last.nodes[-1], layer.nodes[-1])

    def _correct(self, network: WorkingCopy, layer: Layer) -> None:
        """Refit a layer that stays to its original values."""
        site = find_site(network.original, layer)
        if site.producer.affine.weight[0].numel() <= LARGEST:
            activation = _activation(network.original, layer, site.output)
            self._fit(network, site, site.output, activation, site.producer.affine)

    def _fit(
        self,
        network: WorkingCopy,
        site: RefitSite,
        target: str,
        activation: fx.Node | None,
        prior: Affine | None,
    ) -> None:
        """Refit a layer so that its output has the values of a node of the original network.

        Args:
            network: The copy is edited.
            site: Where the layer is refitted.
            target: The node of the original.
            activation: The activation behind it; None if there is something else.
            prior: What the fit is drawn to; zero if not given.

        Raises:
            Unsuitable: If the layer reads values of another shape, or the network does not run.
        """
        original, edited = network.original, network.edited
        producer, affine = site.producer, site.producer.affine
        reads = edited.inputs_of(network.node(producer.node))[0].name
        try:
            x = record(edited, edited.example, {reads: lambda v: v})[reads]
        except DataError as error:
            reason = f"without them the network does not run ({error.met})"
            raise Unsuitable(reason) from error
        shape = original.shapes[target]
        if not _gives_shape(affine, x, shape):
            raise Unsuitable(f"'{producer.node}' would read values of another shape")
        size = max(1, min(FIT_SAMPLES, FIT_BYTES // (8 * _patch_size(affine, x, shape))))
        fitted, skips = prior if self.rounds else None, _skips(network, site)
        for _ in range(1 + (activation is not None) * self.rounds):
            fit = AffineFit(affine, prior, producer.biased)
            for batch in self.data.chunks(size):
                wanted = record(original, batch, {target: Tensor.double})[target]
                values = record(edited, batch, dict.fromkeys([reads, *skips], Tensor.double))
                skip = sum(values[name] for name in skips)
                if activation is not None and fitted is not None:
                    given = fitted(values[reads]) + skip
                    wanted = _nearest_equivalent(original, activation, wanted, given)
                fit.add(values[reads], wanted - skip)
            fitted = fit.solve(self.ridge)
        assert fitted is not None, "fitted once at least"
        write_producer(edited, producer, fitted)
        restate(edited, producer, self.data)


# --- where a layer can be refitted ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RefitSite:
    """Where a layer can be refitted.

    Attributes:
        producer: The contraction.
        output: The node that is fitted: in a block the sum, in a plain layer the producer's output.
        branch: In a block, the node that is added to the skip; None in a plain layer.
    """

    producer: Producer
    output: str
    branch: str | None = None


def find_site(network: Network, layer: Layer) -> RefitSite:
    """Return where a layer can be refitted.

    Raises:
        Unsuitable: If it is no single contraction, and no sum of a branch and a skip either.
    """
    nodes = network.nodes
    if not layer.branched:
        producer = read_producer(network, nodes[layer.merge])
        if producer is None:
            raise Unsuitable(f"'{layer.name}' is no single contraction")
        return RefitSite(producer, producer.joint)
    merge = nodes[layer.merge]
    parts = network.inputs_of(merge)
    sites: list[tuple[int, RefitSite]] = []
    for part in parts if len(parts) == 2 else ():
        producer = _end_of_branch(network, part, layer)
        if producer is not None:
            depth = len(_upstream(part, layer) & set(layer.producers))
            sites.append((depth, RefitSite(producer, layer.merge, part.name)))
    # a skip may end in a contraction, too: the branch is the part with more of them, or the second
    site = max(reversed(sites), key=lambda pair: pair[0])[1] if sites else None
    if site is None or not _adds(network, merge, site):
        raise Unsuitable(
            f"'{layer.name}' is no sum of a branch that ends in one contraction, and a skip"
        )
    return site


def nodes_behind(network: Network, layer: Layer, name: str) -> list[fx.Node]:
    """Return the nodes of a layer behind one of them, without those that do nothing."""
    nodes = network.nodes
    behind = [nodes[n] for n in layer.nodes[layer.nodes.index(name) + 1 :]]
    return [n for n in behind if not network.is_idle(n)]


def _end_of_branch(network: Network, node: fx.Node, layer: Layer) -> Producer | None:
    """Return the contraction in which a branch ends, a norm behind it included."""
    while network.is_idle(node) and len(node.users) == 1 and node.name in layer.nodes:
        node = network.inputs_of(node)[0]
    end = node
    if node.name in network.norms:
        node = network.inputs_of(node)[0]
    alone = node.name in layer.nodes and len(end.users) == len(node.users) == 1
    producer = read_producer(network, node) if alone else None
    return producer if producer is not None and producer.joint == end.name else None


def _upstream(node: fx.Node, layer: Layer) -> set[str]:
    """Return the nodes of a layer that a node depends on, itself included."""
    names, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node.name in layer.nodes and node.name not in names:
            names.add(node.name)
            waiting += node.all_input_nodes
    return names


def _adds(network: Network, merge: fx.Node, site: RefitSite) -> bool:
    """Tell whether a block's value is the sum of branch and skip, on the network's example."""
    skip_node = next(n for n in network.inputs_of(merge) if n.name != site.branch)
    names = [merge.name, site.producer.joint, skip_node.name]
    values = record(network, network.example, dict.fromkeys(names, Tensor.double))
    whole, branch, skip = (values[n] for n in names)
    if not whole.shape == branch.shape == skip.shape:
        return False
    return bool((whole - branch - skip).abs().max() <= TOLERANCE * whole.abs().max())


def _require_alike(
    network: Network, removal: Removal, layer: Layer, site: RefitSite, target: str
) -> None:
    """Refuse a layer that cannot take the place of the last removed one.

    Raises:
        Unsuitable: If what follows their contractions differs, or the shapes of their values.
    """
    if layer.nodes[-1] != removal.pieces[0][0].entry:
        raise Unsuitable(f"steps such as pooling lie behind '{layer.name}'")
    ends = (layer, site.output), (removal.last, target)
    before, last = ([describe(network, n) for n in nodes_behind(network, *end)] for end in ends)
    if before != last:
        raise Unsuitable(f"'{layer.name}' has another activation")
    shape, wanted = network.shapes[site.output], network.shapes[target]
    if site.branch is None and site.producer.affine.groups == 1:  # its width may change
        axis = site.producer.axis % len(shape)
        shape, wanted = (s[:axis] + s[axis + 1 :] for s in (shape, wanted))
    if shape != wanted:
        raise Unsuitable(f"'{layer.name}' gives values of another shape")


def _skips(network: WorkingCopy, site: RefitSite) -> list[str]:
    """Return the nodes added to a block's branch in the copy; none in a plain layer."""
    if site.branch is None:
        return []
    parts = network.edited.inputs_of(network.node(site.output))
    return [n.name for n in parts if n.name != site.branch]


def _activation(network: Network, layer: Layer, name: str) -> fx.Node | None:
    """Return the activation behind one of a layer's nodes, if there is nothing else."""
    behind = nodes_behind(network, layer, name)
    return behind[0] if len(behind) == 1 and network.is_activation(behind[0]) else None


# --- values and shapes ------------------------------------------------------------------------


def _nearest_equivalent(
    network: Network, activation: fx.Node, wanted: Tensor, given: Tensor
) -> Tensor:
    """Return values that an activation maps to the same as the wanted ones, near to given ones.

    A rectifier maps -1 and -2 to the same: a fit that gives -1 need not aim at -2.

    Args:
        network: The network of the activation.
        activation: Its node.
        wanted: The wanted values.
        given: The values to be near to. The result is the nearest of the wanted values, what they
            are mapped to, and the given values themselves.
    """
    image = apply_activation(network, activation, wanted)
    nearest = wanted
    for other in (image, given):
        same = apply_activation(network, activation, other) == image
        nearer = (other - given).abs() < (nearest - given).abs()
        nearest = torch.where(same & nearer, other, nearest)
    return nearest


def _gives_shape(affine: Affine, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Tell whether a map of an input has outputs of a shape, the number of units left out."""
    if not affine.kernel:
        return x.shape[:-1] == shape[:-1]
    if x.dim() != affine.weight.dim() or affine.groups > 1 and x.shape[1] != affine.inputs:
        return False
    return affine.output_sizes(tuple(x.shape[2:])) == shape[2:]


def _patch_size(affine: Affine, x: Tensor, shape: tuple[int, ...]) -> int:
    """Return how many numbers the patches of one sample hold."""
    if not affine.kernel:
        return math.prod(x.shape[1:])
    return math.prod(shape[2:]) * x.shape[1] * math.prod(affine.kernel)
