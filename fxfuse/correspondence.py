"""Which space of each balanced network is which, and in whose coordinates the fused space is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .balancing import Absent, Balanced
from .errors import PairingError
from .folding import folds
from .ir import Signature, Space
from .network import Network


@dataclass(frozen=True, eq=False)
class Correspondence:
    """Which space of each network is which, and in whose coordinates the fused space is.

    Attributes:
        base: Space name -> the network whose units the fused units are.
        spaces: Space name -> the space in each network (names are those of the anchor); of size 0
            where a network has none in these places.
        present: Space name -> whether each network really has it.
        lead: The network whose units the fused units are wherever it has them.
    """

    base: dict[str, int]
    spaces: dict[str, tuple[Space, ...]]
    present: dict[str, tuple[bool, ...]]
    lead: int

    def led_by(self, k: int) -> Correspondence | None:
        """Return the same in the units of another network, where it has them.

        None if it has more or fewer of them anywhere, as the fused network's widths are given.
        """
        sizes = {name: found[self.base[name]].size for name, found in self.spaces.items()}
        own = [name for name, here in self.present.items() if here[k]]
        if any(self.spaces[name][k].size != sizes[name] for name in own):
            return None
        return replace(self, base=self.base | dict.fromkeys(own, k), lead=k)


def correspond(balanced: Balanced, anchor: int) -> Correspondence:
    """Match the spaces of balanced networks by the places of their units.

    Raises:
        PairingError: If a network lacks a space, or two fixed axes differ in size.
    """
    networks = balanced.networks
    by_places = [_by_places(n) for n in networks]
    missing = [absent_tensors(n, a) for n, a in zip(networks, balanced.absent)]
    ours = networks[anchor]
    spaces = {
        s.name: tuple(
            _same_space(s, ours, n, p) or Space(s.name, 0, ()) for n, p in zip(networks, by_places)
        )
        for s in ours.spaces
    }
    _require_common_ground(networks, anchor, spaces)
    contracted = {t for names in ours.book.weights.values() for t in names}
    present = {
        s.name: tuple(_has(own, s, contracted, gone) for own, gone in zip(spaces[s.name], missing))
        for s in ours.spaces
        if s.axes
    }
    for space in ours.spaces:
        inside = [present[s.name] for s in ours.spaces if s.parent == space.name and s.axes]
        present.setdefault(space.name, tuple(any(here) for here in zip(*inside)))
    base = {}
    for name, found in spaces.items():
        same = [k for k, s in enumerate(found) if present[name][k] and s.size == found[anchor].size]
        base[name] = anchor if present[name][anchor] or not same else same[0]
    _require_equal_sizes(networks, anchor)
    return Correspondence(base, spaces, present, anchor)


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


def absent_tensors(network: Network, absent: Sequence[Absent]) -> set[str]:
    """Return the parameters and buffers of layers that a network has in name only.

    What was set to zero to silence such a layer is not among them, nor the weights that a zeroed
    norm is folded into: it is a fact that the network adds nothing there.
    """
    silent = {t for a in absent for t in a.zeroed}
    folded = folds(network)
    for norm, roles in network.book.norms.items():
        touched = {t for t in roles.values() if isinstance(t, str)}
        if silent & touched:
            silent |= touched | set(network.book.tensors.get(folded.get(norm, ""), ()))
    return foreign_tensors(network, absent) - silent


def foreign_tensors(network: Network, absent: Sequence[Absent]) -> set[str]:
    """Return all parameters and buffers of layers that a network has in name only."""
    nodes = {node for a in absent for node in a.foreign}
    own = {t for node in nodes for t in network.book.tensors.get(node, ())}
    kept = {t for n, ts in network.book.tensors.items() if n not in nodes for t in ts}
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
