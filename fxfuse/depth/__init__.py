"""One depth for all networks: insert layers that do nothing, or remove layers."""

from .deepen import Deepen, deepen
from .gates import average_of_signs, majority_vote, sign_of_sum
from .shorten import Shorten

__all__ = [
    "Deepen",
    "Shorten",
    "average_of_signs",
    "deepen",
    "majority_vote",
    "sign_of_sum",
]
