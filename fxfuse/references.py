"""What the command line calls models and data by, and safe reading and writing of weights.

A model is `package.module:factory[?key=value&...][@checkpoint.safetensors]`; data are
`imagefolder:PATH[?size=..&mean=..&std=..]`, `mnist:PATH` or `package.module:factory[?...]`.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import parse_qsl

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import CheckpointError, DataError, FuseError, ReferenceFormatError
from .files import write_atomically

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def load_model(reference: str) -> nn.Module:
    """Build a model from its reference, in eval mode, with its checkpoint's weights if given.

    Raises:
        ReferenceFormatError: If the reference cannot be resolved.
        CheckpointError: If the checkpoint cannot be read or does not fit.
    """
    spec, _, checkpoint = reference.partition("@")
    model = _call(spec, reference)
    if not isinstance(model, nn.Module):
        raise _unresolved(reference, f"the factory returned a {type(model).__name__}")
    if checkpoint:
        _load_weights(model, Path(checkpoint))
    return model.eval()


def load_data(reference: str, batch: int = 50, seed: int = 0) -> Any:
    """Return calibration data from its reference: batches whose first entry is the input.

    Samples of image folders and MNIST come in an order drawn with `seed`.

    Raises:
        ReferenceFormatError: If the reference cannot be resolved.
        DataError: If there is nothing to read where it points.
    """
    kind, _, rest = reference.partition(":")
    makers = {"imagefolder": _image_folder, "mnist": _mnist}
    if kind not in makers:
        return _call(reference, reference)
    import torch
    from torch.utils.data import DataLoader

    path, options = _split_options(rest, reference)
    try:
        dataset = makers[kind](path, **options)
    except FuseError:
        raise
    except TypeError as error:
        raise _unresolved(reference, str(error)) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"data that cannot be read: {error}",
            where=reference,
            expected="a folder of class folders of images, or torchvision's MNIST folder",
            do="check the path",
        ) from error
    order = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch, shuffle=True, generator=order, collate_fn=_collate)


def save_weights(tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write tensors as safetensors, in one step: the old file stays until the new one is whole.

    Raises:
        WriteError: If the file cannot be written.
    """
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(Path(path), lambda temporary: save_file(own, temporary))


def _call(spec: str, reference: str) -> Any:
    path, options = _split_options(spec, reference)
    module_name, colon, factory_name = path.partition(":")
    if not colon or not module_name or not factory_name:
        raise _unresolved(reference, "it has no 'package.module:factory'")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules in the current folder, as `python -m` has it
    try:
        found: Any = importlib.import_module(module_name)
        for part in factory_name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise _unresolved(reference, str(error)) from error
    if not isinstance(found, Callable):
        return found
    try:
        return found(**options)
    except Exception as error:
        raise _unresolved(reference, f"{factory_name} failed: {error}") from error


def _split_options(spec: str, reference: str) -> tuple[str, dict[str, Any]]:
    path, _, query = spec.partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise _unresolved(reference, str(error)) from error
    return path, {key: _literal(value) for key, value in pairs}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _unresolved(reference: str, why: str) -> ReferenceFormatError:
    return ReferenceFormatError(
        f"a reference that cannot be resolved: {why}",
        where=f"'{reference}'",
        expected="package.module:factory[?key=value&...][@checkpoint.safetensors], "
        "and for data also imagefolder:PATH or mnist:PATH",
        do="try the import in Python; quote '?' and '&' in the shell",
    )


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"a checkpoint that cannot be read: {error}",
            where=str(path),
            expected="a safetensors file",
            do="check the path; convert other formats with safetensors.torch.save_file",
        ) from error
    try:
        model.load_state_dict(
            state
        )  # fills in what older checkpoints lack, unlike a check of names
    except RuntimeError as error:
        found = shorten(" ".join(str(error).splitlines()[1:]), 400, placeholder=" ...")
        raise CheckpointError(
            f"a checkpoint that does not fit: {found}",
            where=f"{path} into {type(model).__name__}",
            expected="the names and shapes of the model's state_dict",
            do="build the model with the options it was trained with: ?key=value",
        ) from error


def _image_folder(
    path: str, size: int | None = None, mean: Any = _IMAGENET["mean"], std: Any = _IMAGENET["std"]
) -> Any:
    from torchvision import datasets, transforms

    steps = [] if size is None else [transforms.Resize(size), transforms.CenterCrop(size)]
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    return datasets.ImageFolder(path, transforms.Compose(steps))


def _mnist(path: str) -> Any:
    from torchvision import datasets, transforms

    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    return datasets.MNIST(path, train=True, transform=transforms.Compose(steps))


def _collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    import torch

    shapes = {tuple(image.shape) for image, _ in samples}
    if len(shapes) > 1:
        raise DataError(
            f"images of different sizes: {sorted(shapes)[:3]}",
            where="the image folder",
            expected="images of one size",
            do="give a size: imagefolder:PATH?size=224",
        )
    return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])
