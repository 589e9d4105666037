"""Files in and out; nothing is unpickled."""

from .checkpoints import load_weights, read_state, save_weights
from .save import load, save

__all__ = [
    "load",
    "load_weights",
    "read_state",
    "save",
    "save_weights",
]
