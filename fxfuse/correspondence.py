"""Which space of each balanced network is which, and in whose coordinates the fused space is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .balancing import Balanced
from .errors import PairingError
from .ir import Space
from .network import Network


@dataclass(frozen=True, eq=False)
class Correspondence:
    """Which space of each network is which, and in whose coordinates the fused space is.

    Attributes:
        base: Space name -> the network whose units the fused units are.
        spaces: Space name -> the space in each network (names are those of the anchor).
        present: Space name -> whether each network really has it.
    """

    base: dict[str, int]
    spaces: dict[str, tuple[Space, ...]]
    present: dict[str, tuple[bool, ...]]


def correspond(balanced: Balanced, anchor: int) -> Correspondence:
    """Match the spaces of balanced networks by the places of their units.

    Raises:
        PairingError: If a network lacks a space, or two fixed axes differ in size.
    """
    networks = balanced.networks
    by_places = [_by_places(n) for n in networks]
    missing = [absent_tensors(n, a) for n, a in zip(networks, balanced.absent)]
    base, spaces, present = {}, {}, {}
    for space in networks[anchor].spaces:
        found = []
        for network, known in zip(networks, by_places):
            other = _same_space(space, networks[anchor], network, known)
            if other is None:
                raise _unmatched(space, networks[anchor], network)
            found.append(other)
        written = {a.tensor for a in space.axes if not a.reads}
        here = tuple(not written or not written <= gone for gone in missing)
        same = [k for k, s in enumerate(found) if here[k] and s.size == space.size]
        base[space.name] = anchor if here[anchor] or not same else same[0]
        spaces[space.name], present[space.name] = tuple(found), here
    _require_equal_sizes(networks, anchor)
    return Correspondence(base, spaces, present)


def _by_places(network: Network) -> dict[frozenset, list[Space]]:
    found: dict[frozenset, list[Space]] = {}
    for space in network.spaces:
        found.setdefault(space.signature, []).append(space)
    return found


def _same_space(
    space: Space, ours: Network, theirs: Network, by_places: dict[frozenset, list[Space]]
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


def absent_tensors(network: Network, absent: Sequence) -> set[str]:
    """Return the parameters and buffers of blocks that a network has only as neutral ones."""
    nodes = {node for a in absent for node in a.inner}
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
