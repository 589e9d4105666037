"""Tell the networks that can be fused with the anchor from those that only give targets.

Networks whose layers pair with the anchor's are its family; they are fused as usual. Any other
network is a guest (`across=True`): none of its weights go into the fused network, but its outputs
and features are among the targets of the refit (see `coupling.guests`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ..alignment.align import align_networks
from ..calibration.data import Calibration
from ..coupling.guests import Guest, guest_of
from ..coupling.problem import Problem
from ..depth.deepen import Balancing
from ..errors import ArgumentError, PairingError, PassError
from ..ir import Alignment, SegmentAlignment
from ..refit.sweep import LeastSquares
from ..report.report import CouplingReport, Heard, Report
from ..spaces.network import Network

T = TypeVar("T")
ABSENT = CouplingReport("absent", 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Company:
    """Which networks are fused with the anchor, and which are guests.

    Attributes:
        networks: All of them.
        shares: What each of them counts, sum 1.
        members: Indices of those that are fused.
        anchor: Where the anchor stands among these.
    """

    networks: tuple[Network, ...]
    shares: tuple[float, ...]
    members: tuple[int, ...]
    anchor: int

    @property
    def family(self) -> list[Network]:
        """The networks that are fused."""
        return [self.networks[k] for k in self.members]

    @property
    def leads(self) -> list[int]:
        """Where these stand among themselves, the anchor first."""
        return sorted(range(len(self.members)), key=lambda i: i != self.anchor)

    @property
    def shares_inside(self) -> tuple[float, ...]:
        """What each of them counts among them, sum 1; equal if none counts."""
        shares = [self.shares[k] for k in self.members]
        shares = shares if sum(shares) else [1.0 for _ in shares]
        return tuple(s / sum(shares) for s in shares)

    def guests_of(self, host: Network) -> tuple[Guest, ...]:
        """Return the others as guests of the fused network's structure."""
        others = [k for k in range(len(self.networks)) if k not in self.members]
        return tuple(guest_of(self.networks[k], host, self.shares[k]) for k in others)

    def reported(self, report: Report, guests: Sequence[Guest]) -> Report:
        """Return the report of a fusion of the family as one of all networks, in their order."""
        if not guests:
            return report
        spaces = tuple(
            replace(
                s,
                costs=self._spread(s.costs, None),
                confidences=self._spread(s.confidences, None),
                sizes=self._spread(s.sizes, 0),
                couplings=self._spread(s.couplings, ABSENT),
            )
            for s in report.spaces
        )
        return replace(
            report,
            alignment=self._aligned(report.alignment),
            anchor=self.members[report.anchor],
            lead=None if report.lead is None else self.members[report.lead],
            weights=self.shares,
            spaces=spaces,
            errors=self._spread(report.errors, 0.0),
            removed=self._spread(report.removed, frozenset[str]()) if report.removed else (),
            maps={(name, self.members[k]): m for (name, k), m in report.maps.items()},
            guests=tuple(_heard(guest) for guest in guests),
        )

    def _spread(self, values: Sequence[T], fill: T) -> tuple[T, ...]:
        of = dict(zip(self.members, values))
        return tuple(of.get(k, fill) for k in range(len(self.networks)))

    def _aligned(self, alignment: Alignment) -> Alignment:
        """Return the alignment of the family with places for all, those of guests empty."""
        segments = []
        for s in alignment.segments:
            nothing: tuple[str | None, ...] = (None,) * len(s.slots[0])
            slots, costs = self._spread(s.slots, nothing), self._spread(s.costs, None)
            segments.append(SegmentAlignment(s.label, self.members[s.reference], slots, costs))
        facts = self._spread(alignment.facts, {}) if alignment.facts else ()
        return Alignment(tuple(segments), tuple(n.name for n in self.networks), facts)


def _heard(guest: Guest) -> Heard:
    inside = {n: node for n, (node, axis) in guest.places.items() if axis is not None}
    return Heard(guest.network.name, inside)


def company_of(
    networks: Sequence[Network],
    shares: Sequence[float],
    anchor: int,
    data: Calibration,
    balancing: Balancing,
    across: bool,
) -> Company:
    """Find which networks can be fused with the anchor; each is tried as a pair with it.

    Args:
        networks: The networks.
        shares: Of each of them, sum 1.
        anchor: Index of the anchor.
        data: Calibration inputs.
        balancing: How they get one structure.
        across: Whether the others are guests; if not, all are to be fused.
    """
    members, few = [], data.first(2)  # enough to see whether networks pair
    for k, network in enumerate(networks):
        pair = [networks[anchor], network]
        if not across or k == anchor or _fit_together(pair, few, balancing):
            members.append(k)
    return Company(tuple(networks), tuple(shares), tuple(members), members.index(anchor))


def _fit_together(pair: Sequence[Network], data: Calibration, balancing: Balancing) -> bool:
    try:
        alignment = align_networks(pair, data, measure_all=False)
        Problem.of(balancing(pair, alignment, data), 0, (0.5, 0.5))
    except (PairingError, PassError):
        return False
    return True


def require_use_of_guests(across: bool, heads: object, refit: object) -> None:
    """Refuse `across` where guests would change nothing: with heads, or without least squares."""
    if not across or heads is None and isinstance(refit, LeastSquares):
        return
    heard = "heads" if heads is not None else f"a method that corrects by {refit}"
    raise ArgumentError(
        f"across=True with {heard}",
        where="the argument `across`",
        expected="one task, and a method that fits layers to targets, as the default does",
        do="leave `heads` and `method` out, or leave `across` out",
    )
