"""One depth for all networks: insert layers that do nothing, or remove layers."""

from ._adopt import adopt
from ._insert import AbsentLayer, bypass_of
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
    "adopt",
    "average_of_signs",
    "bypass_of",
    "deepen",
    "fitted_line",
    "fitted_line_through_zero",
    "majority_vote",
    "sign_of_sum",
]
