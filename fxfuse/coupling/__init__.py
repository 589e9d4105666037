"""Which units correspond, and the maps between them: one file per method."""

from .c2m3 import CycleConsistent
from .cca import CanonicalCorrelation
from .dual_space import DualSpace
from .flow import TransportFlow, averaged, weighted_matrix, weighted_scalar
from .matched_averaging import MatchedAveraging
from .measure import View
from .plans import one_map, reading_map, two_maps
from .tokens import Leading, Window
from .transport import InPlace, LayerByLayer, Transport
from .weight_matching import MergeMany, WeightMatching, WeightTransport
from .zipit import Zip

__all__ = [
    "CanonicalCorrelation",
    "CycleConsistent",
    "DualSpace",
    "InPlace",
    "LayerByLayer",
    "Leading",
    "MatchedAveraging",
    "MergeMany",
    "Transport",
    "TransportFlow",
    "View",
    "WeightMatching",
    "WeightTransport",
    "Window",
    "Zip",
    "averaged",
    "one_map",
    "reading_map",
    "two_maps",
    "weighted_matrix",
    "weighted_scalar",
]
