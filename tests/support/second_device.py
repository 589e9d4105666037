"""A second device without hardware: tensors know where they would be, values stay on the CPU.

Inside `SecondDevice()`, a tensor that was moved to `SECOND`, and what is computed from it, says it
is there. An operation on tensors of both devices is refused as an accelerator would refuse it:
single numbers, indices and copies may come from the CPU, numpy reads the CPU only.
"""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

SECOND, CPU = torch.device("privateuseone:0"), torch.device("cpu")
MOVES = {"to", "cpu", "copy_", "_to_copy", "type_as"}
INDEXED = {"__getitem__", "__setitem__", "index", "index_put_", "index_put"}


class DeviceError(AssertionError):
    """Tensors of both devices met in one operation."""


def where(tensor):
    """Return the device that a tensor would be on."""
    return getattr(tensor, "_device_of_test", CPU)


def put(value, device):
    """Say where the tensors of a value are."""
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor):
            tensor._device_of_test = device
    return value


def on_second(module):
    """Put a module's tensors on the second device, in place."""
    for tensor in (*module.parameters(), *module.buffers()):
        put(tensor, SECOND)
    return module


def _moved(tensor, device):
    """Return a tensor on a device: itself if it is there, else a copy."""
    if where(tensor) == device:
        return tensor
    copy = tensor.detach().clone() if not tensor.requires_grad else tensor.clone()
    return put(copy, device)


def _device_in(args, kwargs):
    """Return the device that a call names, directly or by a tensor, if it names one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return where(value)
        if isinstance(value, torch.device | str) and str(value) != "":
            return torch.device(value)
    return None


class SecondDevice(TorchFunctionMode):
    """Follows where tensors are.

    Attributes:
        read: How many values each copy to the CPU had.
    """

    def __init__(self):
        super().__init__()
        self.read = []

    def __enter__(self):
        self._new = nn.Parameter.__new__

        def made(cls, data=None, requires_grad=True):
            return put(self._new(cls, data, requires_grad), CPU if data is None else where(data))

        nn.Parameter.__new__ = staticmethod(made)
        return super().__enter__()

    def __exit__(self, *error):
        nn.Parameter.__new__ = staticmethod(self._new)
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        owner = getattr(function, "__self__", None)  # of the getter of a property
        attribute = getattr(owner, "__name__", "") if name in ("__get__", "__set__") else ""
        if name == "__get__" and attribute == "device":
            return where(args[0])
        if name == "__get__" and attribute in ("is_cuda", "is_cpu"):
            return attribute == "is_cpu" and where(args[0]) == CPU
        if name == "__set__" and attribute == "data":
            result = function(*args)
            put(args[0], where(args[1]))
            return result
        if name == "cpu":
            return self._to(args[0], CPU)
        if name in ("numpy", "__array__") and where(args[0]) != CPU:
            raise DeviceError(f"numpy reads a tensor {tuple(args[0].shape)} of the second device")
        if name == "to":
            return self._call_to(function, *args, **kwargs)
        return self._call(function, name, args, kwargs)

    def _to(self, tensor, device):
        if device == CPU != where(tensor):
            self.read.append(tensor.numel())
        return _moved(tensor, device)

    def _call_to(self, function, tensor, *args, **kwargs):
        device = _device_in(args, kwargs)
        device = where(tensor) if device is None else device
        kinds = [a.dtype if isinstance(a, Tensor) else a for a in args]
        kinds = [kind for kind in kinds if isinstance(kind, torch.dtype)]
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
        result = function(tensor, *kinds, **kwargs) if kinds or kwargs else tensor
        if result is not tensor:
            put(result, where(tensor))
        return self._to(result, device)

    def _call(self, function, name, args, kwargs):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == SECOND.type:
            kwargs.pop("device")
        places = {where(t) for t in tensors if t.dim()} or {where(t) for t in tensors}
        if name in INDEXED:
            places = {where(args[0])}
        if len(places) > 1 and name not in MOVES:
            shapes = [(str(where(t)), tuple(t.shape)) for t in tensors]
            raise DeviceError(f"{name} of tensors on two devices: {shapes}")
        result = function(*args, **kwargs)
        if device is not None:
            return put(result, torch.device(device))
        if name in MOVES or SECOND not in places:
            return result
        return put(result, SECOND)
