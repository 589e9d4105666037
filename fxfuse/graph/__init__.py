"""A model as a graph: captured, edited by passes, and compared with the model."""

from .passes import debug, graph_pass
from .trace import trace
from .verify import verify

__all__ = [
    "debug",
    "graph_pass",
    "trace",
    "verify",
]
