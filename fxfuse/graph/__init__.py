"""A model as a graph: captured, edited by passes, and compared with the model."""

from .passes import debug
from .trace import trace
from .verify import verify

__all__ = [
    "debug",
    "trace",
    "verify",
]
