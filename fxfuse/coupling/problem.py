"""What is to be solved: networks of one structure, which spaces correspond, and who has a say.

A problem is all that depends on the networks and the caller's choices alone. Coupling methods read
it, together with what was measured on the data, and return couplings; nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..calibration.norms import foldable_norms
from ..depth import AbsentLayer
from ..depth.deepen import Balanced
from ..errors import PairingError
from ..ir import Signature, Space
from ..spaces.network import Network


@dataclass(frozen=True, eq=False)
class Problem:
    """Networks of one structure that are to become one.

    Attributes:
        networks: The balanced networks, equal node for node and name for name.
        absent: Per network, the layers that it has only as neutral ones.
        anchor: Index of the network whose structure, names and widths the fused network takes.
        lead: Index of the network whose units the fused units are, wherever it has them.
        spaces: Name of a space, as the anchor calls it -> that space in each network; of size 0
            where a network has none in these places.
        present: Name of a space -> whether each network really has it.
        base: Name of a space -> the network whose units the fused units are.
        weights: `(networks,)` shares in every unit, sum 1.
        output_weights: `(networks,)` shares of the networks' outputs in what the fused network is
            to give, sum 1.
        absent_as_zero: Whether layers that a network has only as neutral ones count as zeros, not
            as layers of which the other networks alone have a say.
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
            absent_as_zero: Whether layers that a network lacks count as zeros.

        Raises:
            PairingError: If a network lacks a space, or two fixed axes differ in size.
        """
        networks = balanced.networks
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
        """Match the spaces of a network with those of one of the same structure, the anchor.

        The first has the only say; this is for carrying its tensors to other widths.
        """
        balanced = Balanced((network, like), ((), ()), (0.0, 0.0))
        return cls.of(balanced, anchor=1, weights=(1.0, 0.0))

    @property
    def structure(self) -> Network:
        """The anchor: the network whose structure the fused one takes."""
        return self.networks[self.anchor]

    def led_by(self, k: int) -> Problem | None:
        """Return the same in the units of another network, wherever it has them.

        None if it has more or fewer of them anywhere, as the fused network's widths are given.
        """
        theirs = [name for name, present in self.present.items() if present[k]]
        for name in theirs:
            spaces = self.spaces[name]
            if spaces[k].size != spaces[self.base[name]].size:
                return None
        return replace(self, base=self.base | dict.fromkeys(theirs, k), lead=k)

    def weighted(self, weights: Sequence[float]) -> Problem:
        """Return the same with other shares in the units; those of the outputs stay."""
        return replace(self, weights=tuple(weights))

    def shares(self, name: str) -> list[float]:
        """Return each network's share of a tensor, which belongs to the networks that have it."""
        if self.absent_as_zero:
            return [0.0 if name in gone else w for gone, w in zip(self.lacking, self.weights)]
        return self.among([name not in gone for gone in self.lacking])

    def among(self, having: Sequence[bool]) -> list[float]:
        """Return each network's share of what only some of them have; equal if none has weight."""
        shares = [w if has else 0.0 for has, w in zip(having, self.weights)]
        if not any(shares):
            shares = [float(has) for has in having]
        return [s / sum(shares) for s in shares]

    @cached_property
    def lacking(self) -> tuple[set[str], ...]:
        """Per network, the tensors of layers that it has in name only (see `absent_tensors`)."""
        return tuple(absent_tensors(n, a) for n, a in zip(self.networks, self.absent))


def _corresponding(
    networks: Sequence[Network], absent: Sequence[Sequence[AbsentLayer]], anchor: int
) -> tuple[dict[str, tuple[Space, ...]], dict[str, tuple[bool, ...]], dict[str, int]]:
    """Return, by the anchor's name: the space in each network, who has it, and whose units lead."""
    by_places = [_by_places(n) for n in networks]
    missing = [absent_tensors(n, a) for n, a in zip(networks, absent)]
    ours = networks[anchor]
    spaces = {
        s.name: tuple(
            _same_space(s, ours, n, p) or Space(s.name, 0, ()) for n, p in zip(networks, by_places)
        )
        for s in ours.spaces
    }
    _require_common_ground(networks, anchor, spaces)
    contracted = {t for names in ours.weights.values() for t in names}
    present = {
        s.name: tuple(_has(own, s, contracted, gone) for own, gone in zip(spaces[s.name], missing))
        for s in ours.spaces
        if s.axes
    }
    for space in ours.spaces:
        inside = [present[s.name] for s in ours.spaces if s.parent == space.name and s.axes]
        present.setdefault(space.name, tuple(any(column) for column in zip(*inside)))
    base = {}
    for name, found in spaces.items():
        same = [k for k, s in enumerate(found) if present[name][k] and s.size == found[anchor].size]
        base[name] = anchor if present[name][anchor] or not same else same[0]
    _require_equal_sizes(networks, anchor)
    return spaces, present, base


def _has(own: Space, space: Space, contracted: set[str], gone: set[str]) -> bool:
    """Tell whether a network writes a space by anything but layers that it has in name only."""
    written = {a.tensor for a in space.axes if not a.reads}
    written = written & contracted or written
    return own.size > 0 and (not written or not written <= gone)


def _require_common_ground(
    networks: Sequence[Network], anchor: int, spaces: dict[str, tuple[Space, ...]]
) -> None:
    """Refuse networks most of whose units lie in places that another does not have.

    Some may: where streams are cut and interleaved again and again (channel shuffle), the pieces
    of streams of different widths do not all come out alike.
    """
    total = sum(s.size for s in networks[anchor].spaces)
    for k, network in enumerate(networks):
        lost = [s for s in networks[anchor].spaces if not spaces[s.name][k].size]
        if 2 * sum(s.size for s in lost) > total:
            raise _unmatched(lost[0], networks[anchor], network)


def _by_places(network: Network) -> dict[Signature, list[Space]]:
    found: dict[Signature, list[Space]] = {}
    for space in network.spaces:
        found.setdefault(space.signature, []).append(space)
    return found


def _same_space(
    space: Space, ours: Network, theirs: Network, by_places: dict[Signature, list[Space]]
) -> Space | None:
    """Find a space by its places; a space of blocks that are no axis by a space inside it.

    Spaces in the same places (the insides of fixed blocks) correspond in order.
    """
    if space.axes:
        alike = [s.name for s in ours.spaces if s.signature == space.signature]
        there = by_places.get(space.signature, [])
        return there[alike.index(space.name)] if len(there) == len(alike) else None
    inside = next((s for s in ours.spaces if s.parent == space.name), None)
    other = inside and _same_space(inside, ours, theirs, by_places)
    return theirs.spaces[other.parent] if other and other.parent else None


def absent_tensors(network: Network, absent: Sequence[AbsentLayer]) -> set[str]:
    """Return the parameters and buffers of layers that a network has in name only.

    What was set to zero to silence such a layer is not among them, nor the weights that a zeroed
    norm is folded into: it is a fact that the network adds nothing there.
    """
    silent = {t for a in absent for t in a.zeroed}
    folded = foldable_norms(network)
    for norm, roles in network.norms.items():
        touched = {t for t in roles.values() if isinstance(t, str)}
        if silent & touched:
            silent |= touched | set(network.tensors.get(folded.get(norm, ""), ()))
    return foreign_tensors(network, absent) - silent


def foreign_tensors(network: Network, absent: Sequence[AbsentLayer]) -> set[str]:
    """Return all parameters and buffers of layers that a network has in name only."""
    nodes = {node for a in absent for node in a.foreign}
    own = {t for node in nodes for t in network.tensors.get(node, ())}
    kept = {t for n, ts in network.tensors.items() if n not in nodes for t in ts}
    return own - kept


def _unmatched(space: Space, a: Network, b: Network) -> PairingError:
    places = ", ".join(sorted(f"{x.tensor}[{x.dim}]" for x in space.axes)[:4])
    return PairingError(
        f"a space of {a.name} that {b.name} does not have",
        where=f"space '{space.name}' on {places}",
        expected="networks whose units lie in the same places once their depths are equal",
        do="compare print(fxfuse.find_spaces(...)) of both; residual streams must agree in kind",
    )


def _require_equal_sizes(networks: Sequence[Network], anchor: int) -> None:
    free = {(a.tensor, a.dim) for s in networks[anchor].spaces for a in s.axes}
    ours = networks[anchor].spaces.sizes
    for network in networks:
        for key, size in network.spaces.sizes.items():
            if key not in free and ours.get(key) != size:
                raise PairingError(
                    f"an axis that must stay in place, of size {ours.get(key)} and {size}",
                    where=f"'{key[0]}' axis {key[1]} of {networks[anchor].name} and {network.name}",
                    expected="the same kernel, input, output and position sizes in all networks",
                    do="fuse networks that agree in everything but depth and width",
                )
