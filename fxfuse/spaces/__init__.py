"""Which units of a network are interchangeable, found by a run of the network on labels."""

from .network import Network
from .spaces import find_spaces, permute

__all__ = [
    "Network",
    "find_spaces",
    "permute",
]
