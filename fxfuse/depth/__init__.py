"""One depth for all networks: insert layers that do nothing, or remove layers."""

from ._insert import AbsentLayer
from .deepen import Balanced, Balancing, Deepen, deepen
from .gates import average_of_signs, majority_vote, sign_of_sum
from .shorten import Shorten

__all__ = [
    "AbsentLayer",
    "Balanced",
    "Balancing",
    "Deepen",
    "Shorten",
    "average_of_signs",
    "deepen",
    "majority_vote",
    "sign_of_sum",
]
