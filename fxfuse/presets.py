"""Methods under the names of their papers, and the default of `fuse`."""

from __future__ import annotations

from .costs import euclidean
from .coupling import one_map
from .fusion import Method
from .refit import MatchMoments
from .transport import Transport

best = Method()

#: CLAFusion (Nguyen et al.) by adding layers, as its scripts run it: Euclidean ground metric on raw
#: pre-activations, exact transport, one map for both sides, widths of the shallowest network.
clafusion = Method(
    coupling=Transport(ground_cost=euclidean, maps=one_map),
    refit=MatchMoments(keep=True),
    anchor=lambda depths: depths.index(min(depths)),
)
