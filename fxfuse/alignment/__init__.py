"""The layers and segments of networks, and which of them correspond."""

from .aligners import (
    Aligner,
    Monotone,
    Random,
    head_tail,
    layer_wise,
    monotone,
    same_index,
    segment_wise,
    uniform,
)
from .inspection import Inspection, inspect
from .layer_costs import (
    LinearCKA,
    Meter,
    OfActivations,
    Wasserstein,
    WeightDistributions,
    linear_cka,
    neuron_counts,
    weight_distributions,
)
from .layers import partition

__all__ = [
    "Aligner",
    "Inspection",
    "LinearCKA",
    "Meter",
    "Monotone",
    "OfActivations",
    "Random",
    "Wasserstein",
    "WeightDistributions",
    "head_tail",
    "inspect",
    "layer_wise",
    "linear_cka",
    "monotone",
    "neuron_counts",
    "partition",
    "same_index",
    "segment_wise",
    "uniform",
    "weight_distributions",
]
