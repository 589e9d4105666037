"""A model as a graph of its own: captured, rewritten by passes, and compared with the model."""

from .passes import debug
from .trace import trace
from .verify import verify

__all__ = [
    "debug",
    "trace",
    "verify",
]
