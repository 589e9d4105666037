"""Methods under the names of their papers, and the default of `fuse`."""

from __future__ import annotations

from .costs import euclidean
from .coupling import one_map
from .fusion import Method
from .layerwise import LayerByLayer

best = Method()

#: CLAFusion (Nguyen et al.) by adding layers, as its scripts run it: Euclidean ground metric on raw
#: pre-activations, a plan for each layer's output and for the network's, one map for both sides,
#: added layers counting as zeros, widths of the shallowest network.
clafusion = Method(
    coupling=LayerByLayer(ground_cost=euclidean, maps=one_map),
    match_moments=False,
    absent_as_zero=True,
    anchor=lambda depths: depths.index(min(depths)),
)
