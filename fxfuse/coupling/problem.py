"""What is to be solved: networks of one structure, which spaces correspond, and their weights.

A problem holds all that depends on the networks and the caller's choices alone. Coupling methods
read it, together with what was measured on the data, and return couplings; nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import numpy as np

from ..calibration.norms import foldable_norms
from ..depth import AbsentLayer
from ..depth.deepen import Balanced
from ..errors import PairingError
from ..ir import Signature, Space
from ..spaces.network import Network
from .guests import Guest

FAR_WIDER = 3.0  # times the units of the anchor


@dataclass(frozen=True, eq=False)
class Problem:
    """Networks of one structure that are to become one.

    Attributes:
        networks: The balanced networks, equal node for node and name for name.
        absent: Per network, the layers that it has only as neutral ones.
        anchor: Index of the network whose structure, names and widths the fused network takes.
        lead: Index of the network whose units the fused units are, where it has them.
        spaces: Name of a space, as the anchor calls it -> that space in each network; of size 0
            where a network has none in these places.
        present: Name of a space -> whether each network really has it.
        base: Name of a space -> the network whose units the fused units are.
        weights: `(networks,)` shares in every unit, sum 1.
        output_weights: `(networks,)` shares of the networks' outputs in what the fused network is
            to return, sum 1.
        absent_as_zero: Whether layers that a network has only as neutral ones count as zeros; if
            not, the other networks share these layers out among themselves.
        guests: Networks of another structure; what they count, the others count less.
    """

    networks: tuple[Network, ...]
    absent: tuple[tuple[AbsentLayer, ...], ...]
    anchor: int
    lead: int
    spaces: dict[str, tuple[Space, ...]]
    present: dict[str, tuple[bool, ...]]
    base: dict[str, int]
    weights: tuple[float, ...]
    output_weights: tuple[float, ...]
    absent_as_zero: bool = False
    guests: tuple[Guest, ...] = ()

    @classmethod
    def of(
        cls,
        balanced: Balanced,
        anchor: int,
        weights: Sequence[float],
        absent_as_zero: bool = False,
    ) -> Problem:
        """Match the spaces of balanced networks by the places of their units.

        Args:
            balanced: Networks of one structure.
            anchor: Index of the network whose structure the fused one takes.
            weights: `(networks,)` shares, sum 1, in units and outputs alike.
            absent_as_zero: Whether layers that a network has only as neutral ones count as zeros.

        Raises:
            PairingError: If a network lacks a space, or two fixed axes differ in size.
        """
        networks = _with_single_units(balanced.networks)
        spaces, present, base = _corresponding(networks, balanced.absent, anchor)
        shares = tuple(weights)
        return cls(
            networks=networks,
            absent=balanced.absent,
            anchor=anchor,
            lead=anchor,
            spaces=spaces,
            present=present,
            base=base,
            weights=shares,
            output_weights=shares,
            absent_as_zero=absent_as_zero,
        )

    @classmethod
    def between(cls, network: Network, like: Network) -> Problem:
        """Match a network's spaces with those of the anchor, whose widths its tensors are to take.

        The anchor is of the same structure, and has no share.
        """
        balanced = Balanced((network, like), ((), ()), (0.0, 0.0))
        return cls.of(balanced, anchor=1, weights=(1.0, 0.0))

    @property
    def structure(self) -> Network:
        """The anchor: the network whose structure the fused one takes."""
        return self.networks[self.anchor]

    @cached_property
    def unread(self) -> set[str]:
        """The spaces that no weight reads: two activations are multiplied there, unit by unit.

        Queries meet keys: no map on the reading side can undo what a map does to them.
        """
        parents = {s.parent for spaces in self.spaces.values() for s in spaces}
        return {
            name
            for name, spaces in self.spaces.items()
            if any(s.axes for s in spaces)
            and not parents.intersection(s.name for s in spaces)
            and not any(axis.reads for s in spaces for axis in s.axes)
        }

    @cached_property
    def far_wider(self) -> tuple[bool, ...]:
        """Whether each network has at least `FAR_WIDER` times the anchor's units.

        As a geometric mean over the spaces: the mean of so many units is none of them.
        """
        sizes = [[max(s.size, 1) for s in spaces] for spaces in self.spaces.values()]
        logs = np.log(np.array(sizes, dtype=float).reshape(-1, len(self.networks)))
        wider = (logs - logs[:, [self.anchor]]).sum(0)
        return tuple(bool(w >= len(sizes) * np.log(FAR_WIDER) > 0) for w in wider)

    def base_space(self, name: str) -> Space:
        """Return a space of the network whose units the fused units are."""
        return self.spaces[name][self.base[name]]

    def led_by(self, k: int) -> Problem | None:
        """Return the same problem in the units of another network, where it has them.

        None if a space of it differs in size, as the widths of the fused network are given.
        """
        names = [name for name, present in self.present.items() if present[k]]
        if any(self.spaces[name][k].size != self.base_space(name).size for name in names):
            return None
        return replace(self, base=self.base | dict.fromkeys(names, k), lead=k)

    def weighted(self, weights: Sequence[float]) -> Problem:
        """Return the same problem with other shares in the units; those of the outputs stay."""
        return replace(self, weights=tuple(weights))

    def shares(self, name: str) -> list[float]:
        """Return each network's share of a tensor: of those that have it, unless absent is zero."""
        present = [name not in lacking for lacking in self.lacking]
        if self.absent_as_zero:
            return [w if has else 0.0 for has, w in zip(present, self.weights)]
        return self.among(present)

    def among(self, present: Sequence[bool]) -> list[float]:
        """Return each network's share of what only some of them have; equal if none has weight."""
        shares = [w if has else 0.0 for has, w in zip(present, self.weights)]
        if not any(shares):
            shares = [float(has) for has in present]
        return [s / sum(shares) for s in shares]

    @cached_property
    def lacking(self) -> tuple[set[str], ...]:
        """Per network, the tensors of layers that it has in name only (see `absent_tensors`)."""
        return tuple(absent_tensors(n, a) for n, a in zip(self.networks, self.absent))


def _with_single_units(networks: Sequence[Network]) -> tuple[Network, ...]:
    """Return networks with a space of one unit in the places where another has several."""
    return tuple(reduce(Network.with_single_units, networks, network) for network in networks)


def _corresponding(
    networks: Sequence[Network], absent: Sequence[Sequence[AbsentLayer]], anchor: int
) -> tuple[dict[str, tuple[Space, ...]], dict[str, tuple[bool, ...]], dict[str, int]]:
    """Return, by the anchor's name: the space in each network, who has it, and whose units lead."""
    by_places = [_by_places(n) for n in networks]
    lacking = [absent_tensors(n, a) for n, a in zip(networks, absent)]
    ours = networks[anchor]
    spaces = {
        s.name: tuple(
            _same_space(s, ours, n, p) or Space(s.name, 0, ()) for n, p in zip(networks, by_places)
        )
        for s in ours.spaces
    }
    _require_common_ground(networks, anchor, spaces)
    contracted = {t for names in ours.weights.values() for t in names}
    present = {}
    for space in ours.spaces:
        if space.axes:
            written = {a.tensor for a in space.axes if not a.reads}
            written = written & contracted or written
            present[space.name] = tuple(  # written by anything but layers in name only
                same.size > 0 and (not written or not written <= absent_ones)
                for same, absent_ones in zip(spaces[space.name], lacking)
            )
    for space in ours.spaces:
        inside = [present[s.name] for s in ours.spaces if s.parent == space.name and s.axes]
        present.setdefault(space.name, tuple(any(column) for column in zip(*inside)))
    base = {}
    for name, same in spaces.items():
        having = [k for k, s in enumerate(same) if present[name][k] and s.size == same[anchor].size]
        base[name] = anchor if present[name][anchor] or not having else having[0]
    _require_equal_sizes(networks, anchor)
    return spaces, present, base


def _require_common_ground(
    networks: Sequence[Network], anchor: int, spaces: dict[str, tuple[Space, ...]]
) -> None:
    """Refuse networks most of whose units lie in places that another does not have.

    Some units may: where streams are cut and interleaved many times (channel shuffle), the pieces
    of streams of different widths do not all correspond.
    """
    ours = networks[anchor]
    total = sum(s.size for s in ours.spaces)
    for k, network in enumerate(networks):
        lost = [s for s in ours.spaces if not spaces[s.name][k].size]
        if 2 * sum(s.size for s in lost) > total:
            places = ", ".join(sorted(f"{x.tensor}[{x.dim}]" for x in lost[0].axes)[:4])
            raise PairingError(
                f"a space of {ours.name} that {network.name} does not have",
                where=f"space '{lost[0].name}' on {places}",
                expected="networks whose units lie in the same places once their depths are equal",
                do="compare fxfuse.find_spaces(...) of both; residual streams must agree in kind",
            )


def _by_places(network: Network) -> dict[Signature, list[Space]]:
    by_places: dict[Signature, list[Space]] = {}
    for space in network.spaces:
        by_places.setdefault(space.signature, []).append(space)
    return by_places


def _same_space(
    space: Space, ours: Network, theirs: Network, by_places: dict[Signature, list[Space]]
) -> Space | None:
    """Find a space by its places; one without axes (of blocks) by a space inside it.

    Spaces in the same places (the insides of fixed blocks) correspond in order.
    """
    if space.axes:
        names = [s.name for s in ours.spaces if s.signature == space.signature]
        same = by_places.get(space.signature, [])
        return same[names.index(space.name)] if len(same) == len(names) else None
    inside = next((s for s in ours.spaces if s.parent == space.name), None)
    other = inside and _same_space(inside, ours, theirs, by_places)
    return theirs.spaces[other.parent] if other and other.parent else None


def absent_tensors(network: Network, absent: Sequence[AbsentLayer]) -> set[str]:
    """Return the parameters and buffers of layers that a network has in name only.

    What was set to zero to silence such a layer is not among them, nor the weights that a zeroed
    norm is folded into: that the network adds nothing there counts.
    """
    silent = {t for a in absent for t in a.zeroed}
    folded = foldable_norms(network)
    for norm, roles in network.norms.items():
        of_norm = {t for t in roles.values() if isinstance(t, str)}
        if silent & of_norm:
            silent |= of_norm | set(network.tensors.get(folded.get(norm, ""), ()))
    return foreign_tensors(network, absent) - silent


def foreign_tensors(network: Network, absent: Sequence[AbsentLayer]) -> set[str]:
    """Return all parameters and buffers of layers that a network has in name only."""
    nodes = {node for a in absent for node in a.foreign}
    touched = {t for node in nodes for t in network.tensors.get(node, ())}
    return touched - {t for n, ts in network.tensors.items() if n not in nodes for t in ts}


def _require_equal_sizes(networks: Sequence[Network], anchor: int) -> None:
    free = {(a.tensor, a.dim) for s in networks[anchor].spaces for a in s.axes}
    ours = networks[anchor].spaces.sizes
    for network in networks:
        for key, size in network.spaces.sizes.items():
            if key not in free and ours.get(key) != size:
                fixed = [f for f in network.spaces.frozen if (f.tensor, f.dim) == key]
                why = f", fixed at '{fixed[0].node}': {fixed[0].reason}" if fixed else ""
                raise PairingError(
                    f"an axis that must stay in place, of size {ours.get(key)} and {size}{why}",
                    where=f"'{key[0]}' axis {key[1]} of {networks[anchor].name} and {network.name}",
                    expected="the same kernel, input, output and position sizes in all networks, "
                    "and free units where widths differ",
                    do="give both this size, keep what these units meet in the state (a parameter, "
                    "a persistent buffer), or let the other network count in targets only: "
                    "fuse(..., across=True)",
                )
