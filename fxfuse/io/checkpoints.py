"""Weights from files and to files, without running anything that is in them.

A file is safetensors, or one of `torch.save`, which is read with `weights_only=True`. It holds a
state dictionary, or one nested under a usual key. Prefixes of wrappers are taken off its names.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._checked import checked
from .._files import write_atomically
from ..errors import CheckpointError
from ..graph.state import EXTRA_STATE

KEYS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "net", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, Lightning

State = dict[str, Tensor]


@checked()
def read_state(path: str | os.PathLike[str]) -> State:
    """Return the state dictionary that a file holds.

    Args:
        path: A `.safetensors` file, or one of `torch.save`.

    Raises:
        CheckpointError: If it cannot be read, holds no weights, or needs code to be unpickled.
    """
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)[0]
    content = _unpickled(Path(path))
    state = _state_in(content)
    if state is None:
        is_dict = isinstance(content, dict)
        names = ", ".join(map(repr, content)) if is_dict else type(content).__name__
        raise CheckpointError(
            f"a checkpoint without weights, but with {shorten(names, 200, placeholder=' ...')}",
            where=str(path),
            expected="tensors by name, at the top or under one of the keys " + ", ".join(KEYS),
            do="take the state dictionary out and save that: safetensors.torch.save_file(...)",
        )
    return state


def read_safetensors(path: str | os.PathLike[str]) -> tuple[State, dict[str, str]]:
    """Return the tensors of a safetensors file, in memory of their own, and its metadata.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return state, file.metadata() or {}
    except Exception as error:  # of the file system, the format, or a type torch does not know
        raise _unreadable(path, error) from error


@checked()
def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the weights of a file into a model.

    Raises:
        CheckpointError: If the file cannot be read, or its names or shapes are not the model's.
    """
    expected = model.state_dict()
    state = _without_prefix(read_state(path), set(expected))
    try:
        try:
            model.load_state_dict(state)  # fills in what older files lack, unlike a check of names
        except ValueError:  # of a class that asks for the version of its state
            versioned = OrderedDict(state)
            vars(versioned)["_metadata"] = getattr(expected, "_metadata", None)
            model.load_state_dict(versioned)
    except Exception as error:
        faults = shorten(" ".join(str(error).splitlines()[1:]), 400, placeholder=" ...")
        raise CheckpointError(
            f"a checkpoint that does not fit: {faults or error}",
            where=f"{path} into {type(model).__name__}",
            expected="the names and shapes of the model's state_dict",
            do="build the model with the options it was trained with: ?key=value",
        ) from error


@checked()
def save_weights(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors as safetensors, in one step: the old file stays until the new one is whole.

    Raises:
        WriteError: If the file cannot be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    separate = _separate(contiguous)

    def write(file: Path) -> None:
        save_file(separate, file, metadata)
        _order_header(file)

    write_atomically(Path(path), write)


def _order_header(path: Path) -> None:
    """Sort the metadata of a safetensors file, which its writer lists in another order each time.

    The same tensors and metadata then are the same bytes. The header keeps its length.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        metadata = dict(sorted(header.pop("__metadata__", {}).items()))
        ordered = {"__metadata__": metadata} | header
        text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode()
        if len(metadata) > 1 and len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def _separate(tensors: State) -> State:
    """Give tensors that share memory, which the format does not know, memory of their own."""
    used: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage()
        shared = memory.data_ptr() in used or memory.nbytes() != tensor.nbytes
        used.add(memory.data_ptr())
        separate[name] = tensor.clone() if shared else tensor
    return separate


# --- files of torch.save --------------------------------------------------------------------------


def _unpickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storages that old files name
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", f"{error} {error.__context__}")
        fault = f"runs code when it is read: {code[1]}" if code else "is not a file of torch.save"
        raise CheckpointError(  # torch's own message advises to run it anyway
            f"a checkpoint that {fault}",
            where=str(path),
            expected="tensors alone, in a state dictionary",
            do="if its origin is trusted, load it where its code is, and save the weights alone: "
            "safetensors.torch.save_file(model.state_dict(), path)",
        ) from error
    except Exception as error:  # what a broken archive or pickle makes torch raise is not fixed
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    reason = shorten(str(error), 300, placeholder=" ...")
    return CheckpointError(
        f"a checkpoint that cannot be read: {type(error).__name__}: {reason}",
        where=str(path),
        expected="a whole safetensors file, or one that torch.save wrote",
        do="check the path, or get the file again; convert others with safetensors.torch.save_file",
    )


def _state_in(content: Any) -> State | None:
    """Return the state dictionary that an unpickled value is or holds, None if there is none."""
    if not isinstance(content, dict) or not content:
        return None
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    empty = {n for n, v in content.items() if v is None and str(n).endswith(EXTRA_STATE)}
    if state and set(content) == {*state, *empty} and all(isinstance(n, str) for n in content):
        return state
    nested = (_state_in(content[key]) for key in KEYS if key in content)
    return next((state for state in nested if state is not None), None)


def _without_prefix(state: State, names: set[str]) -> State:
    """Take off prefixes that wrappers put before every name, until a name is the model's.

    What lies beside a prefix (a counter of averages, weights of a loss) is left out, if the names
    behind the prefix are all that the model has.
    """
    if names & set(state):
        return state
    for prefix in PREFIXES:
        inside = {n[len(prefix) :]: t for n, t in state.items() if n.startswith(prefix)}
        if inside:
            inner = _without_prefix(inside, names)
            if len(inside) == len(state) or names <= set(inner):
                return inner
    return state
