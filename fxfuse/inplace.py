"""Couple unit `i` of each network with unit `i` of the others: naive averaging."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.sparse import csr_array, eye_array

from .errors import PairingError
from .ir import Coupling
from .measuring import Measurements, View
from .mixing import Mixer
from .progress import Tick, counted, silent


@dataclass(frozen=True)
class InPlace:
    """Leave every unit where it is: the baseline that knows nothing of permutations.

    With `MatchMoments(keep=True)` the result is the average of the weights, name by name. Nets of
    unequal depth are balanced first, as for any other method. Norms with running statistics are
    folded into the weights that are averaged, and measured anew on the result.

    Attributes:
        view: Nothing is measured.

    Raises:
        PairingError: If networks differ in width.

    Example:
        >>> import torch, fxfuse
        >>> from fxfuse.refit import MatchMoments
        >>> a, b = (torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()) for _ in "ab")
        >>> naive = fxfuse.Method(coupling=InPlace(), refit=MatchMoments(keep=True))
        >>> fused = fxfuse.fuse([a, b], torch.randn(9, 4), method=naive)
        >>> torch.allclose(fused.get_submodule("0").weight, (a[0].weight + b[0].weight) / 2)
        True
    """

    view: View | None = None

    def __call__(self, mixer: Mixer, measured: Measurements, tick: Tick = silent) -> None:
        """Fill in the coupling of every space and network."""
        match = mixer.match
        for name, spaces in counted(match.spaces.items(), tick):
            fused = spaces[match.base[name]].size
            for k, own in enumerate(spaces):
                if not match.present[name][k]:
                    shape = fused, own.size
                    maps = csr_array(shape), csr_array(shape[::-1])
                elif own.size == fused:
                    maps = csr_array(eye_array(fused)), csr_array(eye_array(fused))
                else:
                    raise _unequal(name, fused, own.size)
                mixer.couplings[name, k] = Coupling(*maps)


def _unequal(name: str, fused: int, own: int) -> PairingError:
    return PairingError(
        f"a space of {fused} and {own} units, to be averaged in place",
        where=f"space '{name}'",
        expected="equal widths, where unit i of one network is unit i of the other",
        do="couple the units by transport, or bring the networks to one width first",
    )
