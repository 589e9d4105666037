"""What networks of different tasks end in: a head for each of them, or one for all their labels.

The networks are fused up to a layer (`cutting`); behind it, each head reads the fused trunk through
the unproject map of its own network (`grafting`, `attaching`).

References:
    Stoica et al. 2024 (ZipIt), partial zip: merged trunk, one head per task.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .attaching import attach, give_back, grafted, mixed, one_layer, single_layer, trunk_value
from .cutting import Head, output_axis
from .errors import ArgumentError
from .mixing import Mixer
from .network import Network


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
            If not given, each network is cut just before its last layer.

    Example:
        >>> import fxfuse
        >>> def net(labels):
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, labels))
        >>> fused = fxfuse.fuse([net(3), net(5)], torch.randn(64, 4), heads=Separate())
        >>> [tuple(y.shape) for y in fused(torch.randn(2, 4))]
        [(2, 3), (2, 5)]
    """

    after: str | None = None

    def check(self, networks: Sequence[Network]) -> None:
        """Accept any networks: their outputs are handed on as they are."""

    def __call__(
        self,
        trunk: fx.GraphModule,
        mixer: Mixer,
        heads: Sequence[Head],
        models: Sequence[nn.Module],
    ) -> tuple[str, ...]:
        """Attach the heads of some models to their fused trunk; return how each reads it.

        Args:
            trunk: The fused trunk; edited in place.
            mixer: The trunks it was fused from.
            heads: What each model does behind the cut; taken over.
            models: The models, for their modes.
        """
        modules, notes = grafted(trunk, mixer, heads, models)
        give_back(trunk, tuple(attach(trunk, mixer, modules, heads)))
        return notes


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

    @property
    def outputs(self) -> tuple[Hashable, ...]:
        """The labels in the order of the fused network's outputs."""
        found = dict.fromkeys(label for own in self.labels for label in own)
        return tuple(found if self.order is None else self.order)

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
        mixer: Mixer,
        heads: Sequence[Head],
        models: Sequence[nn.Module],
    ) -> tuple[str, ...]:
        """Attach the heads of some models to their fused trunk; return how each reads it.

        Args:
            trunk: The fused trunk; edited in place.
            mixer: The trunks it was fused from.
            heads: What each model does behind the cut; taken over.
            models: The models, for their modes.
        """
        modules, notes = grafted(trunk, mixer, heads, models)
        mixing = self._mixing(mixer.weights, trunk_value(trunk, mixer))
        layers = [layer for layer in map(single_layer, modules) if layer is not None]
        taken, dim = dict(trunk.named_modules()), heads[mixer.anchor].dim
        if len(layers) == len(modules) and layers[mixer.anchor][0] not in taken:
            name, last = layers[mixer.anchor]
            whole = one_layer(trunk, name, [x for _, x in layers], mixing, last)
        else:
            calls = attach(trunk, mixer, modules, heads)
            assert dim is not None, "labels lie along one axis"
            whole = mixed(trunk, calls, torch.cat(mixing, 1), dim)
        give_back(trunk, whole)
        return notes

    def _mixing(self, weights: Sequence[float], like: Tensor) -> list[Tensor]:
        """Return, per network, the shares `(labels, own outputs)` of its outputs in the labels."""
        place = {label: i for i, label in enumerate(self.outputs)}
        found = [torch.zeros(len(place), len(own), dtype=torch.float64) for own in self.labels]
        for matrix, own in zip(found, self.labels):
            matrix[[place[x] for x in own], range(len(own))] = 1.0
        known = torch.stack([m.sum(1) for m in found])
        shares = known * torch.tensor(weights, dtype=torch.float64)[:, None]
        shares = torch.where(shares.sum(0) > 0, shares, known)
        shares = shares / shares.sum(0)
        return [(m * s[:, None]).to(like) for m, s in zip(found, shares)]


Heads = Separate | Union


def require_heads(heads: Heads | None, networks: Sequence[Network]) -> None:
    """Refuse a choice of heads that is none, or does not fit the networks.

    Raises:
        ArgumentError: Saying what does not fit.
    """
    if heads is None:
        return
    if not isinstance(heads, Separate | Union):
        raise ArgumentError(
            f"heads {heads!r}",
            where="the argument `heads`",
            expected="fxfuse.heads.Separate(...) or fxfuse.heads.Union(labels=[...])",
            do="leave it out to fuse networks with the same outputs",
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
    return dim, network.book.shapes[value.name][dim]


def _misfit(met: str, where: str, expected: str) -> ArgumentError:
    return ArgumentError(
        met,
        where=f"the argument `heads`, {where}",
        expected=expected,
        do="give for each network, in order, the label of each of its outputs, each once",
    )
