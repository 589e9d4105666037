"""The papers' methods by name, and the default of `fuse`.

Each is called like `fuse`: `presets.zipit([a, b], data)`. Where a paper wants equal depths,
networks are balanced first. What a paper cannot do, such as matching weights across widths, is
refused. What it does to norms after merging is done, too; `dataclasses.replace(presets.zipit,
refit=AsMixed())` leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import fx, nn

from ._progress import Progress
from .alignment.aligners import same_index
from .calibration.data import Calibration
from .calibration.moments import euclidean
from .coupling.c2m3 import CycleConsistent
from .coupling.cca import CanonicalCorrelation
from .coupling.dual_space import DualSpace
from .coupling.flow import TransportFlow
from .coupling.matched_averaging import MatchedAveraging
from .coupling.measure import View
from .coupling.plans import one_map
from .coupling.transport import InPlace, LayerByLayer, Transport
from .coupling.weight_matching import WeightMatching
from .coupling.zipit import Zip
from .errors import ArgumentError
from .fusion.fuse import Method, align
from .fusion.transfer import transfer
from .graph.calls import ToCall
from .mixers import Dare, Slerp, TaskArithmetic, Ties
from .refit.moments import AsMixed, MatchMoments, ResetNorms
from .refit.pleas import LayerwiseLeastSquares
from .refit.regmean import RegMean

T = TypeVar("T")


@dataclass(frozen=True)
class Transfer:
    """Heterogeneous model transfer: the shallower network's weights in the deeper one's layers.

    Attributes:
        aligned: Transfer along the cross-layer alignment, not along the longest chain.
        then: Fuse the result with the deeper network by this method.

    References:
        Wang et al., heterogeneous model transfer; Nguyen et al. (CLAFusion), table 3: alone, then
        averaged in place, then fused by transport, and so along the alignment.
    """

    aligned: bool = False
    then: Method | None = None

    def __call__(
        self, models: Sequence[nn.Module] | None = None, data: Any = None, **options: Any
    ) -> fx.GraphModule:
        """Transfer, and fuse if asked to.

        Args:
            models: The network that receives, then the one that gives.
            data: Inputs as for `fuse`.
            options: Of `fuse`, for the fusion afterwards.

        Raises:
            ArgumentError: If there are not two models, or options of a fusion without one.
        """
        if not isinstance(models, Sequence) or len(models) != 2:
            raise ArgumentError(
                f"{len(models) if isinstance(models, Sequence) else 'no'} models",
                where="heterogeneous model transfer",
                expected="two: the one that receives and the one that gives",
                do="transfer one after the other with fxfuse.transfer",
            )
        given = [name for name, value in options.items() if value is not None]
        if self.then is None and {*given} - {"progress"}:
            raise ArgumentError(
                f"{', '.join(given)} of a transfer that nothing is fused after",
                where="heterogeneous model transfer",
                expected="no options of a fusion",
                do="leave them out, or fuse afterwards: Transfer(then=presets.best)",
            )
        target, source = models
        alignment = align([source, target], data) if self.aligned else None
        moved = transfer(source, target, data, alignment)
        return moved if self.then is None else self.then([moved, target], data, **options)


@dataclass(frozen=True)
class OneByOne:
    """Many networks, two at a time: each is fused into what those before it became.

    A method that compares all networks with each other, such as a zip, needs memory and time that
    grow with the square of their number. In turn, they need as much as for two networks, as often
    as there are networks. The mean of units in place stays what it was; where units have to be
    found, the order of the networks matters, and what they became so far stands for them.

    Attributes:
        method: A method for two networks, such as `zipit`.

    Example:
        >>> import torch
        >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(5)]
        >>> fused = OneByOne(zipit)(nets, torch.randn(64, 4))
        >>> [tuple(p.shape) for p in fused.parameters() if p.dim() == 2]
        [(8, 4), (3, 8)]
    """

    method: Method

    def __post_init__(self) -> None:
        """Refuse changes to a checkpoint, which what two networks became is not."""
        if isinstance(self.method.mixer, TaskArithmetic | Ties | Dare):
            raise ArgumentError(
                f"{self.method.mixer}",
                where="OneByOne(method=...)",
                expected="a method that makes one network of any two",
                do="call the method with all networks: its memory grows only with their number",
            )

    def __call__(
        self,
        models: Sequence[nn.Module],
        data: Any,
        *,
        weights: Sequence[float] | None = None,
        inputs: ToCall | None = None,
        progress: Progress | bool | None = None,
    ) -> fx.GraphModule:
        """Fuse the networks in the order given.

        Args:
            models: One network or more; not modified.
            data: Inputs as for `fuse`.
            weights: As for `fuse`, but not "auto".
            inputs: As for `fuse`.
            progress: As for `fuse`; bars start anew for each network.

        Returns:
            As `fuse` does. Its report is of the last step.

        Raises:
            ArgumentError: If there are no models, or weights do not fit them.
        """
        given = [1.0] * len(models) if weights is None else weights
        numbers = [float(w) for w in given if not isinstance(w, str)]
        if not models or len(numbers) != len(models) or min(numbers) < 0 or not sum(numbers):
            raise ArgumentError(
                f"weights {weights!r} of {len(models)} networks",
                where="OneByOne",
                expected="one network or more, and a share of each that is not negative",
                do="leave `weights` out for equal ones",
            )
        data = Calibration(data, models=models, to_call=inputs)
        order = sorted(range(len(models)), key=lambda k: numbers[k] == 0)  # these have no say
        total, fused = numbers[order[0]], None
        for k in order[1:]:
            become = models[order[0]] if fused is None else fused
            both = [total, numbers[k]]
            fused = self.method([become, models[k]], data, weights=both, progress=progress)
            total += numbers[k]
        return self.method(models, data, progress=progress) if fused is None else fused


def shallowest(depths: Sequence[int]) -> int:
    """Return the index of the first network of the least depth, for `Method(anchor=)`."""
    return depths.index(min(depths))


#: The default: the method that gives the best networks.
best = Method()

#: Weights of the same name are averaged; layers that a network lacks are left to the others.
average = Method(coupling=InPlace(), refit=AsMixed())

#: OTFusion (Singh and Jaggi) on activations, as its scripts run it; layers match in order.
otfusion = Method(
    aligner=same_index,
    coupling=LayerByLayer(ground_cost=euclidean, maps=one_map),
    refit=AsMixed(),
    absent_as_zero=True,
)

#: CLAFusion (Nguyen et al.) by adding layers, as its scripts run it: Euclidean ground metric on raw
#: pre-activations, a plan for each layer's output and for the network's, one map for both sides,
#: added layers counting as zeros, widths of the shallowest network.
clafusion = Method(
    coupling=LayerByLayer(ground_cost=euclidean, maps=one_map),
    refit=AsMixed(),
    absent_as_zero=True,
    anchor=shallowest,
)

#: Transformer Fusion (Imfeld et al.): soft plans of single layers, whose mean is handed on at sums.
transformer_ot = Method(coupling=TransportFlow(), refit=AsMixed())

#: Heterogeneous model transfer (Wang et al.) alone; see `Transfer` for what may follow.
hmt = Transfer()

#: Git Re-Basin (Ainsworth et al.): weights matched without data, which only the norms still need.
git_rebasin = Method(coupling=WeightMatching(), refit=ResetNorms())

#: ZipIt (Stoica et al.): the units most alike are merged, some within a network.
zipit = Method(coupling=Zip(alpha=0.3, beta=0.125), refit=ResetNorms())

#: Elastic zip (Xu et al.): budgets in proportion to the widths.
elastic_zip = Method(coupling=Zip(alpha=0.5, beta=1.0), refit=ResetNorms())

#: C2M3 (Crisostomi et al.): one universe for all networks, moments repaired.
c2m3 = Method(coupling=CycleConsistent(), refit=MatchMoments())

# Siblings match by index, as these methods mean it; other networks by what their units compute.
_ALIGNED = Method(coupling=Transport(by_index=True), refit=ResetNorms())

#: Task arithmetic (Ilharco et al.): the first network is the checkpoint, changes add up.
task_arithmetic = replace(_ALIGNED, mixer=TaskArithmetic())

#: TIES (Yadav et al.): of changes, the large ones that agree in sign; the first is the checkpoint.
ties = replace(_ALIGNED, mixer=Ties())

#: DARE (Yu et al.): changes thinned out at random, then added; the first is the checkpoint.
dare = replace(_ALIGNED, mixer=Dare())

#: SLERP: along the arc between two networks' weights.
slerp = replace(_ALIGNED, mixer=Slerp())

#: RegMean (Jin et al.): each network counts in a weight as much as its inputs do, in closed form.
regmean = replace(_ALIGNED, refit=RegMean())

#: PLeaS (Nasery et al.): permutations, then least squares layer by layer. With `width=`, the units
#: that are least alike are kept apart, as many as the multiply-adds allow.
pleas = Method(coupling=Transport(), refit=LayerwiseLeastSquares())

#: MuDSC (Xu et al.): permutations by activations and weights together.
mudsc = Method(coupling=DualSpace(), refit=ResetNorms())

#: CCA-Merge (Horoi et al.): features turned onto each other by canonical correlations.
cca_merge = Method(coupling=CanonicalCorrelation(), refit=ResetNorms())

#: FedMA (Wang et al.): units matched by their weights into layers that grow, in one shot. Give the
#: clients' sample counts as `weights=`.
fedma = Method(coupling=MatchedAveraging(), refit=ResetNorms())

#: REPAIR (Jordan et al.): permutations by correlation, then the moments of each unit.
repair = Method(coupling=Transport(view=View(activated=True)), refit=MatchMoments())

#: All of them by the names that `fuse(method=)` and the command line take.
NAMED: dict[str, Method | Transfer] = {
    "best": best,
    "average": average,
    "otfusion": otfusion,
    "clafusion": clafusion,
    "transformer_ot": transformer_ot,
    "hmt": hmt,
    "git_rebasin": git_rebasin,
    "zipit": zipit,
    "elastic_zip": elastic_zip,
    "c2m3": c2m3,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "slerp": slerp,
    "regmean": regmean,
    "pleas": pleas,
    "mudsc": mudsc,
    "cca_merge": cca_merge,
    "repair": repair,
    "fedma": fedma,
}


def method_named(name: str, methods: Mapping[str, T], where: str = "the argument `method`") -> T:
    """Return the method of a name.

    Args:
        name: The name.
        methods: Those to choose from, such as `NAMED`.
        where: Where the name was given.

    Raises:
        ArgumentError: If no method has this name.

    Example:
        >>> method_named("zipit", NAMED) is zipit
        True
    """
    if name in methods:
        return methods[name]
    raise ArgumentError(
        f"the method '{name}'",
        where=where,
        expected=f"one of {', '.join(methods)}",
        do="leave it out for the best one",
    )
