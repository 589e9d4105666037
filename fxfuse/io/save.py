"""Networks as files: weights and architecture in one, without pickles and without model code.

A file is a safetensors file: any program reads its weights, and `load_state_dict` of the original
class takes them. Its metadata hold the architecture as JSON:

- `fxfuse`: an object with `format`, `version`, `made_with` (versions), `report`, and the `tensors`
  and `modules` of `_codec`, which include tensors outside the state.
- `sha256`: of that text, and of name, type, shape and bytes of each tensor in the order of names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from .._checked import checked
from .._schema import parsed, read, written
from ..errors import CheckpointError, FuseError, SaveError
from ..report.report import Report
from ..version import versions
from ._codec import decode, encode, refused
from .checkpoints import read_safetensors, save_weights

FORMAT, VERSION = "fxfuse network", 1


@checked("network")
def save(network: fx.GraphModule, path: str | os.PathLike[str]) -> None:
    """Write a network to a file, from which `load` rebuilds it without the original model's code.

    The file is a safetensors file of the network's state dictionary, with the architecture in its
    metadata. Tied weights, modes and frozen parameters are kept; gradients are not. The report is
    kept without its seconds and its memory, so that the same network gives the same file.

    Args:
        network: What `fuse`, `balance` or `permute` returned, or any other `GraphModule`.
        path: The file to write. An older one is replaced in one step.

    Raises:
        SaveError: If the network has parts that only code of their own can rebuild.
        WriteError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> network = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(network, f"{folder}/net.safetensors")
        ...     again = load(f"{folder}/net.safetensors")
        >>> x = torch.randn(2, 4)
        >>> bool(torch.equal(network(x), again(x)))
        True
    """
    if not isinstance(network, fx.GraphModule):
        raise SaveError(
            f"a {type(network).__name__}",
            where="the argument `network`",
            expected="a GraphModule, as fxfuse.fuse returns",
            do="make one of it: torch.fx.symbolic_trace(network)",
        )
    description, state = encode(network)
    report = network.meta.get("fxfuse")
    header = {"format": FORMAT, "version": VERSION, "made_with": versions()}
    header["report"] = written(_reproducible(report)) if isinstance(report, Report) else None
    text = json.dumps(header | description, allow_nan=False)
    _require_room(text)
    save_weights(state, path, {"format": "pt", "fxfuse": text, "sha256": _digest(text, state)})


def save_at_least_weights(
    network: fx.GraphModule, path: str | os.PathLike[str]
) -> SaveError | None:
    """Write a network as `save` does, or its weights alone where `save` refuses it.

    Returns:
        Why it was refused, None if it was not.

    Raises:
        WriteError: If the file cannot be written.
    """
    try:
        save(network, path)
    except SaveError as error:
        save_weights(network.state_dict(), path)
        return error
    return None


@checked()
def load(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Return the network of a file that `save` wrote, on the CPU, in the mode it was in.

    Nothing is unpickled, and nothing imported but torch, torchvision and this package. Functions
    that the file names are called only if they compute on tensors. Named tuples come back as
    tuples of the same name and fields, but of another class; data classes, as dictionaries.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file cannot be read, has changed since it was written, is of a later
            version, or names what is not allowed.
    """
    where = str(path)
    state, metadata = read_safetensors(path)
    if "fxfuse" not in metadata:
        raise CheckpointError(
            "weights without a network",
            where=where,
            expected="a file that fxfuse.save wrote",
            do="build the model and load them into it: model.load_state_dict("
            "safetensors.torch.load_file(path))",
        )
    text = metadata["fxfuse"]
    if metadata.get("sha256") != _digest(text, state):
        raise refused("a file whose contents have changed since it was written", where)
    try:
        header = parsed(text, "the description")
        _require_format(header, where)
        tables = {key: header.get(key) for key in ("tensors", "modules")}
        network = decode(tables, state, where)
        report = read(Report | None, header.get("report"), "the report")
    except CheckpointError:
        raise
    except FuseError as error:
        raise refused(f"a network that cannot be rebuilt: {error.met}", where, error) from error
    if report is not None:
        network.meta["fxfuse"] = report
    return network


def _reproducible(report: Report) -> Report:
    """Return a report without what differs from run to run."""
    layers = tuple(replace(layer, seconds=0.0) for layer in report.layers)
    return replace(report, seconds={}, memory={}, layers=layers)


def _require_format(header: Any, where: str) -> None:
    """Refuse what is of another format or version."""
    fields = header if isinstance(header, dict) else {}
    if fields.get("format") != FORMAT or fields.get("version") != VERSION:
        raise CheckpointError(
            f"a file of format {fields.get('format')!r}, version {fields.get('version')!r}",
            where=where,
            expected=f"format '{FORMAT}', version {VERSION}",
            do="read it with the fxfuse that wrote it",
        )


def _digest(text: str, state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_room(text: str) -> None:
    """Refuse a description that safetensors would not read again."""
    if len(text) > 90_000_000:  # of the 100 MB that a header may have
        raise SaveError(
            f"a description of {len(text) / 1e6:.0f} MB",
            where="tensors outside the network's state",
            expected="at most 90 MB",
            do="register large constants as buffers, which go to the weights",
        )
