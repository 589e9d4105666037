"""One depth for all networks: insert layers that do nothing, or remove layers."""

from ._insert import AbsentLayer
from ._removal import (
    Gate,
    Responses,
    average_of_signs,
    fitted_line,
    fitted_line_through_zero,
    majority_vote,
    sign_of_sum,
)
from .deepen import Balanced, Balancing, Deepen, deepen
from .shorten import Shorten

__all__ = [
    "AbsentLayer",
    "Balanced",
    "Balancing",
    "Deepen",
    "Gate",
    "Responses",
    "Shorten",
    "average_of_signs",
    "deepen",
    "fitted_line",
    "fitted_line_through_zero",
    "majority_vote",
    "sign_of_sum",
]
