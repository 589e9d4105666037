"""Mixers: ways to combine weights in the same units, other than their mean. One file each."""

from ..coupling.mixing import Mixer
from .dare import Dare
from .slerp import Slerp
from .task_arithmetic import TaskArithmetic
from .ties import Ties

__all__ = ["Dare", "Mixer", "Slerp", "TaskArithmetic", "Ties"]
