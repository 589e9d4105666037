"""Choose, of the networks that a fusion may return, the one nearest to the networks' ensemble.

One sweep over the data gives the fused network. The others cost little beside it: the same with its
outputs as they were mixed, the plain average where shapes allow it, and the best network of the
result's size, as it is and with its outputs fitted to the ensemble's. Which is nearest shows on
samples that nothing is fitted to. If the networks are siblings, tuned from one checkpoint, outputs
are not fitted: their average is compared with each of them as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration.counted import Counted
from ..calibration.data import Calibration
from ..calibration.distance import Distance, is_logits
from ..calibration.run import working_batch
from ..calibration.shares import Batch
from ..coupling.measure import Evidence
from ..coupling.mixing import Couplings
from ..coupling.plans import alone
from ..coupling.problem import Problem
from ..coupling.transport import InPlace
from ..depth.deepen import Balanced, made_neutral
from ..errors import PassError
from ..graph.state import device_of, fill, state_values_of
from ..graph.trace import outputs_of
from ..refit.emit import emit, with_outputs_of
from ..refit.moments import AsMixed, Outcome, Refit
from ..spaces.network import Network

ROUNDING = 1e-3, 1e-6  # relative and absolute differences of distances that are no reason to choose

Ensemble = Sequence[tuple[float, Network]]  # the share and the network of each member


@dataclass(frozen=True, eq=False)
class Candidate:
    """A network that a fusion may return.

    Attributes:
        name: What it is, in words.
        network: Of the fused network's structure.
        couplings: The maps that it was made with.
        outcome: How near its refit came to the networks.
    """

    name: str
    network: Network
    couplings: Couplings
    outcome: Outcome


@dataclass(frozen=True, eq=False)
class Choice:
    """What a network is chosen by.

    Attributes:
        networks: The networks that are fused.
        shares: Of each of them in the ensemble.
        judge: Samples that nothing is fitted to.
        leads: Indices, among the balanced networks, of those whose units the result may have.
    """

    networks: Sequence[Network]
    shares: Sequence[float]
    judge: Calibration
    leads: Sequence[int]

    def __call__(
        self,
        fused: Candidate,
        balanced: Balanced,
        refit: Refit,
        data: Calibration,
    ) -> tuple[Candidate, dict[str, float]]:
        """Choose the candidate whose outputs are nearest to the ensemble's.

        Args:
            fused: The fused network.
            balanced: The networks once their depths were equal.
            refit: How the fused network was corrected.
            data: Calibration inputs that it was fitted to.

        Returns:
            The candidate, the first of those that only rounding tells apart; and how far each is
            from the ensemble, by its name.
        """
        ensemble = [(w, n) for w, n in zip(self.shares, self.networks) if w]
        found = [fused, *_mixed(fused, refit), *_averaged(fused, data)]
        parents = parents_in(fused.couplings.problem, balanced, self.leads)
        if parents:
            far = self._far(ensemble, parents)
            best = min(range(len(far)), key=far.__getitem__)
            found += _of_one(fused, parents[best], refit, data)
        far = self._far(ensemble, [candidate.network for candidate in found])
        share, least = ROUNDING
        limit = min(far) * (1 + share) + least
        chosen = next(c for c, distance in zip(found, far) if distance <= limit)
        return chosen, {c.name: distance for c, distance in zip(found, far)}

    def _far(self, ensemble: Ensemble, networks: Sequence[Network]) -> list[float]:
        """Return how far networks are from the ensemble; infinitely if that is no number."""
        size = working_batch([*self.networks, *networks])
        found = distances(ensemble, networks, self.judge.own(size))
        with self.judge.summed():
            shown = [distance.summed().shown for distance in found]
        return [far if math.isfinite(far) else math.inf for far in shown]


# --- the candidates -------------------------------------------------------------------------------


def parents_in(problem: Problem, balanced: Balanced, choices: Iterable[int]) -> list[Network]:
    """Return those networks that the fused one can be, each in its structure and under its name.

    Args:
        problem: What is fused.
        balanced: The networks once their depths were equal.
        choices: Indices of the networks whose units the result may take.
    """
    found = []
    for k in choices:
        absent = balanced.absent[k]
        if absent and k != problem.anchor:  # shallower, so no network of this size
            continue
        one = replace(balanced, networks=(balanced.networks[k],), absent=(absent,))
        try:
            own = made_neutral(one).networks[0]
        except PassError:  # a layer that it lacks can be passed by only
            continue
        module = copy.deepcopy(problem.structure.module)
        kept, given = state_values_of(module), state_values_of(own.module)
        if {n: t.shape for n, t in kept.items()} == {n: t.shape for n, t in given.items()}:
            for name, tensor in given.items():
                fill(module, name, tensor.detach())
            found.append(replace(problem.structure, name=own.name, module=module))
    return found


def _mixed(fused: Candidate, refit: Refit) -> Iterator[Candidate]:
    """Yield it with its last layer as mixed: a fit to the networks' training data may mislead."""
    if refit.of_outputs is not None and not fused.couplings.siblings:
        mixed, _ = emit(fused.couplings, {})
        network = with_outputs_of(fused.network, mixed)
        outcome = replace(fused.outcome, divergence=None, mixed=True)
        yield replace(
            fused, name=f"{fused.name}, outputs as mixed", network=network, outcome=outcome
        )


def _averaged(fused: Candidate, data: Calibration) -> Iterator[Candidate]:
    """Yield the average of the weights, name by name, if all networks have the same units."""
    problem = fused.couplings.problem
    sizes = [{s.size for s in spaces} for spaces in problem.spaces.values()]
    several = len(problem.networks) > 1 and not fused.couplings.siblings
    if not several or any(problem.absent) or any(len(s) > 1 for s in sizes):
        return
    couplings, keep = InPlace()(problem, Evidence({}, {})), AsMixed()
    module, plans = emit(couplings, {})
    network = replace(fused.network, module=module)
    samples = min(data.samples, keep.samples(problem.networks))
    outcome = keep(network, couplings, plans, data, samples)
    yield Candidate("the plain average", network, couplings, outcome)


def _of_one(
    fused: Candidate, parent: Network, refit: Refit, data: Calibration
) -> Iterator[Candidate]:
    """Yield a network with its outputs fitted to the ensemble's, and as it is."""
    problem = fused.couplings.problem
    k = [n.name for n in problem.networks].index(parent.name)
    couplings = alone(problem, k)
    whole = replace(parent, name=fused.network.name)
    if refit.of_outputs is not None and not fused.couplings.siblings:
        network = replace(whole, module=copy.deepcopy(parent.module))
        samples = min(data.samples, refit.samples(problem.networks))
        outcome = refit.of_outputs(network, couplings, (), data, samples)
        yield Candidate(f"{parent.name} with its outputs fitted", network, couplings, outcome)
    yield Candidate(f"{parent.name} alone", whole, couplings, Outcome())


# --- distances ------------------------------------------------------------------------------------


def distances(
    ensemble: Ensemble, networks: Sequence[Network], data: Iterable[Batch]
) -> list[Distance]:
    """Return how far the outputs of each network are from those of an ensemble.

    Args:
        ensemble: The share and the network of each member.
        networks: The networks that are compared with it; members among them are run once.
        data: Batches of inputs.
    """
    every = list(dict.fromkeys([*(member for _, member in ensemble), *networks]))
    apart = [Distance() for _ in networks]
    with torch.no_grad():
        for batch in data:
            outputs = {network: _outputs(network, batch) for network in every}
            parts = zip(*(outputs[member] for _, member in ensemble))
            mean = [sum(w * t for (w, _), t in zip(ensemble, each)) for each in parts]
            for distance, network in zip(apart, networks):
                distance.add(mean, outputs[network])
    return apart


def constant_distance(network: Network, data: Iterable[Batch]) -> Distance:
    """Return how far the best constant is from a network's outputs: no network need be farther.

    Of class probabilities the constant is their mean, of other outputs the mean of the values.

    Args:
        network: The network.
        data: Batches of inputs, not many samples in all: their outputs are held.
    """
    with torch.no_grad():
        batches = [_outputs(network, batch) for batch in data]
    apart = Distance()
    for parts in zip(*batches):
        if len({t.shape[1:] for t in parts}) > 1 or not parts[0].dim():
            apart.total = math.inf  # outputs that are not one for each sample have no mean
            continue
        values, shares = torch.cat(parts), len(batches[0]) == 1 and is_logits(parts[0])
        mean = values.softmax(1).mean(0).log() if shares else values.mean(0)
        apart.add([values], [mean.expand_as(values)])
    return apart


def _outputs(network: Network, batch: Batch) -> list[Tensor]:
    """Return the outputs of a network, without whole numbers, which have no mean."""
    given = tuple(t.to(device_of(network.module)) for t in batch)
    outputs = outputs_of(network.module, given, network.name)
    counted = Counted.of(batch)
    values = [counted.rows(t) for t in outputs if t.is_floating_point() or t.is_complex()]
    return [t.to(torch.promote_types(t.dtype, torch.float64)).cpu() for t in values]
